"""A bundle's folder takes the place of what stood there whole or not at all, never that of somebody's own files."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from chestct.errors import BundleError

TENSORS, FACTS, CARD = "model.safetensors", "bundle.json", "MODEL_CARD.md"


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder next to `folder`; it takes that one's place when the block ends without an error.

    Exports to one folder wait for each other, by a lock that stays next to it. Raises BundleError as `check_target`.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        _mend(folder)
        check_target(folder)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield new
            new.chmod(0o755)  # mkdtemp's folders are for one user
            _swap(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def check_target(folder: Path) -> None:
    """Raises BundleError unless a bundle may take a folder's place: there is none, it is empty, or it is a bundle."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder. Give another for the bundle: bundle={folder}-bundle")
    names = {entry.name for entry in folder.iterdir()}
    if names and not (FACTS in names and _is_bundles(folder)):
        other = min(names - {TENSORS, FACTS, CARD}, default=min(names))
        raise BundleError(
            f"{folder} holds {other} and is no bundle: an export would remove what is in it. Give a folder of its own: "
            f"bundle={folder / 'bundle'}"
        )


def _is_bundles(folder: Path) -> bool:
    """Whether nothing but files of a bundle is in a folder."""
    return all(entry.name in (TENSORS, FACTS, CARD) and entry.is_file() for entry in folder.iterdir())


def _swap(new: Path, folder: Path) -> None:
    """Puts a folder in the place of another that may be there; what stood there goes last."""
    old = new.with_name(new.name + ".old")
    if folder.exists():
        folder.replace(old)
    new.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _mend(folder: Path) -> None:
    """Puts back what an export that was killed while it swapped had moved away, and removes what others left."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}-\w{{8}}(\.old)?")
    left = [path for path in folder.parent.iterdir() if pattern.fullmatch(path.name) and path.is_dir()]
    for path in sorted(filter(_is_bundles, left), key=lambda path: path.suffix == ".old", reverse=True):
        if path.suffix == ".old" and not os.path.lexists(folder):
            path.replace(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)
