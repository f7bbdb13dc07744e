"""PNG, JPEG, TIFF, BMP and WebP to slices. Pillow decodes; what a header may make it do is bounded here.

Pillow acts on headers as it opens a file: it reads metadata that a few bytes can make as large as memory. So each file
is opened by the class of its own format (`Image.open` warns about large images and tries other formats), through a
`BudgetedFile`, and its size is checked before its pixels are decoded. (A WebP's canvas is allocated as it is opened,
but its pages are touched only then.)
"""

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
from PIL import Image, ImageOps, TiffTags
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from chestct.imaging.slice import BudgetedFile, Limits, RefusedError, Slice, as_gray

MAX_READS = 300_000  # pieces of a file, such as chunks or strips; an image of a megapixel takes a few hundred
MAX_TIFF_METADATA = 8 << 20  # bytes of a page's directories; Pillow makes up to ten times as much of numbers
SUBFILE, PREVIEW_OR_MASK = 254, 0b101  # of a TIFF's page, NewSubfileType (TIFF 6.0, section 8)
MAX_SCANS = 100  # of a JPEG, about ten in progressive ones; each costs a pass over the whole image


class JpegFile(JpegImageFile):
    """A JPEG whose Exif is checked before it is read; Pillow reads it on opening, for the resolution."""

    def getexif(self) -> Image.Exif:
        _check_exif(self.info)
        return super().getexif()


OPENERS = {"PNG": PngImageFile, "JPEG": JpegFile, "TIFF": TiffImageFile, "BMP": BmpImageFile, "WEBP": WebPImageFile}


def slices(data: bytes, format: str, limits: Limits, every: bool) -> Iterator[Slice]:
    """The image of the file `data`, or with `every` all pages of a TIFF.

    Raises RefusedError where there are several and one is expected, and whatever Pillow raises.
    """
    pages = _pages(data, format, limits)
    for frame, image in enumerate(pages):
        mode = image.mode
        image.load()
        _turn_upright(image)
        page = Slice(_levels(image), format, mode, _chroma(image), frame=frame)
        if not every and next(pages, None):
            raise RefusedError(
                "it holds several pages where one slice is expected. Save each as a file of its own; the web page and "
                "`chestct predict` answer for every page"
            )
        yield page


def declared_size(data: bytes, format: str, limits: Limits) -> tuple[int, int, int]:
    """(width, height, pages) of the file `data`."""
    sizes = [image.size for image in _pages(data, format, limits)]
    return *sizes[0], len(sizes)


def _pages(data: bytes, format: str, limits: Limits) -> Iterator[ImageFile]:
    """The opened image, at each page of a TIFF in turn, its size checked and no pixel decoded yet.

    Previews and masks between the pages are left out. Raises RefusedError for animations and for JPEGs of several.
    """
    if format == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
        raise RefusedError(f"more than {MAX_SCANS} scans")
    file = BudgetedFile(data, MAX_READS)
    file.bytes_left = MAX_TIFF_METADATA if format == "TIFF" else None
    with OPENERS[format](file) as image:
        limits.check(*image.size)
        if format != "TIFF":
            if (pictures := _pictures(image)) > 1:
                raise RefusedError(f"it holds {pictures} pictures where one slice is expected. Save each as a PNG file")
            yield image
            return
        for page in count(1):
            exif = image.getexif()
            for directory in TiffTags.TAGS_V2_GROUPS:  # Pillow reads them while it decodes, when no budget holds
                if directory in exif:
                    exif.get_ifd(directory)
            file.bytes_left = None
            if page == 1 or not exif.get(SUBFILE, 0) & PREVIEW_OR_MASK:
                yield image
            file.bytes_left = MAX_TIFF_METADATA
            try:
                image.seek(page)
            except EOFError:
                return
            limits.check(*image.size)


def _pictures(image: ImageFile) -> int:
    """How many there are in an animation, or in a JPEG by its multi-picture index (CIPA DC-007, tag B001)."""
    if index := image.info.get("mp"):
        return int(_exif(index).get(0xB001, 1))
    return getattr(image, "n_frames", 1)


def _levels(image: Image.Image) -> np.ndarray:
    """Grey levels [H, W] of a Pillow image in any mode (see Slice)."""
    # Where 0 is white (PhotometricInterpretation, TIFF 6.0, tag 262), Pillow inverts 8 bits and no others.
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    white_is_zero = tags.get(262) == 0
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.uint16)
        if (largest := 2 ** tags.get(258, (16,))[0] - 1) < 65535:  # 12 bits, which Pillow reads as they are
            levels = np.rint(levels * (65535 / largest)).astype(np.uint16)
        return 65535 - levels if white_is_zero else levels
    if image.mode in ("F", "I"):
        gray = np.asarray(image)
        if image.mode == "F" and gray.min() >= 0 and gray.max() <= 1:  # not so for NaN
            return 1 - gray if white_is_zero else gray
        raise RefusedError("samples of unknown range; save with 8 or 16 bits, or as DICOM for Hounsfield units")
    if image.mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
    # Pillow goes from CMYK and palettes to grey through RGB, as it should, and drops alpha.
    levels = np.asarray(image.convert("L"))
    if image.mode != "RGBA":
        return levels
    alpha = np.asarray(image.getchannel("A"))
    return levels if alpha.min() == 255 else as_gray(levels) * as_gray(alpha)


def _chroma(image: Image.Image) -> float:
    if image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16"):
        return 0.0
    # A grid of pixels: looking at all of them would cost a third of decoding a PNG.
    grid = np.asarray(image.resize((64, 64), Image.Resampling.NEAREST).convert("RGB"))
    return float(np.ptp(grid, axis=2).mean() / 255)


def _turn_upright(image: ImageFile) -> None:
    """Apply the orientation that Exif, XMP or ImageMagick's text states (Exif 2.32, tag 274)."""
    try:
        _check_exif(image.info)
        ImageOps.exif_transpose(image, in_place=True)
    except RefusedError:
        raise
    except Exception:  # damaged metadata does not decide whether an image is readable
        return


def _check_exif(info: dict[str | tuple[int, int], Any]) -> None:
    """Raise RefusedError where the entries of Exif's directory name the same bytes over and over."""
    data = info.get("exif") or bytes.fromhex("".join(info.get("Raw profile type exif", "").split("\n")[3:]))
    while data.startswith(b"Exif\0\0"):
        data = data[6:]
    if data:
        _exif(data)


def _exif(data: bytes) -> Image.Exif:
    """A directory of tags, read within a budget."""
    file, exif = BudgetedFile(data, MAX_READS), Image.Exif()
    file.bytes_left = 2 * len(data) + 1024
    exif.load_from_fp(file)
    return exif
