"""Which files may be slices: the one rule for ingest, prediction and archives, and the one reader of archives.

What a file is, its content says, so extensions do not matter. Only what operating systems, file servers and editors
leave behind is known by its name; it is skipped with its reason, never read and never an error.
"""

import io
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from zipfile import ZipFile, ZipInfo

from chestct.errors import DataError, DecodeError

LEFTOVERS = {
    "left by macOS": ("__macosx", "icon\r", "network trash folder", "temporary items"),
    "left by Windows": (
        "thumbs.db",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "desktop.ini",
        "$recycle.bin",
        "system volume information",
    ),
    "left by a file server": ("@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "lost+found"),
    "left by Python": ("__pycache__",),
    "an index of DICOM files, not a slice": ("dicomdir",),
}
"""Why files and folders of these names, in lower case, hold no slices."""


FOR_A_VIEWER = re.compile(r".*-[0-9a-f]{8}-(overlay|report)\.dcm")
"""What `chestct predict --viewer` calls its files, which are no slices."""


def why_skipped(name: str) -> str:
    """Why a file or folder of this name is not looked at; empty where it may be, or hold, a slice."""
    if name.startswith("."):  # .DS_Store, ._a.png, .ipynb_checkpoints, .thumbnails, .AppleDouble, .git, ...
        return "hidden"
    if name.startswith("~$"):
        return "left by an office program"
    if FOR_A_VIEWER.fullmatch(name):
        return "made by chestct for a viewer"
    name, *streams = re.split("[:\uf03a]", name.lower())  # streams of NTFS, which Linux shows as files; so does WSL
    if "zone.identifier" in streams:
        return "left by Windows"
    return next((reason for reason, names in LEFTOVERS.items() if name in names), "")


def is_slice_name(path: str) -> bool:
    """Whether an entry of an archive may be a slice: no folder, and no part of its path is skipped.

    path: parts separated by / or, as Windows tools write them, by a backslash.
    """
    parts = re.split(r"[/\\]", path)
    return bool(parts[-1]) and not any(why_skipped(part) for part in parts if part not in (".", ".."))


@dataclass(frozen=True)
class Entry:
    """A file in a zip archive, which is on disk or in memory. It is read in memory, where a name can lead nowhere."""

    archive: Path | ZipFile
    info: ZipInfo

    def __str__(self) -> str:
        return f"{self.archive}/{self.info.filename}" if isinstance(self.archive, Path) else self.info.filename

    def read(self, max_bytes: int) -> bytes:
        """Raises DecodeError. zipfile gives no more bytes than an entry announces."""
        if self.info.file_size > max_bytes:
            raise DecodeError(str(self), f"{self.info.file_size:,} bytes; data.max_bytes allows {max_bytes:,}")
        try:
            return _opened(self.archive).read(self.info)
        except Exception as error:  # whatever wrong bytes lead zipfile and zlib to
            raise DecodeError(str(self), f"cannot be taken from the zip archive ({error})") from None


@dataclass(frozen=True)
class BadArchive:
    """An archive whose files cannot be listed; it stands for them, and reading it says why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return str(self.path)

    def read(self, max_bytes: int) -> bytes:
        """Raises DecodeError."""
        raise DecodeError(self.path, self.reason)


File = Path | Entry | BadArchive


def entries(source: Path | bytes) -> list[Entry]:
    """The files of a zip archive that may be slices, by their names alone. Raises DataError."""
    try:
        archive = source if isinstance(source, Path) else ZipFile(io.BytesIO(source))
        return [Entry(archive, info) for info in _opened(archive).infolist() if is_slice_name(info.filename)]
    except Exception as error:  # as above
        name = "The upload" if isinstance(source, bytes) else source
        raise DataError(f"{name} cannot be opened as a zip archive: {error}. Make it again, or unpack it.") from None


def _opened(archive: Path | ZipFile) -> ZipFile:
    if isinstance(archive, ZipFile):
        return archive
    if not archive.is_file():  # opening a pipe would wait
        raise OSError("not a regular file")
    return _on_disk(archive, archive.stat().st_mtime_ns)


@lru_cache(maxsize=8)  # systems limit how many files a program may hold open, macOS to 256
def _on_disk(path: Path, modified: int) -> ZipFile:
    return ZipFile(path)


def fail(error: OSError) -> None:
    """What becomes of a folder that cannot be listed: else its files would be left out in silence."""
    raise error


def walk(
    folder: Path, on_error: Callable[[OSError], object] = fail, own: Collection[str] = ()
) -> Iterator[tuple[Path, str]]:
    """Every file below a folder with the reason why it is skipped, or "" where it may be a slice.

    Names come sorted, files before folders. A folder that is skipped stands for all that is in it; links to folders
    are skipped, for they may loop. on_error: called with the error of a folder that cannot be listed; what it raises
    ends the walk. own: absolute paths that the program itself writes; they are not even listed.
    """
    for here, folders, names in os.walk(folder, onerror=on_error):
        below = set(folders)
        folders.clear()
        for name in (*sorted(names), *sorted(below)):
            path, reason = Path(here, name), why_skipped(name)
            if own and os.path.abspath(path) in own:  # noqa: PTH100
                continue
            if name in below and path.is_symlink():
                reason = reason or "a link to a folder, which is not followed"
            if name in below and not reason:
                folders.append(name)
            else:
                yield path, reason


def describe_skipped(skipped: Sequence[tuple[str, str]]) -> str:
    """Skipped files and folders, as (name, reason), in one clause: how many, and the first of them."""
    names = [name if name.isprintable() else name.encode("unicode_escape").decode() for name, _ in skipped[:3]]
    first = ", ".join(f"{name} ({reason})" for name, (_, reason) in zip(names, skipped, strict=False))
    more = f", and {len(skipped) - 3:,} more" if len(skipped) > 3 else ""
    return f"{len(skipped):,} skipped: {first}{more}"
