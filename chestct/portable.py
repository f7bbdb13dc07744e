"""The package as a folder that others run without installing it: in a Space, and within an MLflow model.

chestct is on no index that everybody has, so its source goes along; what it needs from indexes is listed with the
versions that it runs with here.
"""

import shutil
import sys
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from chestct.config.compose import CONF, PACKAGE
from chestct.errors import ChestCTError
from chestct.files import write_atomic
from chestct.models.bundle import bundle_path, load_bundle

SPACE = PACKAGE / "space"
"""The app of a Space and its metadata."""


def copy_package(folder: Path) -> Path:
    """Writes the package with its settings into `folder`/chestct, and returns that."""
    package = shutil.copytree(PACKAGE, folder / "chestct", ignore=shutil.ignore_patterns("__pycache__"))
    if not (package / "conf").is_dir():  # in the repository it lies beside the package
        shutil.copytree(CONF, package / "conf")
    return package


def is_installed() -> bool:
    """Whether what the package needs is known: not where it runs from a folder that was never installed."""
    return any(distributions(name="chestct"))


def requirements(*extras: str) -> list[str]:
    """What the package and its extras need, each at the version that is installed here, as pip reads it.

    Raises ChestCTError where that is not known.
    """
    try:
        needed = [Requirement(text) for text in requires("chestct") or []]
        wanted = [one for one in needed if not one.marker or any(one.marker.evaluate({"extra": e}) for e in extras)]
        # Without a local part, such as that of torch's CPU wheels, which no index of everybody's knows.
        return [f"{one.name}=={version(one.name).split('+')[0]}" for one in wanted]
    except PackageNotFoundError as error:
        raise ChestCTError(f"{error.name} is not installed, so its version is not known: pip install it.") from None


def write_space(folder: Path, source: str | Path = "packaged") -> None:
    """Writes a Gradio Space that shows the bundle `source`: app, metadata, requirements, the package and the bundle.

    Raises ChestCTError where the folder holds anything, BundleError for what is no sound bundle.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ChestCTError(f"{folder} is not empty. Give a new folder, or remove it.")
    load_bundle(source)
    listed = requirements("serve", "dicom")
    copy_package(folder)
    shutil.copytree(bundle_path(source), folder / "bundle")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    write_atomic(folder / "requirements.txt", "\n".join(listed) + "\n")
    shutil.copy(SPACE / "app.py", folder)
    card = (SPACE / "README.md").read_text(encoding="utf-8")
    write_atomic(folder / "README.md", card.format(gradio=version("gradio"), python=python))
