"""From a decoded slice to what the network sees: a square of grey values.

This is the one definition: the store is filled with it, and the demo, the batch CLI and the exported model use it on
single files. What is left to do afterwards (three channels, mean, scale) belongs to the weights and lives in the
network itself.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

BODY_LEVEL = 0.12
"""Grey level above which a pixel may be body: air outside the patient is black in every window in use."""


@dataclass(frozen=True)
class Preprocess:
    """How a slice becomes a square (see data.fit in chestct.config) of `size` pixels a side."""

    size: int = 224
    fit: str = "pad"

    def __call__(self, gray: np.ndarray) -> np.ndarray:
        """gray: float32 [H, W] in [0, 1], or uint8 with 255 for 1. Returns uint8 [size, size]; 255 is 1."""
        image = Image.fromarray(gray if gray.dtype == np.uint8 else (gray * 255 + 0.5).astype(np.uint8))
        if self.fit == "body":
            image = image.crop(body_box(np.asarray(image)))
        if self.fit == "stretch":
            return np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR))
        scale = self.size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        # Bilinear in Pillow averages over the whole footprint when it shrinks, so nothing aliases.
        small = image.resize((width, height), Image.Resampling.BILINEAR)
        square = Image.new("L", (self.size, self.size))
        square.paste(small, ((self.size - width) // 2, (self.size - height) // 2))
        return np.asarray(square)


def body_box(image: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) around rows and columns in which at least 2 % of the pixels may be body.

    The whole image where nothing is bright enough: a black slice has no body to crop to.
    """
    body = image > BODY_LEVEL * 255
    rows, columns = (np.flatnonzero(body.mean(axis) > 0.02) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return 0, 0, image.shape[1], image.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
