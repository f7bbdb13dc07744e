"""What came in with one request, as a list of single slices' files in the order of the scan.

Archives are opened in memory, where a name can lead nowhere, and only after their directory has been believed as
little as any header: entries, their inflated size and the time are counted while they are read.
"""

import io
import re
import secrets
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pydicom

from chestct.errors import ChestCTError, DecodeError
from chestct.imaging.decode import declared_size, sniff
from chestct.imaging.slice import BudgetedFile
from chestct.imaging.slice_files import is_slice_name

T = TypeVar("T")

ZIPS = (b"PK\x03\x04", b"PK\x05\x06")
"""How an archive begins, and an empty one."""

CHUNK = 1 << 20
MAX_READS = 20_000
MAX_HEAD, MAX_HEADS = 16_384, 1_000_000
"""Bytes of the headers of a form's part, and of all its parts together."""

MAX_LISTED = 10_000
"""Entries of an archive, wanted or not; zipfile makes a Python object of each."""


class UploadError(ChestCTError):
    """A request that asks for more than the service gives, or an archive that cannot be opened."""


class FormError(UploadError):
    """A form that cannot be read."""


@dataclass(frozen=True)
class Upload:
    """One file. name: as its owner calls it; shown to them, never logged. place: position along the scan, or None."""

    name: str
    data: bytes
    place: float | None = None


def expand(files: Sequence[tuple[str, bytes]], max_files: int, max_bytes: int) -> list[Upload]:
    """The files, archives opened, in the order of the scan (see `in_order`).

    max_files: after opening; max_bytes: all together, inflated. Raises UploadError.
    """
    uploads: list[Upload] = []
    left = max_bytes
    for name, data in files:
        parts = unzip(data, max_files, left) if data[:4] in ZIPS else [(name, data)]
        left -= sum(len(part) for _, part in parts)
        uploads += [Upload(part_name, part, scan_position(part)) for part_name, part in parts]
        if len(uploads) > max_files:
            raise too_many(len(uploads), max_files)
    if not uploads:
        raise UploadError("There is no file in it. Choose PNG, JPEG, TIFF or DICOM files, or a zip of them.")
    return in_order(uploads)


def too_many(count: int, most: int) -> UploadError:
    return UploadError(
        f"{count} slices at once; this service takes up to {most}. Send fewer, or use the command line for whole "
        "folders: chestct predict."
    )


def unzip(data: bytes, max_files: int, max_bytes: int) -> list[tuple[str, bytes]]:
    """(name, bytes) of each file in an archive; folders and what `slice_files` skips are left out.

    Raises UploadError for what is damaged, encrypted, or more than it may be.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if len(archive.infolist()) > MAX_LISTED:
                raise too_many(len(archive.infolist()), max_files)
            entries = [entry for entry in archive.infolist() if is_slice_name(entry.filename)]
            if len(entries) > max_files:
                raise too_many(len(entries), max_files)
            files, left = [], max_bytes
            for entry in entries:
                content = _inflated(archive, entry, left)
                left -= len(content)
                files.append((entry.filename, content))
            return files
    except UploadError:
        raise
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError) as error:
        raise UploadError(f"The zip archive is damaged ({error or type(error).__name__}). Make it again.") from None
    except RuntimeError:  # what zipfile raises for a password
        raise UploadError("The zip archive asks for a password. Send one without.") from None
    except NotImplementedError:
        raise UploadError("The zip archive uses a compression that is not read here. Make it with deflate.") from None


def _inflated(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most: int) -> bytes:
    """The bytes of an entry, whose announced size is not believed."""
    parts, size = [], 0
    with archive.open(entry) as file:
        while part := file.read(CHUNK):
            size += len(part)
            if size > most:
                raise UploadError(f"The zip archive holds more than the {most:,} bytes that are left to it.")
            parts.append(part)
    return b"".join(parts)


def scan_position(data: bytes) -> float | None:
    """Where a DICOM slice lies along the scan: millimetres along its normal, else InstanceNumber, else None."""
    if sniff(data) != "DICOM":
        return None
    try:
        tags = ["ImagePositionPatient", "ImageOrientationPatient", "InstanceNumber"]
        dataset = _header(data, tags)
        position, orientation = (dataset.get(tag) for tag in tags[:2])
        if position and orientation:
            rows, columns = np.reshape(np.asarray(orientation, float), (2, 3))
            return float(np.cross(rows, columns) @ np.asarray(position, float))
        return float(dataset["InstanceNumber"].value)
    except Exception:  # whatever is wrong with it, decoding will say it better
        return None


def in_order(uploads: list[Upload]) -> list[Upload]:
    """By position along the scan where every file has its own, else by name with numbers in their order."""
    places = {upload.place for upload in uploads}
    if None not in places and len(places) == len(uploads):
        return sorted(uploads, key=lambda upload: upload.place or 0.0)
    return sorted(uploads, key=lambda upload: natural(upload.name))


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sorting key in which `slice 9` comes before `slice 10`."""
    parts = re.split(r"(\d+)", name.lower())
    return [(1, int(part[:18]), "") if part.isdecimal() and part.isascii() else (0, 0, part) for part in parts]


def frame_count(data: bytes, most: int) -> int:
    """How many slices a file holds, from its headers alone: frames of a DICOM, pages of a TIFF; at most most + 1.

    1 for what cannot be read: decoding will say why.
    """
    try:
        return min(most + 1, declared_size(data).frames)
    except DecodeError:
        return 1


def _header(data: bytes, tags: list[str]) -> pydicom.Dataset:
    file = BudgetedFile(data, MAX_READS)
    return pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=tags)


def files_in_form(body: bytes, content_type: str) -> list[bytes]:
    """The content of each file in a body of multipart/form-data (RFC 7578), fields left out.

    Starlette's parser takes a part whose name comes as `filename*=` (RFC 5987, as older clients write names that are
    not ASCII) for a field; hence the standard library's for the headers of a part. Raises FormError.
    """
    head = Message()
    head["content-type"] = content_type
    boundary = _parsed(head.get_boundary) if len(content_type) <= MAX_HEAD else None
    if not boundary:
        raise FormError("The form cannot be read: its content type names no boundary.")
    delimiter = b"--" + boundary.encode("latin-1", "replace")
    parts = body.split(b"\r\n" + delimiter, MAX_LISTED)
    if parts[0].startswith(delimiter):
        parts[0] = parts[0].removeprefix(delimiter)
    else:
        del parts[0]  # what may stand before the first part
    if not parts or not parts.pop().startswith(b"--"):
        raise FormError("The form cannot be read: it is cut off, or its boundary is another.")
    files, read = [], 0
    for part in parts:
        end = part.find(b"\r\n\r\n", 0, MAX_HEAD)
        read += end
        if end < 0 or read > MAX_HEADS:  # before the parser, which takes a second for some megabytes
            raise FormError("The form cannot be read: the head of a part has no end, or is too long.")
        if _parsed(_filename, part[:end]) is not None:
            files.append(part[end + 4 :])
    return files


def _filename(headers: bytes) -> object:
    return message_from_bytes(headers.strip()).get_param("filename", header="content-disposition")


def _parsed(parse: Callable[..., T], *args: Any) -> T:
    try:
        return parse(*args)
    except Exception:  # the email package raises whatever odd parameters, such as `a*=; a*0=`, lead it to
        raise FormError("The form cannot be read: the parameters of a header are damaged.") from None


def keep(files: list[bytes], folder: Path, max_files: int, max_bytes: int) -> list[Path]:
    """Writes uploads to FOLDER/RANDOM/RANDOM: names and paths of other visitors tell nothing and never meet.

    max_bytes: in the folder, everybody's together. Raises UploadError.
    """
    if len(files) > max_files:
        raise too_many(len(files), max_files)
    size = sum(map(len, files))
    for own in folder.iterdir():
        with suppress(OSError):  # removed by its request meanwhile
            size += sum(path.stat().st_size for path in own.iterdir())
    if size > max_bytes:
        raise UploadError("Too many uploads wait to be read. Try again in a minute.")
    kept = []
    for content in files:
        path = folder / secrets.token_hex(16) / secrets.token_hex(16)
        path.parent.mkdir(mode=0o700)
        path.write_bytes(content)
        kept.append(path)
    return kept


def sweep(folder: Path, seconds: float) -> int:
    """Removes what has lain in the folder of uploads for longer than that. Returns how many."""
    oldest = time.time() - seconds
    removed = 0
    for path in folder.iterdir():
        with suppress(OSError):  # as above
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed += 1
    return removed
