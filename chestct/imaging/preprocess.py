"""From a decoded slice to what the network sees: a square of grey values.

This is the one definition: the store is filled with it, and the demo, the batch CLI and the exported model use it on
single files. What is left to do afterwards (three channels, mean, scale) belongs to the weights and lives in the
network itself.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from chestct.imaging.lungs import find_lungs, levels_of

Box = tuple[int, int, int, int]  # (left, top, right, bottom) in pixels; right and bottom lie outside
THUMBNAIL = 56  # side of the thumbnails by which copies are recognised, in pixels

BODY_LEVEL = 0.12
"""Grey level above which a pixel may be body: air outside the patient is black in every window in use."""

PERCENTILES = (2.0, 98.0)  # percentiles of the body's box that become black and white with contrast=body


@dataclass(frozen=True)
class Preprocess:
    """How a slice becomes a square of `size` pixels a side (see data.fit and data.contrast in the schema)."""

    size: int = 224
    fit: str = "pad"
    contrast: str = "keep"

    def __call__(self, gray: np.ndarray) -> np.ndarray:
        """gray: float32 [H, W] in [0, 1], or uint8 with 255 for 1. Returns uint8 [size, size]; 255 is 1."""
        return self.placed(gray)[0]

    def placed(self, gray: np.ndarray) -> "tuple[np.ndarray, Placement]":
        """The same, and where the slice lies in it."""
        levels = as_bytes(gray)
        box, table = self.region(levels)
        image, place = Image.fromarray(levels), self.place(box)
        return _drawn(image if table is None else image.point(table), place), place

    def place(self, box: Box) -> "Placement":
        """Where a part of a slice lies in the square."""
        sides = box[2] - box[0], box[3] - box[1]
        wide, high = (self.size, self.size) if self.fit == "stretch" else _fitting(sides, self.size)
        left, top = (self.size - wide) // 2, (self.size - high) // 2
        return Placement(self.size, box, (left, top, left + wide, top + high))

    def region(self, levels: np.ndarray) -> tuple[Box, list[int] | None]:
        """The part of a slice, uint8 [H, W], that is shown, and for each of 256 grey levels the new one (None: as is).

        Where no lungs are seen, `lungs` does what `body` does: slices of a belly are then still whole.
        """
        lungs = find_lungs(levels) if "lungs" in (self.fit, self.contrast) else None
        body = body_box(levels)
        box = {"body": body, "lungs": lungs.box if lungs else body}.get(self.fit, (0, 0, *levels.shape[::-1]))
        if self.contrast == "keep":
            return box, None
        if self.contrast == "lungs" and lungs:
            return box, levels_of(lungs)
        left, top, right, bottom = body
        return box, stretched(np.bincount(levels[top:bottom, left:right].ravel(), minlength=256))


@dataclass(frozen=True)
class Placement:
    """Where a slice lies in the network's square: `source` of the slice was scaled to `target` of the square."""

    size: int
    source: Box
    target: Box


def placement(gray: np.ndarray, preprocess: Preprocess) -> Placement:
    """Where `preprocess` puts a slice, uint8 [H, W]."""
    return preprocess.place(preprocess.region(gray)[0])


def mask_to_square(mask: np.ndarray, place: Placement) -> np.ndarray:
    """A mask of the slice, bool [H, W], as it lies in the network's square, bool [size, size]."""
    return _drawn(Image.fromarray(mask.astype(np.uint8) * 255), place) >= 128


def thumbnail(gray: np.ndarray) -> np.ndarray:
    """A slice as it is seen when copies are looked for: whole, uint8 [THUMBNAIL, THUMBNAIL]; gray as for `Preprocess`.

    The same whatever the network is to see, so that settings can be compared on one split.
    """
    image = Image.fromarray(as_bytes(gray))
    # Whole pixels are averaged first, down to at least twice the size: half the time, and pairs are separated as well.
    small = image.resize(_fitting(image.size, THUMBNAIL), Image.Resampling.HAMMING, reducing_gap=2.0)
    return _square(small, THUMBNAIL)


def _fitting(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) at which the longer one is `side`."""
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _drawn(image: Image.Image, place: Placement) -> np.ndarray:
    left, top, right, bottom = place.target
    # Bilinear in Pillow averages over the whole footprint when it shrinks, so nothing aliases.
    part = image.crop(place.source).resize((right - left, bottom - top), Image.Resampling.BILINEAR)
    return _square(part, place.size)


def _square(image: Image.Image, side: int) -> np.ndarray:
    """The image in the middle of a black square, uint8 [side, side]."""
    square = Image.new("L", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square)


def as_bytes(gray: np.ndarray) -> np.ndarray:
    """float32 in [0, 1], or uint8 already, as uint8 with 255 for 1."""
    return gray if gray.dtype == np.uint8 else (gray * 255 + 0.5).astype(np.uint8)


def stretched(histogram: np.ndarray) -> list[int]:
    """For each of 256 grey levels the new one, so that the PERCENTILES of a histogram [256] become 0 and 255.

    All levels as they are where the percentiles fall together: nothing of one grey has a contrast.
    """
    low, high = np.searchsorted(histogram.cumsum() / max(1, histogram.sum()), np.array(PERCENTILES) / 100)
    if high <= low:
        return list(range(256))
    return np.rint(np.clip((np.arange(256) - low) / (high - low), 0, 1) * 255).astype(int).tolist()


def body_box(image: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) around rows and columns in which more than 2 % of the pixels may be body.

    The whole image where nothing is bright enough: a black slice has no body to crop to.
    """
    body = image > int(BODY_LEVEL * 255)
    rows, columns = (np.flatnonzero(body.mean(axis) > 0.02) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return 0, 0, image.shape[1], image.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
