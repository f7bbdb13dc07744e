"""What fills the lungs: parenchyma, vessels and bronchi that branch from the hila, and harmless findings.

The harmless findings (granulomas, scars, plaques, full hila, thick vessels) go into every slice alike, so that a slice
is never cancer merely because something lies in the lung.
"""

import math

import numpy as np

from chestct.phantom.anatomy import Patient
from chestct.phantom.canvas import Canvas, Shape, blob, smooth_noise


def draw_lungs(canvas: Canvas, rng: np.random.Generator, p: Patient, lung: np.ndarray, difficulty: float) -> None:
    """Fill the whole canvas as if it were lung. lung: coverage of both lungs, float32 [H, W] in [0, 1]."""
    _, y = canvas.grid
    # Denser towards the back, where blood pools, with patchy aeration.
    pooling = rng.uniform(10, 60) * np.clip(y / 100, -1, 1) + rng.gamma(1.2, 25) * np.clip((y - 70) / 30, 0, 1) ** 2
    patchy = rng.uniform(4, 16) * smooth_noise(rng, y.shape, 16, 16)
    canvas.hu[:] = rng.normal(-865, 22) + pooling + patchy
    _draw_vessels(canvas, rng, p, lung)
    _draw_bronchi(canvas, rng, p)
    _draw_findings(canvas, rng, p, lung, 0.1 + 0.9 * difficulty)


def hila(p: Patient) -> np.ndarray:
    """Where the vessels enter the right and the left lung: [2, 2] in millimetres."""
    right, left = (p.at(table) * p.width for table in ((30, 34, 38, 42, 46, 40), (30, 42, 40, 44, 56, 46)))
    y = p.at((0, 4, 4, 4, 14, 26)) * p.depth
    return np.array([(p.shift - right, y), (p.shift + left, y + 4)])


def grow(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, heading: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Segments [N, 5] of vessel trees that start at the given places, grown fork by fork, all trees at once.

    A branch's length goes with its radius, and radii shrink at a fork so that the cubes add up (Murray 1926); any
    branch may leave the plane of the slice.
    """
    segments = []
    for _ in range(11):
        step = (3 + 5 * radius) * rng.uniform(0.7, 1.4, len(x)) / 3
        for _ in range(3):
            heading = heading + rng.normal(0, 0.13, len(x))
            tip_x, tip_y = x + step * np.cos(heading), y + step * np.sin(heading)
            segments.append(np.stack([x, y, tip_x, tip_y, 2 * radius], 1))
            x, y, radius = tip_x, tip_y, radius * 0.95
        major, side = rng.uniform(0.55, 0.9, len(x)), rng.choice((-1, 1), len(x))
        turn = np.concatenate([side * rng.uniform(0.1, 0.35, len(x)), -side * rng.uniform(0.4, 0.9, len(x))])
        heading = np.tile(heading, 2) + turn
        radius = np.tile(radius, 2) * np.concatenate([major, 1 - major]) ** (1 / 3) * 0.9
        stays = (rng.random(2 * len(x)) < 0.72) & (radius > 0.32)
        x, y, heading, radius = np.tile(x, 2)[stays], np.tile(y, 2)[stays], heading[stays], radius[stays]
    return np.concatenate(segments)


def _draw_vessels(canvas: Canvas, rng: np.random.Generator, p: Patient, lung: np.ndarray) -> None:
    """Branching vessels in the plane, and many more that pass through it as dots and short pieces."""
    caliber = p.at((1.6, 2.2, 3.2, 4.2, 3.2, 2.0)) * rng.uniform(0.8, 1.1)
    roots = []
    for side, (x, y) in zip((-1, 1), hila(p), strict=True):
        turn = np.linspace(-1.25, 1.15, int(rng.integers(5, 9)))
        heading = (0.0 if side > 0 else math.pi) + side * (turn + rng.normal(0, 0.12, len(turn)))
        scatter = rng.normal(0, 4, (2, len(turn)))
        roots.append([x + scatter[0], y + 12 * turn + scatter[1], heading, caliber * rng.uniform(0.45, 1.0, len(turn))])
    segments = grow(rng, *np.concatenate(roots, axis=1))
    entries = _places(canvas, rng, lung > 0.5, int(rng.integers(150, 250)))
    away = entries - hila(p)[(entries[:, 0] > 0).astype(int)]
    count = len(entries)
    radius = np.clip(rng.lognormal(-0.3, 0.45, count) * (1.5 - np.hypot(*away.T) / 110), 0.3, 3.6)
    heading = np.arctan2(away[:, 1], away[:, 0]) + rng.normal(0, 0.7, count)
    half = np.stack([np.cos(heading), np.sin(heading)], 1) * (radius * rng.exponential(1.3, count))[:, None]
    # Passing out of the plane, a vessel thins, and half of them are caught at their fading end.
    thick = np.column_stack([entries, entries + half, 2 * radius])
    thin = np.column_stack([entries + half, entries + 2 * half, 1.3 * radius])
    full, blood = count // 2, 20 + 0.5 * (p.blood - 42)
    canvas.blend(0.5 * canvas.strokes(np.vstack([thick[full:], thin[full:]])), blood)
    canvas.blend(canvas.strokes(np.vstack([segments, thick[:full], thin[:full]])), blood)


def _draw_bronchi(canvas: Canvas, rng: np.random.Generator, p: Patient) -> None:
    """Air-filled tubes with thin walls along the central vessels, some along the plane and some across it."""
    tubes = []
    for side, hilum in zip((-1, 1), hila(p), strict=True):
        for _ in range(rng.integers(2, 6)):
            heading = (0 if side > 0 else math.pi) + rng.normal(0, 0.8)
            across = rng.random() < 0.6
            away = rng.uniform(4, 45) if across else 0.0
            x, y = hilum + np.array([math.cos(heading), 0.8 * math.sin(heading)]) * away
            radius = rng.uniform(1.2, 3.2) * (1.15 - away / 80)
            for _ in range(1 if across else rng.integers(3, 7)):
                length = 0.5 if across else rng.uniform(4, 7)
                tip = (x + length * math.cos(heading), y + length * math.sin(heading))
                tubes.append((x, y, *tip, 2 * radius))
                (x, y), heading, radius = tip, heading + rng.normal(0, 0.12), radius * 0.85
    canvas.blend(canvas.strokes(np.array(tubes) + np.array([0, 0, 0, 0, 1.8])), -250)
    canvas.blend(canvas.strokes(tubes), -960)


def _places(canvas: Canvas, rng: np.random.Generator, where: np.ndarray, count: int) -> np.ndarray:
    """Random places in a region: [count, 2] in millimetres."""
    x, y = canvas.grid
    i = rng.choice(np.flatnonzero(where), count)
    return np.stack([x.flat[i], y.flat[i]], 1).astype(float)


def _draw_findings(canvas: Canvas, rng: np.random.Generator, p: Patient, lung: np.ndarray, rate: float) -> None:
    """Harmless findings, the same in normal and cancer slices; `rate` multiplies how many."""
    blood = 25 + 0.5 * (p.blood - 42)

    def wall(count: int, span: float) -> np.ndarray:
        angle = np.radians(rng.uniform(-60, 75)) + np.linspace(-1, 1, count) * span
        return angle if rng.random() < 0.5 else np.pi - angle

    for low, high, mean, value in ((1.2, 2.8, 0.35, rng.uniform(250, 750)), (2.0, 4.2, 0.9, blood)):
        for place in _places(canvas, rng, lung > 0.9, rng.poisson(mean * rate)):  # granulomas; vessels cut across
            radius = rng.uniform(low, high)
            canvas.fill(blob(rng, place, (radius, radius * rng.uniform(0.8, 1.2)), 0, 0.06), value)
    for _ in range(rng.poisson(0.45 * rate)):  # scar or linear atelectasis, from the pleura inwards
        start = p.outline(0.0, wall(1, 0))[0]
        tip = start * (1 - rng.uniform(12, 38) / np.hypot(*start)) + rng.normal(0, 7, 2)
        canvas.blend(0.85 * canvas.strokes([(*start, *tip, rng.uniform(1.5, 5))]), rng.uniform(-350, 0))
    for _ in range(rng.poisson(0.35 * rate)):  # pleural thickening or plaque
        plaque = p.outline(-1.0, wall(9, rng.uniform(0.06, 0.28)))
        canvas.blend(canvas.paint([Shape(plaque, 1.0, rng.uniform(4, 10))], 0.0), rng.uniform(20, 120))
    if rng.random() < 0.4 * rate:  # full hilum
        side = rng.integers(2)
        place = hila(p)[side] + [(2 * side - 1) * rng.uniform(0, 9), rng.normal(0, 8)]
        outline = blob(rng, place, (rng.uniform(7, 14), rng.uniform(7, 15)), rng.uniform(0, 3), 0.1)
        canvas.fill(outline, 30 + 0.3 * (p.blood - 42), soft=1)
    if rng.random() < 0.3 * rate:  # patchy ground glass of an old infection
        place = _places(canvas, rng, lung > 0.9, 1)[0]
        canvas.hu += canvas.cover(blob(rng, place, tuple(rng.uniform(8, 20, 2)), 0, 0.2), soft=4) * rng.uniform(40, 170)
    if rng.random() < 0.35 * rate:  # dependent atelectasis
        depth = p.depth * 100
        edge = np.clip((canvas.grid[1] - depth * rng.uniform(0.62, 0.8)) / (0.25 * depth), 0, 1)
        ragged = np.clip(0.7 + 0.5 * smooth_noise(rng, canvas.hu.shape, 8, 8), 0, 1.5)
        canvas.hu += edge * ragged * np.float32(rng.uniform(80, 380))
