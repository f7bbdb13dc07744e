"""Pictures for the page, as data URIs: the slice, its heat, and for DICOM the Hounsfield units behind it.

The browser lays heat over slice and moves the window, so that neither costs a request and the server keeps no picture
of anybody's upload.
"""

import base64
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from chestct.config.schema import WindowConfig
from chestct.errors import DecodeError
from chestct.imaging.decode import decode, decode_frames, sniff
from chestct.imaging.slice import Limits
from chestct.models.saliency import blend, colors
from chestct.serving.predictor import Prediction

HU_WINDOW = WindowConfig(center=1024, width=4096)
"""Maps -1024 to 3071 HU onto 0 to 4095 of 4095: all that CT distinguishes, one step a unit."""

SOFT_TISSUE = WindowConfig(center=40, width=400)

HEAT_SIDE = 192
"""Longer side of the heat's picture; it comes from a map of 7 x 7 places and is smooth."""

MANY = 12
"""Slices from which on pictures are made smaller, so that a series stays within some megabytes."""


def slice_picture(found: Prediction, side: int) -> str:
    """The grey slice as data URI, its longer side at most `side` pixels."""
    return _uri(_shrunk(Image.fromarray(found.gray), side), "JPEG", quality=90)


def heat_picture(found: Prediction, side: int = HEAT_SIDE) -> str:
    """The heat as data URI: coloured, the hotter the more opaque; "" where there is none."""
    if found.heat is None or not found.heat.any():
        return ""
    heat = np.asarray(_shrunk(Image.fromarray((found.heat * 255 + 0.5).astype(np.uint8)), side))
    rgba = np.dstack([colors(heat / 255), heat])
    return _uri(Image.fromarray(rgba), "WEBP", quality=80, method=2)


def overlay(found: Prediction, opacity: float = 0.6) -> bytes:
    """Slice and heat in one PNG at full resolution; the slice alone where there is no heat."""
    rgb = np.repeat(found.gray[..., None], 3, -1) if found.heat is None else blend(found.gray, found.heat, opacity)
    return _encoded(Image.fromarray(rgb), "PNG", compress_level=1)


def hounsfield_pictures(data: bytes, limits: Limits, side: int) -> Iterator[str]:
    """For each frame of a CT file, HU + 1024 as data URI (PNG; red holds the high byte, green the low one).

    Nothing where the file's values are no Hounsfield units: then another window shows the same picture.
    """
    if sniff(data) != "DICOM":
        return
    try:
        wide, other = (decode(data, window, limits, name="file") for window in (HU_WINDOW, SOFT_TISSUE))
        if np.array_equal(wide.gray, other.gray) or wide.modality not in ("", "CT"):
            return
        for found in decode_frames(data, HU_WINDOW, limits, name="file"):
            yield _uri(_packed((found.gray * 4095 + 0.5).astype(np.uint16), side), "PNG", compress_level=3)
    except DecodeError:  # whoever reads the file for its answer will say it
        return


def _packed(levels: np.ndarray, side: int) -> Image.Image:
    """uint16 [H, W] as an image whose red is the high byte and green the low one."""
    step = -(-max(levels.shape) // side)  # every so many pixels: a mean of packed bytes would be nonsense
    levels = levels[::step, ::step]
    return Image.fromarray(np.dstack([levels >> 8, levels & 255, np.zeros_like(levels)]).astype(np.uint8))


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _encoded(image: Image.Image, format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _uri(image: Image.Image, format: str, **options: int) -> str:
    return data_uri(_encoded(image, format, **options), format.lower())


def data_uri(data: bytes, format: str) -> str:
    """An image as the address of itself. format: png, jpeg or webp."""
    return f"data:image/{format};base64,{base64.b64encode(data).decode()}"
