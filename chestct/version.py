"""The version, and the commit: their own module, so that what stands below the Python API can name them."""

import subprocess
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def code_version() -> dict[str, Any]:
    """Commit of the code that runs, and whether files differ from it; empty outside a git checkout of this project."""

    def git(*args: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # else it is installed in the folder of another project
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {}
