"""Pictures to click: drawn when the service starts, so that nothing is downloaded and no patient is shown."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from chestct.config.schema import PhantomConfig
from chestct.phantom.defects import dicom
from chestct.phantom.thorax import display, draw
from chestct.serving.prediction import jpeg_uri

PHANTOMS = {
    "large-lesion.dcm": ("Large lesion", "large_cell", 0.0, 10),
    "small-lesion.dcm": ("Small lesion", "adenocarcinoma", 0.7, 9),
    "no-lesion.dcm": ("No lesion", "normal", 0.4, 5),
}
"""Title, kind, difficulty and seed by file name."""


class Example(NamedTuple):
    """A file to click. thumb: data URI."""

    title: str
    about: str
    name: str
    data: bytes
    thumb: str


def make_examples() -> list[Example]:
    """Phantoms as DICOM, and a picture that is no slice; always the same ones; takes a tenth of a second."""
    examples = []
    for name, (title, kind, difficulty, seed) in PHANTOMS.items():
        phantom = draw(np.random.default_rng(seed), kind, PhantomConfig(difficulty=difficulty, size=384))
        thumb = _thumb(Image.fromarray(display(phantom.hu, (-600.0, 1500.0))))
        examples.append(Example(title, "DICOM phantom", name, dicom(phantom, f"example-{seed}"), thumb))
    sky = np.linspace((46, 74, 138), (246, 170, 96), 300).astype(np.uint8)
    evening = Image.fromarray(np.repeat(sky[:, None], 400, 1))  # coloured like a photograph
    hills = [(0, 230), (120, 150), (220, 235), (310, 180), (400, 240), (400, 300), (0, 300)]
    ImageDraw.Draw(evening).polygon(hills, fill=(58, 84, 74))
    file = io.BytesIO()
    evening.save(file, "JPEG", quality=90)
    return [*examples, Example("Not a slice", "Picture, refused", "hills.jpg", file.getvalue(), _thumb(evening))]


def _thumb(image: Image.Image) -> str:
    return jpeg_uri(ImageOps.fit(image, (112, 112), Image.Resampling.LANCZOS))
