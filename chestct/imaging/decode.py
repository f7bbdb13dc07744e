"""Bytes to pixels: the only code that decodes images; PNG, JPEG, TIFF, BMP, WebP and DICOM become `Slice`s.

Files come from strangers, so the content decides what a file is, its header is read before a decoder is let near it
(`headers`), and everything that can be wrong with a file ends as one error, DecodeError with the path and the reason.
DICOM lives in `dicom`, imported when the first such file is met: pydicom takes longer to import than a PNG to decode.
"""

import hashlib
import io
import stat
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from chestct.config.schema import WindowConfig
from chestct.errors import DecodeError
from chestct.imaging import headers, png

# The classes instead of Image.open: only the sniffed format is ever tried, and neither Pillow's global limits nor its
# warnings about them come into it; `Limits` hold instead.
OPENERS: dict[str, Callable[[io.BytesIO], ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "TIFF": TiffImageFile,
    "BMP": BmpImageFile,
    "WEBP": WebPImageFile,
}

MAX_READS = 300_000
"""Pieces of a raster file, such as chunks or strips; an image of a megapixel takes a few hundred."""

CHROMA_GRID = 64


@dataclass(frozen=True)
class Limits:
    """What a file may cost: its length in bytes (also after inflating), and the pixels of one slice."""

    max_bytes: int = 256_000_000
    max_pixels: int = 64_000_000


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class Slice:
    """One decoded slice.

    levels: [H, W], 0 black, as the file has them: uint8 or uint16 with their largest value for white, or float32 in
    [0, 1]; gray: the same as float32 [H, W] in [0, 1]; mode: Pillow's mode of the file ("L", "RGBA", "I;16", ...) or
    "DICOM"; color: mean chroma, (max - min of R, G, B) / 255 over a grid of 64 x 64 pixels: 0 for grey, below 0.02 for
    CT with coloured marks or JPEG noise, above 0.05 for most photographs; patient, study, series, modality: DICOM's
    PatientID, StudyInstanceUID, SeriesInstanceUID and Modality, or ""; frame: index in a file of several.
    """

    levels: np.ndarray
    format: str
    mode: str
    color: float = 0.0
    patient: str = ""
    study: str = ""
    series: str = ""
    frame: int = 0
    modality: str = ""

    @cached_property
    def gray(self) -> np.ndarray:
        return as_gray(self.levels)


def decode(source: Path | bytes, window: WindowConfig, limits: Limits = Limits(), *, name: str | None = None) -> Slice:
    """The slice in a file, or in a file's bytes, called `name` in errors.

    Of a multi-frame DICOM it is the middle frame (the ends of a scan show neck or abdomen), of a TIFF with several
    pages or an animation the first (later TIFF pages are often thumbnails).

    Grey levels: unsigned samples are divided by the largest value that their type can hold (1, 255, 65535), whatever
    the image uses of it; float samples have to lie in [0, 1]; DICOM goes through `window`, see `dicom`. Colour becomes
    luma 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601, 16-bit colour at 8 bits), which is exactly R where R = G = B.
    Opaque alpha changes nothing, transparent pixels are put on black. Exif orientation is applied; colour profiles are
    not.

    Raises DecodeError for whatever is wrong with the file. Other threads may decode at the same time.
    """
    with closing(_slices(source, window, limits, name, every=False)) as slices:
        return next(slices)


def decode_frames(
    source: Path | bytes, window: WindowConfig, limits: Limits = Limits(), *, name: str | None = None
) -> Iterator[Slice]:
    """Every frame of a multi-frame DICOM and every page of a TIFF, decoded one by one as they are asked for.

    Frames are as `decode` gives them. Raises DecodeError, possibly after some good frames.
    """
    return _slices(source, window, limits, name, every=True)


def as_gray(levels: np.ndarray) -> np.ndarray:
    """Grey levels of any kind (see Slice) as float32 in [0, 1]."""
    if levels.dtype.kind == "f":
        return levels
    return levels / np.float32(np.iinfo(levels.dtype).max)


def pixel_hash(levels: np.ndarray) -> str:
    """Hash of what is seen: 32 hex digits over the shape and the grey levels, not over the file.

    levels: [H, W], uint8, uint16, or float in [0, 1]. Levels are compared at 16 bits, so a lossless copy has the same
    hash whether it is saved as L, RGB or RGBA, as PNG, BMP or TIFF, and whether it is hashed as uint8 or as float.
    """
    if levels.dtype.kind == "f":
        levels = np.rint(levels * 65535).astype("<u2")
    if levels.dtype != np.uint8:
        short = (levels >> 8).astype(np.uint8)
        # What 8 bits can tell is hashed as 8 bits, which nearly all files have: no pass over them in 16 bits.
        levels = short if (levels == short * np.uint16(257)).all() else levels.astype("<u2")
    digest = hashlib.sha256(np.array(levels.shape, "<u4").tobytes())
    digest.update(np.ascontiguousarray(levels).data)
    return digest.hexdigest()[:32]


def read(path: Path, limits: Limits = Limits()) -> bytes:
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
        raise DecodeError(path, f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a name that no file can have
        raise DecodeError(path, f"cannot be read: {error}") from None


def _slices(
    source: Path | bytes, window: WindowConfig, limits: Limits, name: str | None, every: bool
) -> Generator[Slice, None, None]:
    data = source if isinstance(source, bytes) else read(source, limits)
    label = name or (f"{len(data):,} bytes" if isinstance(source, bytes) else source)
    format = headers.sniff(data)
    if not format:
        start = f"it starts with {data[:24]!r}" if data else "it is empty"
        raise DecodeError(label, f"neither PNG, JPEG, TIFF, BMP, WebP nor DICOM: {start}")
    try:
        if len(data) > limits.max_bytes:
            raise headers.RefusedError(f"{len(data):,} bytes; data.max_bytes allows {limits.max_bytes:,}")
        if format == "DICOM":
            from chestct.imaging import dicom

            yield from dicom.slices(data, window, limits, every)
        else:
            yield from _raster_slices(data, format, limits)
    except headers.RefusedError as error:
        raise DecodeError(label, f"{format}: {error}") from error
    except Exception as error:  # what decoders raise when bytes are wrong has no common type
        raise DecodeError(label, f"damaged {format}; export it again ({error or type(error).__name__})") from error


def check_pixels(width: int, height: int, limits: Limits) -> None:
    """Raise RefusedError unless an image of this size may be decoded."""
    if width < 1 or height < 1 or width * height > limits.max_pixels:
        raise headers.RefusedError(f"{width} x {height} pixels; data.max_pixels allows {limits.max_pixels:,} in all")


def _raster_slices(data: bytes, format: str, limits: Limits) -> Iterator[Slice]:
    orientation = 1
    if format == "JPEG":
        data, orientation = headers.bare_jpeg(data)
    elif format == "PNG":
        data = png.inflated(data)
    elif format == "WEBP":
        check_pixels(*headers.webp_size(data), limits)
    pages = headers.tiff_pages(data) if format == "TIFF" else iter([0])
    next(pages)  # checks the first page before Pillow sees it
    with OPENERS[format](headers.BudgetedFile(data, MAX_READS)) as image:
        image.decodermaxblock = len(data)  # not piece by piece: threads would wait for each other at each
        if format in ("PNG", "WEBP"):
            orientation = headers.exif_orientation(image.info.get("exif", b"").removeprefix(b"Exif\0\0"))
        yield _slice(image, format, limits, orientation, frame=0)
        for frame, _ in enumerate(pages, start=1):
            image.seek(frame)
            yield _slice(image, format, limits, orientation, frame)


def _slice(image: Image.Image, format: str, limits: Limits, orientation: int, frame: int) -> Slice:
    check_pixels(*image.size, limits)
    mode = image.mode
    levels = _upright(_levels(image), orientation)
    return Slice(levels, format, mode, _chroma(image), frame=frame)


def _levels(image: Image.Image) -> np.ndarray:
    """Grey levels [H, W] of a Pillow image in any mode (see Slice)."""
    if image.mode.startswith("I;16") or (image.mode == "I" and isinstance(image, PngImageFile)):
        return np.asarray(image).astype(np.uint16)
    if image.mode == "F":
        gray = np.asarray(image)
        if not (gray.min() >= 0 and gray.max() <= 1):  # also true for NaN
            raise headers.RefusedError(
                "float samples outside [0, 1]; save with 8 or 16 bits, or as DICOM for Hounsfield units"
            )
        return gray
    if image.mode == "I":
        raise headers.RefusedError("signed or 32-bit samples; save with 8 or 16 bits, or as DICOM for Hounsfield units")
    if image.mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
    # Pillow goes from CMYK and palettes to grey through RGB, as it should, and drops alpha.
    levels = np.asarray(image.convert("L"))
    if image.mode == "RGBA":
        alpha = np.frombuffer(image.tobytes("raw", "A"), np.uint8).reshape(levels.shape)
        if alpha.min() < 255:
            return as_gray(levels) * as_gray(alpha)
    return levels


def _chroma(image: Image.Image) -> float:
    if image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16"):
        return 0.0
    # A grid of pixels: looking at all of them would cost a third of decoding a PNG.
    grid = image.resize((CHROMA_GRID, CHROMA_GRID), Image.Resampling.NEAREST).convert("RGB")
    levels = grid.tobytes()
    if levels[::3] == levels[1::3] == levels[2::3]:  # grey in colour, as nearly all slices are
        return 0.0
    red, green, blue = np.asarray(grid).transpose(2, 0, 1)
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    return float(chroma.mean() / 255)


def _upright(levels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the camera's Exif orientation 1-8 (Exif 2.32, tag 274; TIFF has been turned by Pillow)."""
    if orientation >= 5:
        levels = levels.T
    # Orientation -> which axes run backwards after the transposition.
    flips = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}
    return np.ascontiguousarray(np.flip(levels, flips.get(orientation, ())))
