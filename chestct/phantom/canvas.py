"""Outlines and paths in patient millimetres, painted in Hounsfield units.

Anatomy is written down in patient coordinates (x to the patient's left, y to the back, origin in the middle of the rib
cage) and only here becomes pixels. Pillow paints on twice as many pixels a side and four are averaged, so that every
edge carries the partial-volume grey of a real slice.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter

FINE = 2
"""Sub-pixels a side from which a pixel is averaged."""


class Shape(NamedTuple):
    """Something to paint. points: [N, 2] in millimetres, a filled outline, or a path of `width` mm where that is set;
    hu: Hounsfield units."""

    points: np.ndarray
    hu: float
    width: float = 0.0


@dataclass
class Canvas:
    """The pixels of a slice and the pose of the patient in them.

    hu: float32 [H, W], Hounsfield units; center: (x, y) in pixels of the patient's origin; scale: pixels per
    millimetre; roll: rotation about the long axis in radians.
    """

    hu: np.ndarray
    center: tuple[float, float]
    scale: float
    roll: float

    @cached_property
    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Patient coordinates (x, y) in millimetres of every pixel's middle; float32 [H, W] each."""
        rows, columns = np.arange(self.hu.shape[0])[:, None], np.arange(self.hu.shape[1])
        x, y = (columns + 0.5 - self.center[0]) / self.scale, (rows + 0.5 - self.center[1]) / self.scale
        cos, sin = math.cos(self.roll), math.sin(self.roll)
        return (x * cos + y * sin).astype(np.float32), (y * cos - x * sin).astype(np.float32)

    def paint(self, shapes: Iterable[Shape], background: float) -> np.ndarray:
        """The shapes over each other on a plain background: float32 [H, W]."""
        image, pen = self._sheet("F", background)
        for points, hu, width in shapes:
            if width:
                pen.line(self._fine(points), hu, max(1, round(width * self.scale * FINE)), joint="curve")
            else:
                pen.polygon(self._fine(points), hu)
        return np.asarray(image.reduce(FINE))

    def cover(self, outline: np.ndarray, soft: float = 0.0) -> np.ndarray:
        """How much of each pixel an outline covers, float32 [H, W] in [0, 1]; soft: blur of its edge in mm."""
        image, pen = self._sheet("L", 0)
        pen.polygon(self._fine(outline), 255)
        cover = np.asarray(image.reduce(FINE), np.float32) / 255
        return gaussian_filter(cover, soft * self.scale, truncate=2.5) if soft else cover

    def strokes(self, segments: np.ndarray | Sequence[tuple[float, ...]]) -> np.ndarray:
        """How much of each pixel straight segments (x0, y0, x1, y1, width) in mm with round ends cover, as `cover`.

        A segment thinner than a sub-pixel is drawn fainter instead.
        """
        image, pen = self._sheet("L", 0)
        table = np.reshape(np.asarray(segments, float), (-1, 5))
        # Thin and therefore faint segments first: Pillow overwrites, and a thick vessel must not be dimmed by a twig.
        table = table[np.argsort(table[:, 4], kind="stable")]
        ends, widths = self._fine(table[:, :4].reshape(-1, 2)), (table[:, 4] * self.scale * FINE).tolist()
        for start, end, width in zip(ends[::2], ends[1::2], widths, strict=True):
            pen.line((start, end), min(255, int(255 * width)), max(1, round(width)))
            if width >= 2:
                for x, y in (start, end):
                    pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), 255)
        return np.asarray(image.reduce(FINE), np.float32) / 255

    def blend(self, cover: np.ndarray, hu: float) -> None:
        """Paint a coverage, [H, W] in [0, 1], over what is there."""
        self.hu += cover * (hu - self.hu)

    def fill(self, outline: np.ndarray, hu: float, alpha: float = 1.0, soft: float = 0.0) -> None:
        """Paint an outline over what is there; alpha: 1 hides it, 0 keeps it; soft as for `cover`."""
        self.blend(alpha * self.cover(outline, soft), hu)

    def _sheet(self, mode: str, background: float) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        image = Image.new(mode, (self.hu.shape[1] * FINE, self.hu.shape[0] * FINE), background)
        return image, ImageDraw.Draw(image)

    def _fine(self, points: np.ndarray) -> list[tuple[float, float]]:
        """Millimetres [N, 2] -> sub-pixels (x, y)."""
        cos, sin = math.cos(self.roll), math.sin(self.roll)
        pixels = points @ np.array([[cos, sin], [-sin, cos]]) * self.scale + self.center
        return [(x, y) for x, y in (pixels * FINE).tolist()]


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], down: int, across: int) -> np.ndarray:
    """Standard normal noise that varies over about `down` rows and `across` columns; float32, of the given shape."""
    coarse = rng.standard_normal((max(4, shape[0] // down), max(4, shape[1] // across)), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def closed_curve(points: np.ndarray, samples: int = 160) -> np.ndarray:
    """A smooth closed outline [samples, 2] through the points [N, 2]."""
    knots = np.arange(len(points) + 1)
    spline = CubicSpline(knots, np.vstack([points, points[:1]]), bc_type="periodic")
    return np.asarray(spline(np.linspace(0, len(points), samples, endpoint=False)))


def blob(
    rng: np.random.Generator,
    center: Sequence[float] | np.ndarray,
    radii: tuple[float, float],
    angle: float = 0.0,
    wobble: float = 0.04,
    lobes: Sequence[int] = (2, 3, 4, 5),
) -> np.ndarray:
    """The outline [N, 2] of an ellipse, turned by `angle` (radians), whose radius swings by `wobble` (a fraction) at
    each of the `lobes` frequencies."""
    theta = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    waves = np.cos(np.outer(lobes, theta) + rng.uniform(0, 2 * math.pi, (len(lobes), 1)))
    radius = 1 + rng.normal(0, wobble, len(lobes)) @ waves
    x, y = radii[0] * radius * np.cos(theta), radii[1] * radius * np.sin(theta)
    cos, sin = math.cos(angle), math.sin(angle)
    return np.stack([center[0] + x * cos - y * sin, center[1] + x * sin + y * cos], 1)
