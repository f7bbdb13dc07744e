"""The command lines and the servers on loopback, for every end-to-end test."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.e2e.loopback import hub as hub
from tests.e2e.loopback import plain_http as plain_http
from tests.e2e.loopback import s3 as s3
from tests.e2e.loopback import server as server
from tests.e2e.test_commands import ROOT
from tests.e2e.test_commands import call as call


def bare_python(folder: Path) -> Path:
    """Python of a new environment with the dependencies of this one, and without chestct."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path alone: the editable installation of this environment stays out of it.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel, and the dependencies of this one; returns its folder of programs."""
    folder = tmp_path_factory.mktemp("installed")
    files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, *["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "wheels", "./source"]]
    subprocess.run(build, cwd=folder, check=True)
    (wheel,) = (folder / "wheels").glob("*.whl")
    python = bare_python(folder / "env")
    subprocess.run(
        [*pip, "--python", str(python), "install", "-q", "--no-deps", "--force-reinstall", str(wheel)], check=True
    )
    return python.parent
