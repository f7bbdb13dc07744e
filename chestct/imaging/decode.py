"""Bytes to pixels: the only door through which files become `Slice`s; PNG, JPEG, TIFF, BMP, WebP and DICOM.

Files come from strangers, so the content decides what a file is, and everything that can be wrong with one ends as
one error, DecodeError with the path and the reason. `dicom` is imported when the first such file is met: pydicom
takes longer to import than a PNG to decode.
"""

import stat
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from chestct.config.schema import WindowConfig
from chestct.errors import DecodeError
from chestct.imaging import raster
from chestct.imaging.slice import DEFAULT_LIMITS, Limits, MissingDecoderError, RefusedError, Slice

# Real archives are full of odd values, and Pillow and pydicom warn of each; what matters is in `decode`'s errors.
warnings.filterwarnings("ignore", module=r"(PIL|pydicom)\b")

SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"BM": "BMP",
}


class Size(NamedTuple):
    """What a file announces: pixels of the first frame, and how many frames or pages there are."""

    width: int
    height: int
    frames: int


def decode(
    source: Path | bytes, window: WindowConfig, limits: Limits = DEFAULT_LIMITS, *, name: str | None = None
) -> Slice:
    """The slice in a file, or in a file's bytes, called `name` in errors.

    Of a multi-frame DICOM it is the middle frame (the ends of a scan show neck or abdomen), of a TIFF with several
    pages or an animation the first (later TIFF pages are often thumbnails).

    Grey levels: unsigned samples are divided by the largest value that their type can hold (1, 255, 65535), whatever
    the image uses of it; float samples have to lie in [0, 1]; DICOM goes through `window`, see `dicom`. Colour becomes
    luma 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601, 16-bit colour at 8 bits), which is exactly R where R = G = B.
    Opaque alpha changes nothing, transparent pixels are put on black. Orientation is applied, whether Exif, XMP or
    ImageMagick's text states it; colour profiles are not.

    Raises DecodeError for whatever is wrong with the file. Other threads may decode at the same time.
    """
    with closing(_slices(source, window, limits, name, every=False)) as slices:
        return next(slices)


def decode_frames(
    source: Path | bytes, window: WindowConfig, limits: Limits = DEFAULT_LIMITS, *, name: str | None = None
) -> Iterator[Slice]:
    """Every frame of a multi-frame DICOM and every page of a TIFF, decoded one by one as the iterator advances.

    Frames are as `decode` gives them. Raises DecodeError, possibly after some good frames.
    """
    return _slices(source, window, limits, name, every=True)


def declared_size(data: bytes, limits: Limits = DEFAULT_LIMITS, *, name: str | None = None) -> Size:
    """Width, height and number of frames that the header of a file announces; no pixel is decoded.

    Costs a millisecond or so, and for a TIFF a walk over its pages. Raises DecodeError as `decode` does, also where one
    frame would be larger than the limits allow.
    """
    label = name or f"{len(data):,} bytes"
    with _explained(label, format := _format(data, label, limits)):
        if format == "DICOM":
            from chestct.imaging import dicom

            return Size(*dicom.declared_size(data, limits))
        return Size(*raster.declared_size(data, format, limits))


def declared_pixels(data: bytes, limits: Limits = DEFAULT_LIMITS, *, name: str | None = None) -> int:
    """Pixels of all frames together, as `declared_size` finds them: what decoding the file will cost.

    `decode` and `decode_frames` hold one frame at a time.
    """
    width, height, frames = declared_size(data, limits, name=name)
    return width * height * frames


def read(path: Path, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The bytes of a file; raises DecodeError for what is missing, not a regular file, unreadable or too long."""
    try:
        # Looked at before it is opened: opening a pipe waits for somebody to write into it.
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DecodeError(path, "is a folder or a device, not a file")
        if status.st_size > limits.max_bytes:
            raise DecodeError(path, f"{status.st_size:,} bytes; data.max_bytes allows {limits.max_bytes:,}")
        return path.read_bytes()
    except OSError as error:
        raise DecodeError(path, f"cannot be read: {error.strerror or error}", lasting=False) from None
    except ValueError as error:  # a name that no file can have
        raise DecodeError(path, f"cannot be read: {error}") from None


def sniff(data: bytes) -> str:
    """Name of the format of `data` ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "DICOM") by its content, or "".

    DICOM comes first: its preamble may hold a TIFF header. Without a preamble (PS3.10 asks for one, old archives have
    none) a DICOM file starts with an element of group 0002 or 0008.
    """
    if data[128:132] == b"DICM":
        return "DICOM"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for signature, format in SIGNATURES.items():
        if data.startswith(signature):
            return format
    headless = data[:2] in (b"\x02\0", b"\x08\0") or data[:2] == b"\0\x08"
    return "DICOM" if headless and len(data) > 8 else ""


def _slices(
    source: Path | bytes, window: WindowConfig, limits: Limits, name: str | None, every: bool
) -> Generator[Slice, None, None]:
    data = source if isinstance(source, bytes) else read(source, limits)
    label = name or (f"{len(data):,} bytes" if isinstance(source, bytes) else str(source))
    with _explained(label, format := _format(data, label, limits)):
        if format == "DICOM":
            from chestct.imaging import dicom

            yield from dicom.slices(data, window, limits, every)
        else:
            yield from raster.slices(data, format, limits, every)


def _format(data: bytes, label: str, limits: Limits) -> str:
    if not (format := sniff(data)):
        start = f"it starts with {data[:24]!r}" if data else "it is empty"
        raise DecodeError(label, f"neither PNG, JPEG, TIFF, BMP, WebP nor DICOM: {start}")
    if len(data) > limits.max_bytes:
        raise DecodeError(label, f"{format}: {len(data):,} bytes; data.max_bytes allows {limits.max_bytes:,}")
    return format


@contextmanager
def _explained(label: str, format: str) -> Iterator[None]:
    """Turn whatever decoders raise for wrong bytes, which has no common type, into a DecodeError."""
    try:
        yield
    except RefusedError as error:
        lasting = not isinstance(error, MissingDecoderError)
        raise DecodeError(label, f"{format}: {error}", lasting) from error
    except Exception as error:
        raise DecodeError(label, f"damaged {format}; export it again ({error or type(error).__name__})") from error
