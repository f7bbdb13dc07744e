"""What fills the lungs: parenchyma, vessels and bronchi that branch from the hila, fissures, and harmless findings.

The harmless findings (granulomas, scars, plaques, full hila, thick vessels) go into every slice alike, so that a slice
is never cancer merely because something lies in the lung.
"""

import math

import numpy as np

from chestct.phantom.anatomy import Patient, cage_outline
from chestct.phantom.canvas import Canvas, band, blob, smooth_noise

Segment = tuple[float, float, float, float, float]


def hila(p: Patient) -> dict[int, tuple[float, float]]:
    """Where the vessels enter the lungs, in millimetres: {-1: right, 1: left}."""
    x = p.at((30, 34, 38, 42, 46, 40)) * p.width
    left = p.at((30, 42, 40, 44, 56, 46)) * p.width
    y = p.at((0, 4, 4, 4, 14, 26)) * p.depth
    return {-1: (p.shift - x, y), 1: (p.shift + left, y + 4)}


def draw_parenchyma(canvas: Canvas, rng: np.random.Generator, p: Patient, lung: np.ndarray) -> None:
    """Aerated lung, denser towards the back where blood pools, with patchy aeration."""
    _, y = canvas.grid
    patchy = smooth_noise(rng, canvas.hu.shape, 16, 16)
    base = rng.normal(-865, 22)
    pooling = rng.uniform(10, 60) * np.clip(y / 100, -1, 1) + rng.gamma(1.2, 25) * np.clip((y - 70) / 30, 0, 1) ** 2
    canvas.blend(lung, (base + pooling + rng.uniform(4, 16) * patchy).astype(np.float32))


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


def draw_vessels(canvas: Canvas, rng: np.random.Generator, p: Patient, lung: np.ndarray) -> None:
    """Branching vessels in the plane, and many more that pass through it as dots and short pieces."""
    rows, columns = np.nonzero(lung > 0.5)
    x, y = canvas.grid
    caliber = p.at((1.6, 2.2, 3.2, 4.2, 3.2, 2.0)) * rng.uniform(0.8, 1.1)
    roots = []
    for side, (hx, hy) in hila(p).items():
        turn = np.linspace(-1.25, 1.15, int(rng.integers(5, 9)))
        outwards = 0.0 if side > 0 else math.pi
        heading = outwards + side * (turn + rng.normal(0, 0.12, len(turn)))
        scatter = rng.normal(0, 4, (2, len(turn)))
        radius = caliber * rng.uniform(0.45, 1.0, len(turn))
        roots.append(np.stack([hx + scatter[0], hy + 12 * turn + scatter[1], heading, radius]))
    segments = grow(rng, *np.concatenate(roots, axis=1))
    count = int(rng.integers(150, 250))
    i = rng.integers(0, len(rows), count)
    entries = np.stack([x[rows[i], columns[i]], y[rows[i], columns[i]]], 1)
    hilum = np.array([hila(p)[-1], hila(p)[1]])[(entries[:, 0] > 0).astype(int)]
    away = entries - hilum
    radius = np.clip(rng.lognormal(-0.3, 0.45, count) * (1.5 - np.hypot(*away.T) / 110), 0.3, 3.6)
    heading = np.arctan2(away[:, 1], away[:, 0]) + rng.normal(0, 0.7, count)
    half = np.stack([np.cos(heading), np.sin(heading)], 1) * (radius * rng.exponential(1.3, count))[:, None]
    # Passing out of the plane, a vessel thins, and half of them are caught at their fading end.
    thick = np.column_stack([entries, entries + half, 2 * radius])
    thin = np.column_stack([entries + half, entries + 2 * half, 1.3 * radius])
    full = count // 2
    blood = 20 + 0.5 * (p.blood - 42)
    canvas.blend(0.5 * canvas.strokes(np.vstack([thick[full:], thin[full:]])) * lung, blood)
    canvas.blend(canvas.strokes(np.vstack([segments, thick[:full], thin[:full]])) * lung, blood)


def draw_bronchi(canvas: Canvas, rng: np.random.Generator, p: Patient, lung: np.ndarray) -> None:
    """Air-filled tubes with thin walls beside the central vessels, some along the plane and some across it."""
    walls: list[Segment] = []
    lumens: list[Segment] = []
    for side, (hx, hy) in hila(p).items():
        for _ in range(rng.integers(2, 6)):
            heading = (0 if side > 0 else math.pi) + rng.normal(0, 0.8)
            across = rng.random() < 0.6
            away = rng.uniform(4, 45) if across else 0.0
            x, y = hx + away * math.cos(heading), hy + away * math.sin(heading) * 0.8
            radius = rng.uniform(1.2, 3.2) * (1.15 - away / 80)
            for _ in range(1 if across else rng.integers(3, 7)):
                length = 0.5 if across else rng.uniform(4, 7)
                tip = (x + length * math.cos(heading), y + length * math.sin(heading))
                walls.append((x, y, *tip, 2 * radius + 1.8))
                lumens.append((x, y, *tip, 2 * radius))
                x, y = tip
                heading += rng.normal(0, 0.12)
                radius *= 0.85
    canvas.blend(canvas.strokes(walls) * lung, -250)
    canvas.blend(canvas.strokes(lumens) * lung, -960)


def draw_fissures(canvas: Canvas, rng: np.random.Generator, p: Patient, lung: np.ndarray) -> None:
    """The oblique fissures as faint lines or as bands poor in vessels."""
    width, depth = p.width * 130, p.depth * 100
    for side in (-1, 1):
        front = depth * float(np.interp(p.level, (0.2, 0.9), (0.7, -0.75)))
        points = np.array(
            [(side * 30.0, front - 6), (side * 0.55 * width, front + rng.normal(6, 5)), (side * width, front - 10)]
        )
        canvas.fill(band(points, rng.uniform(0.7, 1.4)), -600, alpha=rng.uniform(0.3, 0.9), within=lung)


def draw_findings(canvas: Canvas, rng: np.random.Generator, p: Patient, lung: np.ndarray, difficulty: float) -> None:
    """Harmless findings, the same in normal and cancer slices, more of them the higher the difficulty."""
    rows, columns = np.nonzero(lung > 0.9)
    x, y = canvas.grid
    rate = 0.1 + 0.9 * difficulty

    def somewhere() -> tuple[float, float]:
        i = rng.integers(len(rows))
        return float(x[rows[i], columns[i]]), float(y[rows[i], columns[i]])

    def at_wall(inset: float) -> tuple[float, np.ndarray]:
        angle = rng.uniform(-60, 75)
        angle = math.radians(angle if rng.random() < 0.5 else 180 - angle)
        return angle, cage_outline(p, -inset, np.array([angle]))[0]

    for _ in range(rng.poisson(0.35 * rate)):  # calcified granuloma
        r = rng.uniform(1.2, 2.8)
        canvas.fill(blob(rng, somewhere(), (r, r), 0, 0.08), rng.uniform(250, 750), within=lung)
    for _ in range(rng.poisson(0.9 * rate)):  # a thick vessel cut across
        r = rng.uniform(2.0, 4.2)
        canvas.fill(
            blob(rng, somewhere(), (r, r * rng.uniform(0.8, 1.2)), 0, 0.04), 25 + 0.5 * (p.blood - 42), within=lung
        )
    for _ in range(rng.poisson(0.45 * rate)):  # scar or linear atelectasis, from the pleura inwards
        _, start = at_wall(0)
        inwards = -start / np.hypot(*start)
        tip = start + inwards * rng.uniform(12, 38) + rng.normal(0, 7, 2)
        path = np.stack([start, (start + tip) / 2 + rng.normal(0, 2, 2), tip])
        canvas.fill(band(path, rng.uniform(1.5, 5)), rng.uniform(-350, 0), alpha=0.85, soft=0.8, within=lung)
    for _ in range(rng.poisson(0.35 * rate)):  # pleural thickening or plaque
        angle, _ = at_wall(0)
        arc = (angle + np.linspace(-1, 1, 7) * rng.uniform(0.06, 0.28)) % (2 * math.pi)
        canvas.fill(band(cage_outline(p, -1.0, arc), rng.uniform(4, 10)), rng.uniform(20, 120), soft=0.7, within=lung)
    if rng.random() < 0.4 * rate:  # full hilum
        side = rng.choice((-1, 1))
        hx, hy = hila(p)[int(side)]
        place = (hx + side * rng.uniform(0, 9), hy + rng.normal(0, 8))
        size = (rng.uniform(7, 14), rng.uniform(7, 15))
        canvas.fill(blob(rng, place, size, rng.uniform(0, 3), 0.1), 30 + 0.3 * (p.blood - 42), soft=1, within=lung)
    if rng.random() < 0.3 * rate:  # patchy ground glass of an old infection
        place = somewhere()
        shape = canvas.cover(blob(rng, place, (rng.uniform(8, 20), rng.uniform(8, 20)), 0, 0.2), soft=4)
        canvas.hu += shape * lung * rng.uniform(40, 170)
    if rng.random() < 0.35 * rate:  # dependent atelectasis
        depth = p.depth * 100
        strength = rng.uniform(80, 380)
        edge = np.clip((y - depth * rng.uniform(0.62, 0.8)) / (0.25 * depth), 0, 1)
        ragged = smooth_noise(rng, canvas.hu.shape, 8, 8)
        canvas.hu += lung * edge * strength * np.clip(0.7 + 0.5 * ragged, 0, 1.5)
