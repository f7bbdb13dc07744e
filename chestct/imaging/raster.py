"""PNG, JPEG, TIFF, BMP and WebP to slices. Pillow decodes; what a header may make it do is bounded here.

Pillow acts on headers as it opens a file: it allocates a WebP's canvas and reads metadata that a few bytes can make as
large as memory. So each file is opened by the class of its own format (`Image.open` warns about large images and tries
other formats), through a `BudgetedFile`, and its size is checked before its pixels are decoded.
"""

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import ExifTags, Image, TiffTags
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from chestct.imaging.slice import BudgetedFile, Limits, RefusedError, Slice, as_gray

MAX_READS = 300_000
"""Pieces of a file, such as chunks or strips; an image of a megapixel takes a few hundred."""

MAX_TIFF_METADATA = 8 << 20
"""Bytes read as directories of a TIFF page, some of them twice; Pillow makes up to ten times as much of numbers."""

MAX_SCANS = 100
"""Progressive JPEGs have about ten scans; each further one costs a pass over the whole image."""

CHROMA_GRID = 64


class JpegFile(JpegImageFile):
    """A JPEG whose Exif is checked before it is read; Pillow reads it on opening, for the resolution."""

    def getexif(self) -> Image.Exif:
        _check_exif(self.info)
        return super().getexif()


OPENERS: dict[str, type[ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegFile,
    "TIFF": TiffImageFile,
    "BMP": BmpImageFile,
    "WEBP": WebPImageFile,
}


def slices(data: bytes, format: str, limits: Limits, every: bool) -> Iterator[Slice]:
    """The first image of the file `data`, or all pages of a TIFF. Raises RefusedError and whatever Pillow raises."""
    for frame, image in enumerate(_pages(data, format, limits)):
        mode = image.mode
        levels, color = _levels(image), _chroma(image)
        yield Slice(_upright(levels, _orientation(image)), format, mode, color, frame=frame)
        if not every:
            return


def declared_size(data: bytes, format: str, limits: Limits) -> tuple[int, int, int]:
    """(width, height, pages) of the file `data`: of a TIFF all pages are counted, of an animation the first image."""
    sizes = [image.size for image in _pages(data, format, limits)]
    return *sizes[0], len(sizes)


def _pages(data: bytes, format: str, limits: Limits) -> Iterator[ImageFile]:
    """The opened image, at each of its pages in turn, its size checked and no pixel decoded yet."""
    if format == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
        raise RefusedError(f"more than {MAX_SCANS} scans")
    if format == "WEBP":
        limits.check(*webp_size(data))
    file = BudgetedFile(data, MAX_READS)
    if format == "TIFF":
        file.bytes_left = MAX_TIFF_METADATA
    with OPENERS[format](file) as image:
        limits.check(*image.size)
        if format != "TIFF":
            image.decodermaxblock = len(data)  # not piece by piece: threads would wait for each other at each
            yield image
            return
        page = 0
        while True:
            exif = image.getexif()
            for directory in TiffTags.TAGS_V2_GROUPS:  # Pillow reads them while it decodes, when no budget holds
                if directory in exif:
                    exif.get_ifd(directory)
            file.bytes_left = None
            yield image
            file.bytes_left = MAX_TIFF_METADATA
            try:
                image.seek(page := page + 1)
            except EOFError:
                return
            limits.check(*image.size)


def _levels(image: Image.Image) -> np.ndarray:
    """Grey levels [H, W] of a Pillow image in any mode (see Slice)."""
    if image.mode.startswith("I;16") or (image.mode == "I" and isinstance(image, PngImageFile)):
        return np.asarray(image).astype(np.uint16)
    if image.mode == "F":
        gray = np.asarray(image)
        if not (gray.min() >= 0 and gray.max() <= 1):  # also true for NaN
            raise RefusedError("float samples outside [0, 1]; save with 8 or 16 bits, or as DICOM for Hounsfield units")
        return gray
    if image.mode == "I":
        raise RefusedError("signed or 32-bit samples; save with 8 or 16 bits, or as DICOM for Hounsfield units")
    if image.mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
    # Pillow goes from CMYK and palettes to grey through RGB, as it should, and drops alpha.
    levels = np.asarray(image.convert("L"))
    if image.mode == "RGBA":
        alpha = np.asarray(image.getchannel("A"))
        if alpha.min() < 255:
            return as_gray(levels) * as_gray(alpha)
    return levels


def _chroma(image: Image.Image) -> float:
    if image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16"):
        return 0.0
    # A grid of pixels: looking at all of them would cost a third of decoding a PNG.
    grid = np.asarray(image.resize((CHROMA_GRID, CHROMA_GRID), Image.Resampling.NEAREST).convert("RGB"))
    return float(np.ptp(grid, axis=2).mean() / 255)


def _orientation(image: ImageFile) -> int:
    """Orientation 1-8 from Exif, XMP or ImageMagick's text (Exif 2.32, tag 274); a TIFF has been turned by Pillow."""
    try:
        _check_exif(image.info)
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except RefusedError:
        raise
    except Exception:  # damaged metadata does not decide whether an image is readable
        return 1


def _check_exif(info: dict[str | tuple[int, int], Any]) -> None:
    """Raise RefusedError where the entries of Exif's directory name the same bytes over and over."""
    data = info.get("exif") or bytes.fromhex("".join(info.get("Raw profile type exif", "").split("\n")[3:]))
    while data.startswith(b"Exif\0\0"):
        data = data[6:]
    if data:
        file = BudgetedFile(data, MAX_READS)
        file.bytes_left = 2 * len(data) + 1024
        Image.Exif().load_from_fp(file)


def _upright(levels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation >= 5:
        levels = levels.T
    # Orientation -> which axes run backwards after the transposition.
    flips = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}
    return np.ascontiguousarray(np.flip(levels, flips.get(orientation, ())))


def webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a WebP canvas (RFC 9649), which the decoder allocates as soon as it opens the file."""
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data.ljust(30, b"\0"), 26)
    return width & 0x3FFF, height & 0x3FFF
