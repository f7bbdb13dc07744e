"""Bytes to pixels: the only door through which files become `Slice`s; PNG, JPEG, TIFF, BMP, WebP, DICOM and NIfTI.

Files come from strangers, so the content decides what a file is, and everything that can be wrong with one ends as
DecodeError. `dicom` is imported when the first such file is met: that takes longer than a PNG to decode.
"""

import errno
import logging
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from chestct.config.schema import WindowConfig
from chestct.errors import DecodeError, out_of_memory
from chestct.files import read_regular
from chestct.imaging import raster
from chestct.imaging.slice import DEFAULT_LIMITS, Limits, MissingDecoderError, RefusedError, Slice
from chestct.imaging.slice_files import File

# Real archives are full of odd values, and the decoders warn of each and log it; what matters is in `decode`'s errors.
warnings.filterwarnings("ignore", module=r"(PIL|pydicom|nibabel)\b")
for _name in ("PIL", "nibabel.global"):  # pydicom sets its own level when it is imported, see `dicom`
    logging.getLogger(_name).setLevel(logging.CRITICAL)

SIGNATURES = (
    (344, b"n+1\0", "NIFTI"),
    (4, b"n+2\0", "NIFTI"),
    (128, b"DICM", "DICOM"),  # before TIFF: the preamble before it may hold a TIFF header
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"BM", "BMP"),
    (8, b"WEBP", "WEBP"),
    *((0, group, "DICOM") for group in (b"\x02\0", b"\x08\0", b"\0\x08")),  # no preamble, as in old archives
)
"""Where a file says which format it has, and how."""

GZIP = b"\x1f\x8b"
PACKED = (GZIP, b"PK\x03\x04", b"7z\xbc\xaf", b"Rar!")
"""How files begin that hold others."""


class Size(NamedTuple):
    """What a file announces: pixels of the first frame, and how many frames or pages."""

    width: int
    height: int
    frames: int


def decode(
    source: Path | bytes, window: WindowConfig, limits: Limits = DEFAULT_LIMITS, *, name: str | None = None
) -> Slice:
    """The slice in a file, or in a file's bytes, called `name` in errors.

    Of a multi-frame DICOM or a NIfTI volume it is the middle frame (the ends of a scan show neck or abdomen); a TIFF of
    several pages, an animation and a JPEG of several pictures are refused; previews and masks in a TIFF are left out.
    Unsigned samples are divided by the largest value that their type can hold (1, 255, 65535), float samples have to
    lie in [0, 1], DICOM and NIfTI go through `window`. Colour becomes luma (ITU-R BT.601), transparent pixels are put
    on black, orientation is applied.

    Raises DecodeError for whatever is wrong with the file. Other threads may decode at the same time.
    """
    return next(_slices(source, window, limits, name, every=False))


def decode_frames(
    source: Path | bytes, window: WindowConfig, limits: Limits = DEFAULT_LIMITS, *, name: str | None = None
) -> Iterator[Slice]:
    """Every frame of a multi-frame DICOM and every page of a TIFF, decoded one by one as the iterator advances.

    Frames are as `decode` gives them. Raises DecodeError, possibly after some good frames.
    """
    return _slices(source, window, limits, name, every=True)


def declared_size(data: bytes, limits: Limits = DEFAULT_LIMITS, *, name: str | None = None) -> Size:
    """Width, height and number of frames that the header of a file announces; no pixel is decoded.

    Raises DecodeError as `decode` does, also where one frame would be larger than the limits allow.
    """
    with _explained(data, limits, name or f"{len(data):,} bytes") as format:
        if format == "DICOM":
            from chestct.imaging import dicom

            return Size(*dicom.declared_size(data, limits))
        if format == "NIFTI":
            from chestct.imaging import nifti

            return Size(*nifti.declared_size(data, limits))
        return Size(*raster.declared_size(data, format, limits))


def read(path: File, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The bytes of a file; raises DecodeError for what is missing, not a regular file, unreadable or too long."""
    if not isinstance(path, Path):
        return path.read(limits.max_bytes)
    try:
        return read_regular(path, limits.max_bytes)
    except OSError as error:
        allowed = f"; data.max_bytes allows {limits.max_bytes:,}" if error.errno == errno.EFBIG else ""
        raise DecodeError(path, f"cannot be read: {error.strerror or error}{allowed}", lasting=False) from None
    except ValueError as error:  # a name that no file can have
        raise DecodeError(path, f"cannot be read: {error}") from None


def sniff(data: bytes) -> str:
    """Name of the format of `data` ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "DICOM", "NIFTI") by its content, or ""."""
    if gzipped := data.startswith(GZIP):  # as most NIfTI files are, which alone are read so
        with suppress(zlib.error):
            data = zlib.decompressobj(31).decompress(data[:4096], 352)
    found = next((format for at, sign, format in SIGNATURES if data.startswith(sign, at)), "")
    return "" if gzipped and found != "NIFTI" else found


def _slices(
    source: Path | bytes, window: WindowConfig, limits: Limits, name: str | None, every: bool
) -> Iterator[Slice]:
    data = source if isinstance(source, bytes) else read(source, limits)
    with _explained(data, limits, name or (f"{len(data):,} bytes" if data is source else str(source))) as format:
        if format == "DICOM":
            from chestct.imaging import dicom

            yield from dicom.slices(data, window, limits, every)
        elif format == "NIFTI":
            from chestct.imaging import nifti

            yield from nifti.slices(data, window, limits, every)
        else:
            yield from raster.slices(data, format, limits, every)


@contextmanager
def _explained(data: bytes, limits: Limits, label: str) -> Iterator[str]:
    """The format of data; turns whatever decoders raise for wrong bytes, which has no common type, into DecodeError."""
    if not (format := sniff(data)):
        start = f"it starts with {data[:24]!r}. Save it as one of these" if data else "it is empty"
        if data.startswith(PACKED):
            start = "it is a packed file. Unpack it, or give its files in a folder or a .zip"
        raise DecodeError(label, f"neither PNG, JPEG, TIFF, BMP, WebP, DICOM nor NIfTI: {start}")
    try:
        if len(data) > limits.max_bytes:
            raise RefusedError(f"{len(data):,} bytes; data.max_bytes allows {limits.max_bytes:,}")
        yield format
    except RefusedError as error:
        raise DecodeError(label, f"{format}: {error}", not isinstance(error, MissingDecoderError)) from error
    except Exception as error:
        if out_of_memory(error):
            raise DecodeError(label, f"{format}: memory ran out while it was decoded", lasting=False) from error
        reason = str(error) or type(error).__name__
        raise DecodeError(label, f"damaged {format}; export it again ({reason})") from error
