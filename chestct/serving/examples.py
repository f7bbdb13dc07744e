"""Four pictures to click: drawn when the service starts, so that nothing is downloaded and no patient is shown.

Three phantoms and something that is no CT slice at all; the first is DICOM, so that the window can be tried.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from chestct.config.schema import PhantomConfig
from chestct.phantom.encode import write_dicom
from chestct.phantom.thorax import display, draw
from chestct.serving.pictures import data_uri, encoded

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
    """The examples, always the same ones; takes a tenth of a second."""
    return [
        _phantom("Large lesion", "large-lesion.dcm", "large_cell", 0.0, 12),
        _phantom("Small lesion", "small-lesion.dcm", "adenocarcinoma", 0.7, 9),
        _phantom("No lesion", "no-lesion.dcm", "normal", 0.4, 5),
        _photograph(),
    ]


def _phantom(title: str, name: str, subtype: str, difficulty: float, seed: int) -> Example:
    phantom = draw(np.random.default_rng(seed), subtype, PhantomConfig(difficulty=difficulty, size=384))
    with tempfile.TemporaryDirectory(prefix="chestct-") as folder:
        path = Path(folder) / name
        write_dicom(path, phantom, f"example-{seed}")
        data = path.read_bytes()
    return Example(title, "DICOM phantom", name, data, _thumb(Image.fromarray(display(phantom.hu, LUNG))))


def _photograph() -> Example:
    """Evening over hills, drawn: coloured like a photograph."""
    sky = np.linspace((46, 74, 138), (246, 170, 96), 300).astype(np.uint8)
    image = Image.fromarray(np.repeat(sky[:, None], 400, 1))
    pen = ImageDraw.Draw(image)
    pen.ellipse((250, 150, 310, 210), fill=(255, 226, 150))
    pen.polygon([(0, 230), (120, 150), (220, 235), (310, 180), (400, 240), (400, 300), (0, 300)], fill=(58, 84, 74))
    pen.polygon([(0, 270), (160, 225), (400, 285), (400, 300), (0, 300)], fill=(34, 56, 48))
    return Example("Not a slice", "Picture, refused", "hills.jpg", encoded(image, "JPEG", quality=90), _thumb(image))


def _thumb(image: Image.Image) -> str:
    small = ImageOps.fit(image, (THUMB, THUMB), Image.Resampling.LANCZOS)
    return data_uri(encoded(small, "JPEG", quality=85), "jpeg")
