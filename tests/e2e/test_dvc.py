"""DVC itself: what a fresh clone is told, and `dvc exp run -S` against settings written into params.yaml by hand."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e.test_commands import ROOT


@pytest.mark.slow
def test_an_experiment_keeps_the_settings_that_were_edited_by_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "ada")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "ada@example.org")

    def run(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    for name in ("params.yaml", ".dvc/config", ".dvcignore"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    stage = {"cmd": "python -c \"import shutil; shutil.copy('params.yaml', 'out.yaml')\"", "params": ["data", "optim"]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"copy": stage | {"outs": ["out.yaml"]}}}))
    edited = (tmp_path / "params.yaml").read_text(encoding="utf-8").replace("name: phantom\n", "name: clinic\n", 1)
    (tmp_path / "params.yaml").write_text(edited, encoding="utf-8")
    run("git", "init", "-q", "-b", "main")
    run("git", "add", ".")
    run("git", "commit", "-q", "-m", "our data")
    run("dvc", "exp", "run", "-S", "optim.lr=0.5")
    used = yaml.safe_load((tmp_path / "out.yaml").read_text(encoding="utf-8"))
    assert used["data"]["name"] == "clinic"
    assert used["optim"]["lr"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["pull", "pull data.dvc", "push data.dvc"])
def test_in_a_fresh_clone_dvc_says_where_its_files_come_from_and_a_remote_of_ones_own_ends_that(tmp_path, arguments):
    def dvc(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "dvc", *words]
        return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)

    clone = tmp_path / "clone"
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(tmp_path / "site")}
    subprocess.run(["git", "init", "-q", str(clone)], check=True)
    for name in ("data.dvc", ".dvc/config", ".dvcignore"):
        (clone / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    if arguments.startswith("push"):
        (clone / "data").mkdir()
        (clone / "data/slice.png").write_bytes(b"slice")
        dvc("add", "data")
    told = dvc(*arguments.split())
    assert told.returncode != 0
    quoted = "".join(re.findall(r"(?m)^> (.*\n)", (ROOT / "docs/data.md").read_text(encoding="utf-8")))
    if arguments == "pull data.dvc":
        assert quoted.split() == told.stderr.split()
    for advice in ("chestct data fetch", "make repro", "docs/dagshub.md"):
        assert advice in told.stderr
    assert dvc("data", "status").returncode == 0  # which needs no remote

    dvc("remote", "add", "--default", "ours", str(tmp_path / "store"))
    told = dvc(*arguments.split())
    assert "public copy" not in told.stderr
    assert (told.returncode == 0) == arguments.startswith("push")
    (clone / "data.dvc").unlink()  # as docs/dagshub.md says where nobody has these files
    assert dvc("pull").returncode == 0
