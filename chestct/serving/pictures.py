"""Pictures of an answer: the slice, and the slice with its heat."""

import base64
import io

from PIL import Image

from chestct.models.saliency import blend
from chestct.serving.predictor import Prediction

WITH_HEAT = ("cancer", "uncertain")
"""Decisions for which heat is shown. Heat is relative to its own slice: on a normal one the brightest spot is no sign
of anything."""


def shows_heat(prediction: Prediction) -> bool:
    """Whether there is heat, and a decision for which it says something."""
    return prediction.decision in WITH_HEAT and prediction.heat is not None and bool(prediction.heat.any())


def with_heat(prediction: Prediction) -> Image.Image:
    """The slice at full resolution with its heat over it; the slice alone where no heat is shown."""
    if shows_heat(prediction) and prediction.heat is not None:
        return Image.fromarray(blend(prediction.gray, prediction.heat, 0.6))
    return Image.fromarray(prediction.gray).convert("RGB")


def overlay(prediction: Prediction) -> bytes:
    """`with_heat` as a PNG."""
    return encoded(with_heat(prediction), "PNG", compress_level=1)


def encoded(image: Image.Image, format: str, **options: int) -> bytes:
    """The image as a file's bytes. format and options: Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def jpeg_uri(image: Image.Image, side: int = 512) -> str:
    """A data URI, which reaches the browser inside an answer: no picture of an upload lies on the server's disk.

    side: pixels of the longer side at most.
    """
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    return data_uri(encoded(image, "JPEG", quality=90), "jpeg")


def data_uri(data: bytes, format: str) -> str:
    return f"data:image/{format};base64,{base64.b64encode(data).decode()}"
