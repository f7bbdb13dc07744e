"""What came in with one request, as a list of single slices' files in the order of the scan.

Archives are opened in memory, where a name can lead nowhere, and only after their directory has been believed as
little as any header: entries, their inflated size and the time are counted while they are read.
"""

import io
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pydicom

from chestct.errors import ChestCTError, DecodeError
from chestct.imaging.decode import declared_size, sniff
from chestct.imaging.slice import BudgetedFile
from chestct.imaging.slice_files import is_slice_name

ZIPS = (b"PK\x03\x04", b"PK\x05\x06")
"""How an archive begins, and an empty one."""

CHUNK = 1 << 20
MAX_READS = 20_000
MAX_LISTED = 10_000
"""Entries of an archive, wanted or not; zipfile makes a Python object of each."""


class UploadError(ChestCTError):
    """A request that asks for more than the service gives, or an archive that cannot be opened."""


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
    found: list[Upload] = []
    left = max_bytes
    for name, data in files:
        parts = unzip(data, max_files, left) if data[:4] in ZIPS else [(name, data)]
        left -= sum(len(part) for _, part in parts)
        found += [Upload(part_name, part, scan_position(part)) for part_name, part in parts]
        if len(found) > max_files:
            raise too_many(len(found), max_files)
    if not found:
        raise UploadError("There is no file in it. Choose PNG, JPEG, TIFF or DICOM files, or a zip of them.")
    return in_order(found)


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
            found, left = [], max_bytes
            for entry in entries:
                content = _inflated(archive, entry, left)
                left -= len(content)
                found.append((entry.filename, content))
            return found
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
