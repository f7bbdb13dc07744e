"""Outlines and paths in patient millimetres, painted in Hounsfield units.

x runs to the patient's left, y to the back, the origin lies in the middle of the rib cage; only here this becomes
pixels. Pillow paints on twice as many pixels a side and four are averaged, so that every edge carries the
partial-volume grey of a real slice.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

FINE = 2  # sub-pixels a side from which a pixel is averaged


class Shape(NamedTuple):
    """A filled outline, points [N, 2] in mm, or a path of `width` mm where that is set; hu: Hounsfield units."""

    points: np.ndarray
    hu: float
    width: float = 0.0


@dataclass
class Canvas:
    """hu: float32 [H, W]; center: (x, y) in pixels of the patient's origin; scale: pixels a mm; roll: radians."""

    hu: np.ndarray
    center: np.ndarray
    scale: float
    roll: float

    @cached_property
    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Patient coordinates (x, y) in millimetres of every pixel's middle; float32 [H, W] each."""
        y, x = (np.indices(self.hu.shape) + 0.5 - self.center[::-1, None, None]) / self.scale
        cos, sin = math.cos(self.roll), math.sin(self.roll)
        return (x * cos + y * sin).astype(np.float32), (y * cos - x * sin).astype(np.float32)

    def paint(self, shapes: Iterable[Shape], background: float) -> np.ndarray:
        """The shapes over each other on a plain background: float32 [H, W]."""
        image, pen = self._sheet(background)
        for points, hu, width in shapes:
            if width:
                pen.line(self._fine(points), hu, max(1, round(width * self.scale * FINE)), joint="curve")
            else:
                pen.polygon(self._fine(points), hu)
        return np.asarray(image.reduce(FINE))

    def cover(self, outline: np.ndarray, soft: float = 0.0) -> np.ndarray:
        """How much of each pixel an outline covers, float32 [H, W] in [0, 1]; soft: blur of its edge in mm."""
        cover = self.paint([Shape(outline, 1.0)], 0.0)
        return gaussian_filter(cover, soft * self.scale, truncate=2.5) if soft else cover

    def strokes(self, segments: np.ndarray) -> np.ndarray:
        """How much of each pixel segments [N, 5] (x0, y0, x1, y1, width) in mm with round ends cover, as `cover`."""
        image, pen = self._sheet(0.0)
        # Thin segments first, fainter below a sub-pixel: Pillow overwrites, and a twig must not dim a thick vessel.
        segments = segments[np.argsort(segments[:, 4], kind="stable")]
        ends, widths = self._fine(segments[:, :4].reshape(-1, 2)), (segments[:, 4] * self.scale * FINE).tolist()
        for start, end, width in zip(ends[::2], ends[1::2], widths, strict=True):
            pen.line((start, end), min(1.0, width), max(1, round(width)))
            for x, y in (start, end) if width >= 2 else ():
                pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), 1.0)
        return np.asarray(image.reduce(FINE))

    def blend(self, cover: np.ndarray, hu: float) -> None:
        """Paint a coverage, [H, W] in [0, 1], over what is there."""
        self.hu += cover * (hu - self.hu)

    def _sheet(self, background: float) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        image = Image.new("F", (self.hu.shape[1] * FINE, self.hu.shape[0] * FINE), background)
        return image, ImageDraw.Draw(image)

    def _fine(self, points: np.ndarray) -> list[tuple[float, float]]:
        """Millimetres [N, 2] -> sub-pixels (x, y)."""
        pixels = toward(np.array([self.roll, self.roll + math.pi / 2]), self.scale)
        return [(x, y) for x, y in ((points @ pixels + self.center) * FINE).tolist()]


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], down: int, across: int) -> np.ndarray:
    """Standard normal noise that varies over about `down` rows and `across` columns; float32, of the given shape."""
    coarse = rng.standard_normal((max(4, shape[0] // down), max(4, shape[1] // across)), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def scaled(points: np.ndarray, factor: float | Sequence[float] | np.ndarray) -> np.ndarray:
    """The points, made larger or smaller around their mean."""
    return points.mean(0) + (points - points.mean(0)) * factor


def toward(angle: np.ndarray, distance: np.ndarray | float) -> np.ndarray:
    """Steps of so many millimetres in directions in radians: [N, 2]."""
    return np.stack([np.cos(angle), np.sin(angle)], -1) * np.reshape(distance, (-1, 1))


def blob(
    rng: np.random.Generator,
    center: Sequence[float] | np.ndarray,
    radii: Sequence[float] | np.ndarray,
    angle: float = 0.0,
    wobble: float = 0.04,
    lobes: Sequence[int] = (2, 3, 4, 5),
) -> np.ndarray:
    """The outline [72, 2] of an ellipse, turned by `angle` (radians), whose radius swings by `wobble` (a fraction) at
    each of the `lobes` frequencies."""
    theta = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    waves = np.cos(np.outer(lobes, theta) + rng.uniform(0, 2 * math.pi, (len(lobes), 1)))
    outline = toward(theta, 1 + rng.normal(0, wobble, len(lobes)) @ waves) * radii
    return outline @ toward(np.array([angle, angle + math.pi / 2]), 1.0) + center
