"""Lesions drawn into the lungs of real normal slices, and controls: the same kind of edit without a lesion.

A model that is shown only cancers with their lesion and normals without learns whatever differs between their
hospitals. Here the same slice is shown with and without, so that nothing but the lesion can tell; and with a control,
so that the edit cannot. Lesions vary in size, place (lung, pleura, hilum), outline (lobulated, spiculated), density
(ground glass to solid), texture and cavities, after Armato et al. 2011 (LIDC) and Hansell et al. 2008 (terms).
"""

import math
from typing import Literal

import numpy as np
from scipy import ndimage

from chestct.imaging.lungs import TISSUE

Kind = Literal["lesion", "control"]

VERSION = 2
"""Of what `insert` draws for a seed; part of the names of caches that rest on it."""

RADIUS = 0.018, 0.12
"""Smallest and largest mean radius of a lesion as shares of the square's side, which the lungs fill: 5 to 35 mm."""

ATTEMPTS = 20
"""How often a lesion is drawn anew that lies on a vessel or the wall, where it cannot be seen."""

SMALLEST = 0.0003
"""Share of the square that a lesion changes at least: 30 pixels of 320 x 320."""

VISIBLE = 0.06
"""Change of grey level, in [0, 1], from which a pixel belongs to the lesion's mask."""


def insert(
    square: np.ndarray, lungs: np.ndarray, kind: Kind, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A normal slice with a lesion, or with a control edit, drawn into its lungs: (square, mask of the lesion).

    square: float32 [S, S] in [0, 1], lungs cropped and levels set as `chestct.imaging.lungs` does; lungs: bool [S, S],
    not empty. The mask, bool [S, S], is empty for controls.
    """
    # A little of the chest wall may be invaded; beyond it an edit would be seen where nothing can be.
    allowed = ndimage.gaussian_filter(ndimage.binary_dilation(lungs, iterations=3).astype(float), 1)
    for _ in range(ATTEMPTS):
        radius = square.shape[0] * np.exp(rng.uniform(*np.log(RADIUS)))
        y, x = _place(lungs, rng)
        inside = _outline(square.shape[0], y, x, radius, rng) * allowed
        if kind == "lesion":
            changed = _lesion(square, inside, radius, rng)
        elif (choice := rng.random()) < 0.35:
            changed = _dependent(square, lungs, rng)
        elif choice < 0.6:
            changed = square + (_vessel(square, y, x, radius, rng) - square) * allowed
        else:
            changed = _graft(square, lungs, inside, rng)
        changed = changed.clip(0, 1).astype(np.float32)
        mask = ndimage.binary_opening((changed - square > VISIBLE) & (inside > 0.5))
        if kind == "control" or mask.sum() >= SMALLEST * len(square) ** 2:
            break
    return changed, mask & (kind == "lesion")


def _place(lungs: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """A pixel in the lungs: anywhere, at the pleura, or at the hilum (the rim that faces the body's middle)."""
    depth = ndimage.distance_transform_edt(lungs)
    columns = np.abs(np.arange(lungs.shape[1]) - np.flatnonzero(lungs.any(0)).mean()) / lungs.shape[1]
    rim = (depth > 0) & (depth < 0.03 * len(lungs))
    choice = rng.random()
    wanted = lungs if choice < 0.55 else rim if choice < 0.8 else rim & (columns < 0.22)
    candidates = np.argwhere(wanted if wanted.any() else lungs)
    y, x = candidates[rng.integers(len(candidates))]
    return int(y), int(x)


def _outline(side: int, y: int, x: int, radius: float, rng: np.random.Generator) -> np.ndarray:
    """How far each pixel lies in an irregular blob, float [S, S] in [0, 1], with a soft edge."""
    turn, aspect = rng.uniform(0, np.pi), rng.uniform(0.65, 1)
    lobes = rng.uniform(0, 0.16)
    waves = [(radius * lobes * rng.normal() / np.sqrt(k), k, rng.uniform(0, 2 * np.pi)) for k in range(2, 8)]
    spikes: list[tuple[float, float, float]] = []
    if rng.random() < 0.4:  # spiculated
        for _ in range(rng.integers(5, 14)):
            at = rng.uniform(0, 2 * np.pi)
            spikes.append((radius * rng.uniform(0.2, 0.9), at, rng.uniform(0.04, 0.12)))
    softness = rng.uniform(0.5, 2.0) * side / 320
    # Nothing reaches further than this; what lies there is not worth the angles of a whole slice.
    reach = radius + sum(abs(height) for height, *_ in [*waves, *spikes]) + 30 * softness
    top, left = (max(0, math.floor(at - reach)) for at in (y, x))
    rows, columns = np.ogrid[top : min(side, math.ceil(y + reach) + 1), left : min(side, math.ceil(x + reach) + 1)]
    down, right = rows - y, columns - x
    along = right * np.cos(turn) + down * np.sin(turn)
    across = (down * np.cos(turn) - right * np.sin(turn)) / aspect
    angle, distance = np.arctan2(across, along), np.hypot(along, across)
    edge = np.full_like(angle, radius)
    for height, wave, phase in waves:
        edge += height * np.cos(wave * angle + phase)
    for height, at, width in spikes:
        off = np.angle(np.exp(1j * (angle - at)))
        edge += height * np.exp(-0.5 * (off / width) ** 2)
    inside = np.full((side, side), 1 / (1 + np.exp(30)))
    inside[rows, columns] = 1 / (1 + np.exp(((distance - edge) / softness).clip(-30, 30)))
    return inside


def _lesion(square: np.ndarray, inside: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Tissue between ground glass and solid, textured, now and then with a cavity; vessels stay visible in it."""
    solid = rng.random() < 0.75
    level = rng.uniform(0.62, 0.82) if solid else rng.uniform(0.32, 0.55)
    texture = _noise(square.shape, rng.uniform(1, max(1.5, radius / 3)), rng) * rng.uniform(
        0.01, 0.06 if solid else 0.09
    )
    grain = _noise(square.shape, rng.uniform(0.5, 1.0), rng) * rng.uniform(0.5, 1.5) * _grain(square)
    share = inside
    if solid and radius > 0.04 * square.shape[0] and rng.random() < 0.15:
        hole = ndimage.shift(inside, rng.uniform(-0.25, 0.25, 2) * radius, order=1)
        share = inside - (1 / (1 + np.exp(-(hole * 2 - rng.uniform(1.5, 1.9)) * 12))) * rng.uniform(0.7, 1) * inside
    if not solid:
        grain = grain + (square - ndimage.gaussian_filter(square, 3))  # vessels and noise shine through
    return np.where(inside > 0.01, np.maximum(square, square * (1 - share) + (level + texture + grain) * share), square)


def _graft(square: np.ndarray, lungs: np.ndarray, inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A control: other lung in the same outline, the same place blurred or noisier, or darker as in emphysema."""
    choice = rng.integers(3)
    if choice == 0:
        offset = np.subtract(_place(lungs, rng), _place(lungs, rng))
        other = np.roll(square if rng.random() < 0.5 else square[:, ::-1], offset, (0, 1))
        # Lung for lung only: a piece of heart would look like a lesion and be called none.
        share = inside * ndimage.gaussian_filter((lungs & (other < 0.4)).astype(float), 1)
        return square * (1 - share) + other * share
    if choice == 1:
        smooth = ndimage.gaussian_filter(square, rng.uniform(0.7, 2.5))
        grain = _noise(square.shape, 0.7, rng) * rng.uniform(0, 2) * _grain(square)
        return square * (1 - inside) + (smooth + grain) * inside
    return square * (1 - inside * lungs * rng.uniform(0.2, 0.7))


def _dependent(square: np.ndarray, lungs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A control: the haze of lung that lies lowest, at the back, denser towards the pleura, in one lung or in both.

    Gravity does that to healthy lungs (Hansell et al. 2008, "dependent opacity"), and a lesion is not far from it.
    """
    side = len(square)
    lowest = np.where(lungs.any(0), side - 1 - lungs[::-1].argmax(0), -side)  # row of each column
    height = lowest - np.arange(side)[:, None] + _noise(square.shape, 6, rng) * rng.uniform(0, 1.5)
    reach = rng.uniform(0.015, 0.09) * side
    share = rng.uniform(0.15, 0.55) * np.exp(-((height.clip(0) / reach) ** rng.uniform(1, 2)))
    share = share * ndimage.gaussian_filter(lungs.astype(float), 1)
    if rng.random() < 0.3:
        share[:, : round(np.flatnonzero(lungs.any(0)).mean())] = 0
    grain = _noise(square.shape, 0.7, rng) * rng.uniform(0, 1.5) * _grain(square)
    return square * (1 - share) + (TISSUE + grain) * share


def _vessel(square: np.ndarray, y: int, x: int, radius: float, rng: np.random.Generator) -> np.ndarray:
    """A control: a bright branching tube or a bronchus with its wall, as long as lesions are wide and as dense."""
    side = square.shape[0]
    width = rng.uniform(0.004, 0.012) * side
    distance = np.full(square.shape, np.inf)
    rows, columns = np.mgrid[:side, :side]
    branches = [(float(y), float(x), rng.uniform(0, 2 * np.pi), width)]
    for _ in range(rng.integers(1, 4)):
        top, left, angle, thick = branches[rng.integers(len(branches))]
        for _ in range(rng.integers(3, 8)):
            angle += rng.normal(0, 0.3)
            end_y, end_x = top + radius * 0.6 * np.sin(angle), left + radius * 0.6 * np.cos(angle)
            length = max((end_y - top) ** 2 + (end_x - left) ** 2, 1e-6)
            along = (((rows - top) * (end_y - top) + (columns - left) * (end_x - left)) / length).clip(0, 1)
            off = np.hypot(rows - top - along * (end_y - top), columns - left - along * (end_x - left))
            distance = np.minimum(distance, off / thick)
            top, left, thick = end_y, end_x, thick * rng.uniform(0.75, 0.95)
            branches.append((top, left, angle + rng.choice([-0.6, 0.6]), thick))
    share = 1 / (1 + np.exp(((distance - 1) * rng.uniform(2, 5)).clip(-30, 30)))
    if rng.random() < 0.25:  # a bronchus: air inside
        share = share - 0.9 / (1 + np.exp(((distance - 0.55) * 8).clip(-30, 30)))
    level = rng.uniform(0.45, 0.8)
    return np.maximum(square, square * (1 - share) + level * share.clip(0, 1))


def _noise(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of unit spread."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), sigma)
    return noise / noise.std()


def _grain(square: np.ndarray) -> float:
    """The slice's own noise: spread of what a median filter takes away from soft tissue, in grey levels."""
    tissue = (square > 0.6) & (square < 0.9)
    if not tissue.any():
        return 0.0
    rest = (square - ndimage.median_filter(square, 3))[tissue]
    return float(np.median(np.abs(rest)) * 1.48)
