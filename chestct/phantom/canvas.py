"""A slice being drawn: outlines and paths in millimetres, painted in Hounsfield units.

Anatomy is written down in patient coordinates (x to the patient's left, y to the back, origin in the middle of the rib
cage) and only here becomes pixels. Outlines are rasterised by Pillow on a finer grid and averaged, so that every edge
carries the partial-volume grey of a real slice, at a cost of microseconds a shape.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from PIL import Image, ImageDraw
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter

FINE = 2
"""Sub-pixels a side from which a pixel's coverage is averaged."""


@dataclass
class Canvas:
    """Grey values with the pose that maps patient millimetres to pixels.

    hu: float32 [H, W] in Hounsfield units; center: (x, y) in pixels of the patient's origin; scale: pixels per
    millimetre; roll: rotation about the long axis in radians.
    """

    hu: np.ndarray
    center: tuple[float, float]
    scale: float
    roll: float

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Millimetres [N, 2] -> pixels [N, 2], both (x, y)."""
        cos, sin = math.cos(self.roll), math.sin(self.roll)
        return points @ np.array([[cos, sin], [-sin, cos]]) * self.scale + self.center

    @cached_property
    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Patient coordinates (x, y) in millimetres of every pixel's middle; float32 [H, W] each."""
        height, width = self.hu.shape
        x = (np.arange(width, dtype=np.float32) + 0.5 - self.center[0]) / self.scale
        y = (np.arange(height, dtype=np.float32)[:, None] + 0.5 - self.center[1]) / self.scale
        cos, sin = np.float32(math.cos(self.roll)), np.float32(math.sin(self.roll))
        return x * cos + y * sin, y * cos - x * sin

    def patch(self, outline: np.ndarray, soft: float = 0.0) -> tuple[tuple[slice, slice], np.ndarray]:
        """How much of each pixel a closed outline covers.

        outline: [N, 2] in millimetres; soft: standard deviation of the edge in millimetres. Returns the rows and
        columns of the outline's bounding box and its coverage there, float32 in [0, 1].
        """
        points = self.pixels(outline)
        x0, y0, x1, y1 = self.box(points, math.ceil(2.5 * soft * self.scale) + 1)
        where = (slice(y0, y1), slice(x0, x1))
        if x0 == x1 or y0 == y1:
            return where, np.zeros((y1 - y0, x1 - x0), np.float32)
        fine = Image.new("L", ((x1 - x0) * FINE, (y1 - y0) * FINE))
        ImageDraw.Draw(fine).polygon(((points - (x0, y0)) * FINE).ravel().tolist(), fill=255)
        cover = np.asarray(fine.reduce(FINE), np.float32) / 255
        return where, gaussian_filter(cover, soft * self.scale, truncate=2.5) if soft else cover

    def box(self, points: np.ndarray, margin: int) -> tuple[int, int, int, int]:
        """Bounding box (x0, y0, x1, y1) in whole pixels of points [N, 2] in pixels, cut to the slice."""
        (ax, ay), (bx, by) = points.min(0).tolist(), points.max(0).tolist()
        height, width = self.hu.shape
        x0, y0 = min(max(int(ax) - margin, 0), width), min(max(int(ay) - margin, 0), height)
        return x0, y0, max(min(int(bx) + margin + 1, width), x0), max(min(int(by) + margin + 1, height), y0)

    def cover(self, outline: np.ndarray, soft: float = 0.0) -> np.ndarray:
        """`patch` on the whole slice: float32 [H, W] in [0, 1]."""
        out = np.zeros_like(self.hu)
        where, cover = self.patch(outline, soft)
        out[where] = cover
        return out

    def fill(
        self,
        outline: np.ndarray,
        hu: float,
        *,
        alpha: float = 1.0,
        soft: float = 0.0,
        within: np.ndarray | None = None,
    ) -> None:
        """Paint a closed outline over what is there; `within` (float32 [H, W] in [0, 1]) limits it to a region."""
        where, cover = self.patch(outline, soft)
        if within is not None:
            cover = cover * within[where]
        region = self.hu[where]
        region += alpha * cover * (hu - region)

    def blend(self, cover: np.ndarray, hu: float | np.ndarray) -> None:
        """Paint a coverage, float32 [H, W] in [0, 1], over what is there."""
        self.hu += cover * (hu - self.hu)

    def strokes(self, segments: np.ndarray | Sequence[tuple[float, float, float, float, float]]) -> np.ndarray:
        """Coverage, float32 [H, W] in [0, 1], of straight segments (x0, y0, x1, y1, width) with round ends, all in
        millimetres. A segment thinner than a sub-pixel is drawn fainter instead."""
        out = np.zeros_like(self.hu)
        table = np.reshape(np.asarray(segments, float), (-1, 5))
        # Thin and therefore faint segments first: Pillow overwrites, and a thick vessel must not be dimmed by a twig.
        table = table[np.argsort(table[:, 4], kind="stable")]
        ends = np.hstack([self.pixels(table[:, :2]), self.pixels(table[:, 2:4])])
        widths = table[:, 4] * self.scale * FINE
        x0, y0, x1, y1 = self.box(ends.reshape(-1, 2), math.ceil(widths[-1])) if len(table) else (0, 0, 0, 0)
        if x0 == x1 or y0 == y1:
            return out
        fine = Image.new("L", ((x1 - x0) * FINE, (y1 - y0) * FINE))
        draw = ImageDraw.Draw(fine)
        for (ax, ay, bx, by), width in zip(((ends - (x0, y0, x0, y0)) * FINE).tolist(), widths.tolist(), strict=True):
            draw.line((ax, ay, bx, by), fill=min(255, int(255 * width)), width=max(1, round(width)))
            if width >= 2:
                r = width / 2
                draw.ellipse((ax - r, ay - r, ax + r, ay + r), fill=255)
                draw.ellipse((bx - r, by - r, bx + r, by + r), fill=255)
        out[y0:y1, x0:x1] = np.asarray(fine.reduce(FINE), np.float32) / 255
        return out


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], down: int, across: int) -> np.ndarray:
    """Standard normal noise that varies over about `down` rows and `across` columns; float32, of the given shape."""
    coarse = rng.standard_normal((max(4, shape[0] // down), max(4, shape[1] // across)), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def closed_curve(points: np.ndarray, samples: int = 120) -> np.ndarray:
    """A smooth closed outline [samples, 2] through the points [N, 2]."""
    return spline_basis(len(points), samples, True) @ points


@cache
def spline_basis(knots: int, samples: int, closed: bool, derivative: int = 0) -> np.ndarray:
    """The matrix [samples, knots] that takes knots to points on the cubic spline through them, or to its derivative:
    a spline is linear in its knots, so solving once serves every curve with as many."""
    unit = np.eye(knots)
    if closed:
        spline = CubicSpline(np.arange(knots + 1), np.vstack([unit, unit[:1]]), bc_type="periodic")
        return spline(np.linspace(0, knots, samples, endpoint=False))
    return CubicSpline(np.arange(knots), unit)(np.linspace(0, knots - 1, samples), derivative)


def band(points: np.ndarray, width: float, samples: int = 24) -> np.ndarray:
    """The outline of a smooth strip of the given width along the points [N, 2], with tapered ends."""
    path = spline_basis(len(points), samples, False) @ points
    along = spline_basis(len(points), samples, False, 1) @ points
    normal = along[:, ::-1] * [-1, 1] / np.maximum(np.hypot(*along.T), 1e-9)[:, None]
    half = normal * (width / 2 * np.sin(np.linspace(0.35, math.pi - 0.35, samples)) ** 0.5)[:, None]
    return np.vstack([path + half, (path - half)[::-1]])


def blob(
    rng: np.random.Generator,
    center: tuple[float, float],
    radii: tuple[float, float],
    angle: float = 0.0,
    wobble: float = 0.04,
    lobes: Sequence[int] = (2, 3, 4, 5),
) -> np.ndarray:
    """The outline [N, 2] of an ellipse whose radius swings by `wobble` (a fraction) at each of the `lobes`
    frequencies. angle in radians."""
    theta = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    phases = rng.uniform(0, 2 * math.pi, len(lobes))
    swing = rng.normal(0, wobble, len(lobes))
    radius = 1 + sum(a * np.cos(k * theta + p) for a, k, p in zip(swing, lobes, phases, strict=True))
    x, y = radii[0] * radius * np.cos(theta), radii[1] * radius * np.sin(theta)
    cos, sin = math.cos(angle), math.sin(angle)
    return np.stack([center[0] + x * cos - y * sin, center[1] + x * sin + y * cos], 1)
