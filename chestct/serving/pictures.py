"""Pictures of an answer: the slice, and the slice with its heat."""

import base64
import io

from PIL import Image

from chestct.models.saliency import blend
from chestct.serving.predictor import Prediction


def with_heat(prediction: Prediction) -> Image.Image | None:
    """The slice at full resolution with its heat over it; None where there is none to show.

    Heat is relative to its own slice: on one called normal the brightest spot is no sign of anything.
    """
    if prediction.decision not in ("cancer", "uncertain") or prediction.heat is None or not prediction.heat.any():
        return None
    return Image.fromarray(blend(prediction.gray, prediction.heat, 0.6))


def encoded(image: Image.Image, format: str, **options: int) -> bytes:
    """The image as a file's bytes. format and options: Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def jpeg_uri(image: Image.Image, side: int = 512) -> str:
    """A data URI, at most `side` pixels a side: no picture of an upload lies on the server's disk."""
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    return data_uri(encoded(image, "JPEG", quality=90), "jpeg")


def data_uri(data: bytes, format: str) -> str:
    return f"data:image/{format};base64,{base64.b64encode(data).decode()}"
