"""Which files may be slices: the one rule for ingest, prediction and archives.

What a file is, its content says, so extensions do not matter. Only what operating systems, file servers and editors
leave behind is known by its name; it is skipped with its reason, never read and never an error.
"""

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

LEFTOVERS = {
    "__macosx": "left by macOS",
    "icon\r": "left by macOS",
    "network trash folder": "left by macOS",
    "temporary items": "left by macOS",
    "thumbs.db": "left by Windows",
    "ehthumbs.db": "left by Windows",
    "ehthumbs_vista.db": "left by Windows",
    "desktop.ini": "left by Windows",
    "$recycle.bin": "left by Windows",
    "recycler": "left by Windows",
    "system volume information": "left by Windows",
    "@eadir": "left by a file server",
    "@tmp": "left by a file server",
    "@recycle": "left by a file server",
    "#recycle": "left by a file server",
    "#snapshot": "left by a file server",
    "lost+found": "left by a file system check",
    "__pycache__": "left by Python",
    "dicomdir": "an index of DICOM files, not a slice",
}
"""Names of files and folders, in lower case, and why they hold no slices."""


def why_skipped(name: str) -> str:
    """Why a file or folder of this name is not looked at; empty where it may be, or hold, a slice."""
    if name.startswith("."):  # .DS_Store, ._a.png, .ipynb_checkpoints, .thumbnails, .AppleDouble, .git, ...
        return "hidden"
    if name.startswith("~$"):
        return "left by an office program"
    return LEFTOVERS.get(name.lower(), "")


def is_slice_name(path: str) -> bool:
    """Whether an entry of an archive may be a slice: no folder, and no part of its path is skipped.

    path: parts separated by / or, as Windows tools write them, by a backslash.
    """
    parts = re.split(r"[/\\]", path)
    return bool(parts[-1]) and not any(why_skipped(part) for part in parts if part not in (".", ".."))


def walk(folder: Path, on_error: Callable[[OSError], object], own: Collection[str] = ()) -> Iterator[tuple[Path, str]]:
    """Every file below a folder with the reason why it is skipped, or "" where it may be a slice.

    Names come sorted, files before folders. A folder that is skipped stands for all that is in it; links to folders
    are skipped, for they may loop. on_error: called with the error of a folder that cannot be listed; what it raises
    ends the walk. own: absolute paths that the program itself writes; they are not even listed.
    """

    def listed(here: str, names: list[str], reason: Callable[[Path], str]) -> dict[Path, str]:
        paths = (Path(here, name) for name in sorted(names))
        return {path: reason(path) for path in paths if not own or os.path.abspath(path) not in own}  # noqa: PTH100

    for here, folders, names in os.walk(folder, onerror=on_error):
        yield from listed(here, names, lambda path: why_skipped(path.name)).items()
        below = listed(here, folders, lambda path: why_skipped(path.name) or _linked(path))
        yield from ((path, reason) for path, reason in below.items() if reason)
        folders[:] = [path.name for path, reason in below.items() if not reason]


def describe_skipped(skipped: Sequence[tuple[str, str]], shown: int = 3) -> str:
    """Skipped files and folders, as (name, reason), in one clause: how many, and the first of them."""
    first = ", ".join(
        f"{name.encode('unicode_escape').decode() if not name.isprintable() else name} ({reason})"
        for name, reason in skipped[:shown]
    )
    return f"{len(skipped):,} skipped: {first}" + (
        f", and {len(skipped) - shown:,} more" if len(skipped) > shown else ""
    )


def _linked(folder: Path) -> str:
    return "a link to a folder, which is not followed" if folder.is_symlink() else ""
