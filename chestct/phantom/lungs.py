"""What fills the lungs: vessels that branch from the hila, harmless findings, and at most one carcinoma.

The harmless findings go into every slice alike, so that a slice is never cancer merely because something lies in the
lung. The subtypes differ as radiology texts teach, and so does the reaction of the lung around them; that texture is
what a network with pooled features sees, so the difficulty dims it too.
"""

import math

import numpy as np
from scipy.ndimage import distance_transform_edt

from chestct.phantom.anatomy import Patient
from chestct.phantom.canvas import Canvas, blob, smooth_noise, toward

DIAMETER = {"adenocarcinoma": (26.0, 48.0), "squamous": (36.0, 66.0), "large_cell": (52.0, 90.0)}
"""Millimetres at difficulty 0.5."""


def draw_lungs(canvas: Canvas, rng: np.random.Generator, p: Patient, lung: np.ndarray, difficulty: float) -> None:
    """Fill the whole canvas as if it were lung. lung: coverage of both lungs, float32 [H, W] in [0, 1]."""
    _, y = canvas.grid
    # Denser towards the back, where blood pools, with patchy aeration.
    pooling = rng.uniform(10, 60) * np.clip(y / 100, -1, 1) + rng.gamma(1.2, 25) * np.clip((y - 70) / 30, 0, 1) ** 2
    canvas.hu[:] = rng.normal(-865, 22) + pooling + rng.uniform(4, 16) * smooth_noise(rng, y.shape, 16, 16)
    _draw_vessels(canvas, rng, p, lung)
    rate = 0.1 + 0.9 * difficulty  # of harmless findings
    for low, high, mean, hu in ((1.2, 2.8, 0.35, rng.uniform(250, 750)), (2.0, 4.2, 0.9, 25 + 0.5 * p.contrast)):
        at = _places(canvas, rng, lung > 0.9, rng.poisson(mean * rate))  # granulomas; vessels cut across
        canvas.blend(canvas.strokes(np.column_stack([at, at + 0.3, 2 * rng.uniform(low, high, len(at))])), hu)
    for _ in range(rng.poisson(0.6 * rate)):  # scar or linear atelectasis, from the pleura inwards
        start = p.outline(0.0, np.radians(rng.uniform(-60, 75, 1)))[0] * (rng.choice((-1, 1)), 1)
        tip = start * (1 - rng.uniform(12, 38) / np.hypot(*start)) + rng.normal(0, 7, 2)
        canvas.blend(0.85 * canvas.strokes(np.array([[*start, *tip, rng.uniform(1.5, 5)]])), rng.uniform(-350, 0))
    if rng.random() < 0.4 * rate:  # full hilum
        place = _hila(p)[rng.integers(2)] * rng.uniform(1.0, 1.2) + rng.normal(0, 6, 2)
        canvas.blend(canvas.cover(blob(rng, place, rng.uniform(7, 15, 2), 0, 0.1), 1), 30 + 0.3 * p.contrast)
    for place in _places(canvas, rng, lung > 0.9, rng.poisson(0.4 * rate)):  # ground glass of an old infection
        canvas.hu += canvas.cover(blob(rng, place, rng.uniform(8, 25, 2), 0, 0.2), 4) * rng.uniform(40, 200)


def _hila(p: Patient) -> np.ndarray:
    """Where the vessels enter the right and the left lung: [2, 2] in millimetres."""
    right, left, y = p.at((34, 40, 46, 40)) * p.width, p.at((42, 42, 54, 46)) * p.width, p.at((4, 4, 13, 26)) * p.depth
    return np.array([(p.shift - right, y), (p.shift + left, y + 4)])


def _places(canvas: Canvas, rng: np.random.Generator, where: np.ndarray, count: int) -> np.ndarray:
    """Random places in a region: [count, 2] in millimetres."""
    x, y = canvas.grid
    i = rng.choice(np.flatnonzero(where), count)
    return np.stack([x.flat[i], y.flat[i]], 1).astype(float)


def _grow(rng: np.random.Generator, start: np.ndarray, heading: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Segments [N, 5] of vessel trees that start at the given places [T, 2], grown fork by fork, all trees at once.

    A branch's length goes with its radius, and radii shrink at a fork so that the cubes add up (Murray 1926); any
    branch may leave the plane of the slice.
    """
    segments = []
    for _ in range(11):
        step = (3 + 5 * radius) * rng.uniform(0.7, 1.4, len(radius)) / 3
        for _ in range(3):
            heading = heading + rng.normal(0, 0.13, len(radius))
            tip = start + toward(heading, step)
            segments.append(np.column_stack([start, tip, 2 * radius]))
            start, radius = tip, radius * 0.95
        major, side = rng.uniform(0.55, 0.9, len(radius)), rng.choice((-1, 1), len(radius))
        heading = np.append(heading + side * rng.uniform(0.1, 0.35), heading - side * rng.uniform(0.4, 0.9))
        radius = np.append(radius * major ** (1 / 3), radius * (1 - major) ** (1 / 3)) * 0.9
        stays = (rng.random(len(radius)) < 0.72) & (radius > 0.32)
        start, heading, radius = np.tile(start, (2, 1))[stays], heading[stays], radius[stays]
    return np.concatenate(segments)


def _draw_vessels(canvas: Canvas, rng: np.random.Generator, p: Patient, lung: np.ndarray) -> None:
    """Branching vessels in the plane, and many more that pass through it as dots and short pieces."""
    caliber, blood, trees = p.at((2.2, 3.7, 3.3, 2.0)) * rng.uniform(0.8, 1.1), 20 + 0.5 * p.contrast, []
    for straight, side, hilum in zip((math.pi, 0.0), (-1, 1), _hila(p), strict=True):
        turn = np.linspace(-1.25, 1.15, int(rng.integers(5, 9)))
        start = hilum + np.outer(turn, (0, 12)) + rng.normal(0, 4, (len(turn), 2))
        heading = straight + side * turn + rng.normal(0, 0.12, len(turn))
        trees.append(_grow(rng, start, heading, caliber * rng.uniform(0.45, 1.0, len(turn))))
    start = _places(canvas, rng, lung > 0.5, int(rng.integers(150, 250)))
    x, y = (start - _hila(p)[(start[:, 0] > 0).astype(int)]).T
    radius = np.clip(rng.lognormal(-0.3, 0.45, len(x)) * (1.5 - np.hypot(x, y) / 110), 0.3, 3.6)
    half = toward(np.arctan2(y, x) + rng.normal(0, 0.7, len(x)), radius * rng.exponential(1.3, len(x)))
    # Passing out of the plane, a vessel thins, and half of them are caught at their fading end.
    thick = np.column_stack([start, start + half, 2 * radius])
    passing = np.stack([thick, np.column_stack([start + half, start + 2 * half, 1.3 * radius])], axis=1)
    canvas.blend(0.5 * canvas.strokes(passing[::2].reshape(-1, 5)), blood)
    canvas.blend(canvas.strokes(np.vstack([*trees, passing[1::2].reshape(-1, 5)])), blood)


def plant(
    canvas: Canvas, rng: np.random.Generator, p: Patient, lung: np.ndarray, subtype: str, difficulty: float
) -> np.ndarray:
    """Draw one lesion of the subtype into a canvas that is lung all over; the difficulty shrinks and fades it.

    Returns the mask, bool [H, W]: the lesion's outline within the lung, cavity included, spicules and satellites not.
    """
    # Chosen so that a linear head on frozen VGG16 scores an AUROC near 0.92 at difficulty 0.5 with 600 slices.
    size, reaction = 1.4 - difficulty + 0.4 * difficulty**2, 1.9 - 1.5 * difficulty + 0.4 * difficulty**2
    fade = 1.0 - 0.35 * difficulty**2 * rng.uniform(0.3, 1.0)
    radius, squamous = rng.uniform(*DIAMETER[subtype]) / 2 * size, subtype == "squamous"
    center = _choose_place(canvas, rng, p, lung, radius, central=squamous)
    _draw_reaction(canvas, rng, subtype, center, radius, reaction * rng.uniform(0.7, 1.3))
    radii, angle = radius * rng.uniform(0.82, 1.12, 2), rng.uniform(0, math.pi)

    def fill(share: float, wobble: float, hu: float, soft: float, lobes: tuple[int, ...] = (2, 3, 4, 5)) -> np.ndarray:
        outline = blob(rng, center, radii * share, angle, wobble, lobes)
        canvas.blend(fade * canvas.cover(outline, soft), hu)
        return outline

    if subtype == "large_cell":
        outline = fill(1.0, 0.045, 45, 0.6, (2, 4, 7, 9))
        fill(0.5, 0.15, rng.uniform(-40, 45), 2.0)  # necrosis
    else:
        outline = fill(1.0, 0.09, 42 if squamous else rng.uniform(-560, -300), 1.0)
        if not squamous:
            fill(rng.uniform(0.55, 1.0), 0.12, rng.uniform(-60, 40), 0.8)
        count = int(rng.integers(3, 9) if squamous else rng.integers(7, 18))
        turn, far = rng.uniform(0, 2 * math.pi, count), radius * rng.uniform(1.15, 1.7, count) + 2
        for part, width in ((0.8, 2.0), (1.0, 1.0)):  # spicules, which thin as they radiate
            ends = np.column_stack([center + toward(turn, 0.7 * radius), center + toward(turn, far * part)])
            canvas.blend(0.7 * fade * canvas.strokes(np.column_stack([ends, np.full(count, width)])), -20)
        if squamous and rng.random() < 0.45:  # a cavity in a thick irregular wall
            fill(rng.uniform(0.35, 0.6), 0.14, -930, 0.6)
    mask = (canvas.cover(outline) > 0.5) & (lung > 0.5)
    if not mask.any():  # smaller than a pixel
        mask.flat[np.argmax(canvas.cover(outline, soft=1 / canvas.scale) * lung)] = True
    return mask


def _choose_place(
    canvas: Canvas, rng: np.random.Generator, p: Patient, lung: np.ndarray, radius: float, central: bool
) -> np.ndarray:
    """A centre, in millimetres, among the eighth of the lungs that suits best: near a hilum, or near the chest wall."""
    depth = distance_transform_edt(lung > 0.5) / canvas.scale
    to_hilum = np.min([np.hypot(canvas.grid[0] - x, canvas.grid[1] - y) for x, y in _hila(p)], axis=0)
    unfit = np.abs(depth - 0.6 * radius) + np.abs(to_hilum - 14)
    if not central:
        unfit = np.abs(depth - 0.9 * radius) + np.maximum(60 - to_hilum, 0)
    return _places(canvas, rng, (lung > 0.5) & (unfit <= np.quantile(unfit[lung > 0.5], 1 / 8)), 1)[0]


def _draw_reaction(
    canvas: Canvas, rng: np.random.Generator, subtype: str, center: np.ndarray, radius: float, strength: float
) -> None:
    """The lung around a tumour: thickened septa (lymphangitic spread) for adenocarcinoma, consolidation with air
    bronchograms behind an obstructing squamous carcinoma, satellite nodules for large cell carcinoma.

    strength: 0 for none, about 1 for a lot.
    """
    reach = radius + 6 + 26 * strength
    halo = canvas.cover(blob(rng, center, (reach, reach), 0, 0.1), 4.0)
    if subtype == "squamous":
        canvas.blend(halo * min(0.85, 0.25 + 0.4 * strength), -180)
        tubes = _grow(rng, np.tile(center, (14, 1)), rng.uniform(0, 2 * math.pi, 14), rng.uniform(1.5, 3.0, 14))
        canvas.blend(canvas.strokes(tubes) * halo * min(1.0, strength), -930)
        return
    nodules = subtype == "large_cell"
    length, width, hu = ((0.3, 0.4), (3.0, 8.5), 10) if nodules else ((4.0, 12.0), (0.9, 1.7), -160)
    canvas.hu += halo * ((90 if nodules else 200) * strength)
    count = int(strength * reach**2 / (73 if nodules else 11))
    start = center + toward(rng.uniform(0, 2 * math.pi, count), rng.uniform(0.6 * radius, 1.15 * reach, count))
    end = start + toward(rng.uniform(0, math.pi, count), rng.uniform(*length, count))
    marks = canvas.strokes(np.column_stack([start, end, rng.uniform(*width, count)]))
    canvas.blend(marks * min(1.0, 0.4 + 0.6 * strength), hu)
