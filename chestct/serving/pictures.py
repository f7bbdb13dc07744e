"""Pictures for the page, as data URIs: the slice, seen through several windows, and the heat over it.

A data URI goes to the browser inside the answer, so that no picture of anybody's upload lies on the server's disk.
"""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from chestct.config.schema import WindowConfig
from chestct.errors import DecodeError
from chestct.imaging.decode import decode, decode_frames, sniff
from chestct.imaging.slice import Limits
from chestct.models.saliency import blend, colors
from chestct.serving.predictor import Prediction

MODEL_WINDOW = "The model's own"

WINDOWS = {"Lung": (-600, 1500), "Soft tissue": (40, 400), "Bone": (400, 1800)}
"""Centre and width in HU of the usual windows."""

LOWEST_HU, HIGHEST_HU = -1024, 3071
"""All that CT distinguishes, 4096 steps."""

HEAT_SIDE = 192
"""Longer side of the heat that is kept; it comes from a map of a few positions and is smooth."""

WITH_HEAT = ("cancer", "uncertain")
"""Decisions for which heat is shown. Heat is relative to its own slice: on a normal one the brightest spot is no sign
of anything."""


@dataclass(frozen=True)
class Pictures:
    """What is kept of a slice's pixels while its visitor looks at it. windows: JPEGs by the name of the window, the
    model's first; heat: uint8 [h, w], smaller than the slice, or None where none is shown."""

    windows: dict[str, bytes]
    heat: np.ndarray | None

    @classmethod
    def of(cls, prediction: Prediction, hounsfield: np.ndarray | None, side: int) -> "Pictures":
        """hounsfield: HU [H, W], or None where they are not known; side: pixels of the longer side at most."""
        grays = {MODEL_WINDOW: prediction.gray}
        if hounsfield is not None:
            grays |= {name: windowed(hounsfield, *window) for name, window in WINDOWS.items()}
        heat = None
        if shows_heat(prediction) and prediction.heat is not None:
            heat = np.asarray(_shrunk(Image.fromarray((prediction.heat * 255 + 0.5).astype(np.uint8)), HEAT_SIDE))
        jpegs = {
            name: encoded(_shrunk(Image.fromarray(gray), side), "JPEG", quality=90) for name, gray in grays.items()
        }
        return cls(jpegs, heat)

    def slice_uri(self, window: str = MODEL_WINDOW) -> str:
        return data_uri(self._jpeg(window), "jpeg")

    def heat_uri(self, opacity: float) -> str:
        """The heat alone, coloured, the hotter the more opaque. opacity: of the hottest place, in [0, 1]."""
        heat = np.zeros((1, 1), np.uint8) if self.heat is None else self.heat
        alpha = (heat * min(1.0, max(0.0, opacity)) + 0.5).astype(np.uint8)
        return _uri(Image.fromarray(np.dstack([colors(heat / 255), alpha])), "WEBP", quality=80, method=2)

    def thumbnail_uri(self, side: int = 160) -> str:
        return _uri(_shrunk(Image.open(io.BytesIO(self._jpeg(MODEL_WINDOW))), side), "JPEG", quality=80)

    def _jpeg(self, window: str) -> bytes:
        return self.windows.get(window) or self.windows[MODEL_WINDOW]


def shows_heat(prediction: Prediction) -> bool:
    """Whether there is heat, and a decision for which it says something."""
    return prediction.decision in WITH_HEAT and prediction.heat is not None and bool(prediction.heat.any())


def overlay(prediction: Prediction, opacity: float = 0.6) -> bytes:
    """Slice and heat in one PNG at full resolution; the slice alone where no heat is shown."""
    rgb = np.repeat(prediction.gray[..., None], 3, -1)
    if shows_heat(prediction) and prediction.heat is not None:
        rgb = blend(prediction.gray, prediction.heat, opacity)
    return encoded(Image.fromarray(rgb), "PNG", compress_level=1)


def hounsfield_frames(data: bytes, limits: Limits) -> Iterator[np.ndarray]:
    """Each frame of a CT file in HU, float32 [H, W]; nothing where the values of the file are not Hounsfield units."""
    if sniff(data) != "DICOM":
        return
    width = HIGHEST_HU - LOWEST_HU + 1
    wide = WindowConfig(center=LOWEST_HU + width / 2, width=width)
    try:
        one, other = (decode(data, window, limits, name="file") for window in (wide, WindowConfig(40, 400)))
        if one.modality not in ("", "CT") or np.array_equal(one.gray, other.gray):  # a window changes nothing
            return
        for frame in decode_frames(data, wide, limits, name="file"):
            yield frame.gray * (width - 1) + LOWEST_HU
    except DecodeError:  # the answer to the file will name the reason
        return


def windowed(hounsfield: np.ndarray, center: float, width: float) -> np.ndarray:
    """HU [H, W] through a window, uint8 (DICOM PS3.3 C.11.2.1.2.1)."""
    share = (hounsfield - (center - 0.5)) / (width - 1) + 0.5
    return (255 * share.clip(0, 1) + 0.5).astype(np.uint8)


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    smaller = image.copy()
    smaller.thumbnail((side, side), Image.Resampling.BILINEAR)
    return smaller


def encoded(image: Image.Image, format: str, **options: int) -> bytes:
    """The image as a file's bytes. format and options: Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _uri(image: Image.Image, format: str, **options: int) -> str:
    return data_uri(encoded(image, format, **options), format.lower())


def data_uri(data: bytes, format: str) -> str:
    """An image as the address of itself. format: png, jpeg or webp."""
    return f"data:image/{format};base64,{base64.b64encode(data).decode()}"
