"""Pictures to click: drawn when the service starts, so that nothing is downloaded and no patient is shown."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from chestct.config.schema import PhantomConfig
from chestct.phantom.thorax import display, draw
from chestct.serving.prediction import jpeg_uri

PHANTOMS = {
    "large-lesion.png": ("Large lesion", "large_cell", 0.3, 16),
    "small-lesion.png": ("Small lesion", "adenocarcinoma", 0.7, 9),
    "no-lesion.png": ("No lesion", "normal", 0.4, 5),
}
"""Title, kind, difficulty and seed by file name."""

WINDOW = (-600.0, 1500.0)  # centre and width in HU


class Example(NamedTuple):
    """A file to click. thumb: data URI."""

    title: str
    about: str
    name: str
    data: bytes
    thumb: str


def make_examples() -> list[Example]:
    """Phantoms, and a picture that is no slice; always the same ones; takes a tenth of a second."""
    examples = []
    for name, (title, kind, difficulty, seed) in PHANTOMS.items():
        phantom = draw(np.random.default_rng(seed), kind, PhantomConfig(difficulty=difficulty, size=384))
        examples.append(_example(title, "Phantom", name, Image.fromarray(display(phantom.hu, WINDOW))))
    sky = np.linspace((46, 74, 138), (246, 170, 96), 300).astype(np.uint8)
    evening = Image.fromarray(np.repeat(sky[:, None], 400, 1))  # coloured like a photograph
    hills = [(0, 230), (120, 150), (220, 235), (310, 180), (400, 240), (400, 300), (0, 300)]
    ImageDraw.Draw(evening).polygon(hills, fill=(58, 84, 74))
    return [*examples, _example("Not a slice", "Picture, refused", "hills.png", evening)]


def _example(title: str, about: str, name: str, image: Image.Image) -> Example:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    thumb = ImageOps.fit(image, (112, 112), Image.Resampling.LANCZOS)
    return Example(title, about, name, file.getvalue(), jpeg_uri(thumb))
