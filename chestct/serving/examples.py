"""Four pictures to click: drawn when the service starts, so that nothing is downloaded and no patient is shown.

Three phantoms and something that is no CT slice at all; the first is DICOM, so that the window can be tried.
"""

import base64
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from chestct.config import PhantomConfig
from chestct.phantom.files import write_dicom
from chestct.phantom.thorax import draw

THUMB = 112
LUNG = (-600.0, 1500.0)


@dataclass(frozen=True)
class Example:
    """A file to click. thumb: data URI."""

    title: str
    about: str
    name: str
    data: bytes
    thumb: str


def make_examples() -> list[Example]:
    """The examples, always the same ones; takes about half a second."""
    return [
        _phantom("Large lesion", "Phantom, DICOM", "large-lesion.dcm", "large_cell", 0.0, 12),
        _phantom("Small lesion", "Phantom, DICOM", "small-lesion.dcm", "adenocarcinoma", 0.7, 9),
        _phantom("No lesion", "Phantom, DICOM", "no-lesion.dcm", "normal", 0.4, 5),
        _photograph(),
    ]


def _phantom(title: str, about: str, name: str, subtype: str, difficulty: float, seed: int) -> Example:
    phantom = draw(np.random.default_rng(seed), subtype, PhantomConfig(difficulty=difficulty, size=384))
    with tempfile.TemporaryDirectory(prefix="chestct-") as folder:
        path = Path(folder) / name
        write_dicom(path, phantom, f"example-{seed}")
        data = path.read_bytes()
    center, width = LUNG
    gray = np.clip((phantom.hu - center) / width + 0.5, 0, 1) * 255
    return Example(title, about, name, data, _thumb(Image.fromarray(gray.astype(np.uint8))))


def _photograph() -> Example:
    """Evening over hills, drawn: coloured like a photograph."""
    sky = np.linspace((46, 74, 138), (246, 170, 96), 300).astype(np.uint8)
    image = Image.fromarray(np.repeat(sky[:, None], 400, 1))
    pen = ImageDraw.Draw(image)
    pen.ellipse((250, 150, 310, 210), fill=(255, 226, 150))
    pen.polygon([(0, 230), (120, 150), (220, 235), (310, 180), (400, 240), (400, 300), (0, 300)], fill=(58, 84, 74))
    pen.polygon([(0, 270), (160, 225), (400, 285), (400, 300), (0, 300)], fill=(34, 56, 48))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return Example("Not a CT slice", "Picture, refused", "hills.jpg", buffer.getvalue(), _thumb(image))


def _thumb(image: Image.Image) -> str:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    small = image.crop((left, top, left + side, top + side)).resize((THUMB, THUMB), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
