"""Carcinomas with known outline: one per cancer slice, its look chosen by subtype.

What differs between the subtypes is what radiology texts teach: adenocarcinoma lies in the periphery, often part-solid
with spicules; squamous cell carcinoma sits at the hilum and may cavitate; large cell carcinoma is a big lobulated
peripheral mass with necrosis. The lung around a tumour reacts, each in its own way; that texture, more than the mass
itself, is what a network with pooled features sees, so the difficulty dims it too. The mask holds the tumour alone.
"""

import math

import numpy as np
from scipy.ndimage import distance_transform_edt

from chestct.phantom.anatomy import Patient
from chestct.phantom.canvas import Canvas, blob
from chestct.phantom.lungs import grow, hila

DIAMETER = {"adenocarcinoma": (26.0, 48.0), "squamous": (36.0, 66.0), "large_cell": (52.0, 90.0)}
"""Millimetres at difficulty 0.5."""


def plant(
    canvas: Canvas, rng: np.random.Generator, p: Patient, lung: np.ndarray, subtype: str, difficulty: float
) -> np.ndarray:
    """Draw one lesion of the subtype into a canvas that is lung all over.

    lung: float32 [H, W] in [0, 1], coverage of both lungs. difficulty in [0, 1] shrinks and fades the lesion.
    Returns the mask, bool [H, W]: the lesion's outline within the lung, cavity included, spicules and satellites not.
    """
    # Chosen so that a linear head on frozen VGG16 scores an AUROC near 0.92 at difficulty 0.5 with 600 slices.
    size, reaction = 1.4 - difficulty + 0.4 * difficulty**2, 1.9 - 1.5 * difficulty + 0.4 * difficulty**2
    radius = rng.uniform(*DIAMETER[subtype]) / 2 * size
    center = _choose_place(canvas, rng, p, lung, subtype, radius)
    rx, ry, angle = radius * rng.uniform(0.85, 1.15), radius * rng.uniform(0.8, 1.1), rng.uniform(0, math.pi)
    fade = 1.0 - 0.35 * difficulty**2 * rng.uniform(0.3, 1.0)
    _draw_reaction(canvas, rng, subtype, center, radius, reaction * rng.uniform(0.7, 1.3))
    if subtype == "large_cell":
        outline = blob(rng, center, (rx, ry), angle, 0.045, (2, 4, 7, 9))
        canvas.fill(outline, 45, fade, 0.6)
        if rng.random() < 0.6:  # necrosis
            dead = blob(rng, center, (rx * 0.5, ry * 0.45), angle, 0.15)
            canvas.fill(dead, rng.uniform(-40, 15), soft=2.0)
    elif subtype == "squamous":
        outline = blob(rng, center, (rx, ry), angle, 0.08)
        canvas.fill(outline, 42, fade, 0.8)
        _draw_spicules(canvas, rng, center, radius, int(rng.integers(3, 9)), fade)
        if rng.random() < 0.45:
            _draw_cavity(canvas, rng, center + rng.normal(0, 0.1, 2) * (rx, ry), (rx, ry), angle)
    else:
        outline = blob(rng, center, (rx, ry), angle, 0.09)
        canvas.fill(outline, rng.uniform(-560, -300), fade, 1.2)
        solid = rng.uniform(0.55, 1.0)
        core = blob(rng, center, (rx * solid, ry * solid), angle, 0.12)
        canvas.fill(core, rng.uniform(-60, 40), fade, 0.8)
        _draw_spicules(canvas, rng, center, radius, int(rng.integers(7, 18)), fade)
    mask = (canvas.cover(outline) > 0.5) & (lung > 0.5)
    if not mask.any():  # smaller than a pixel
        mask.flat[np.argmax(canvas.cover(outline, soft=1 / canvas.scale) * lung)] = True
    return mask


def _choose_place(
    canvas: Canvas, rng: np.random.Generator, p: Patient, lung: np.ndarray, subtype: str, radius: float
) -> np.ndarray:
    """A centre, in millimetres, that suits the subtype: near a hilum for squamous, near the chest wall otherwise."""
    step = max(1, round(2.5 * canvas.scale))  # pixels; a centre needs no finer grid
    x, y, lung = (array[::step, ::step] for array in (*canvas.grid, lung))
    depth = distance_transform_edt(np.pad(lung > 0.5, 1))[1:-1, 1:-1] * step / canvas.scale
    to_hilum = np.min([np.hypot(x - hx, y - hy) for hx, hy in hila(p)], axis=0)
    if subtype == "squamous":
        weight, wanted = np.exp(-(((to_hilum - 14) / 16) ** 2)), 0.6 * radius
    else:
        weight, wanted = 1 / (1 + np.exp((58 - to_hilum) / 6)), radius * (0.8 if subtype == "large_cell" else 1.3)
    weight = weight * np.exp(-(((depth - wanted) / (0.3 * radius + 3)) ** 2)) * (lung > 0.5) + 1e-9 * lung
    chance = weight.ravel().astype(np.float64)
    i = rng.choice(chance.size, p=chance / chance.sum())
    return np.array([x.flat[i], y.flat[i]], float)


def _draw_reaction(
    canvas: Canvas, rng: np.random.Generator, subtype: str, center: np.ndarray, radius: float, strength: float
) -> None:
    """The lung around a tumour: thickened septa (lymphangitic spread) for adenocarcinoma, consolidation with air
    bronchograms behind an obstructing squamous carcinoma, satellite nodules for large cell carcinoma.

    strength: 0 for none, about 1 for a lot.
    """
    reach = radius + 6 + 26 * strength
    halo = canvas.cover(blob(rng, center, (reach, reach), 0, 0.1), 2.5 if subtype == "squamous" else 6.0)
    if subtype == "squamous":
        canvas.blend(halo * min(0.85, 0.25 + 0.4 * strength), -180)
        heading = np.arange(14) * (2 * math.pi / 14) + rng.normal(0, 0.15, 14)
        tubes = grow(rng, np.full(14, center[0]), np.full(14, center[1]), heading, rng.uniform(1.5, 3.0, 14))
        canvas.blend(canvas.strokes(tubes) * halo * min(1.0, strength), -930)
        return
    count, lift = int(strength * reach**2 / 11), 90 if subtype == "large_cell" else 200
    canvas.hu += halo * (lift * strength)
    away, around = rng.uniform(0.6 * radius, 1.15 * reach, count), rng.uniform(0, 2 * math.pi, count)
    start = center + np.stack([away * np.cos(around), away * np.sin(around)], 1)
    if subtype == "large_cell":
        marks = np.column_stack([start, start + 0.3, rng.uniform(3.0, 8.5, count)])[rng.random(count) < 0.15]
    else:
        heading, length = rng.uniform(0, math.pi, count), rng.uniform(4, 12, count)
        end = start + np.stack([np.cos(heading), np.sin(heading)], 1) * length[:, None]
        marks = np.column_stack([start, end, rng.uniform(0.9, 1.7, count)])
    canvas.blend(canvas.strokes(marks) * min(1.0, 0.4 + 0.6 * strength), 10 if subtype == "large_cell" else -160)


def _draw_spicules(
    canvas: Canvas, rng: np.random.Generator, center: np.ndarray, radius: float, count: int, fade: float
) -> None:
    """Thin strands that radiate from the lesion into the lung."""
    angle, bend = rng.uniform(0, 2 * math.pi, count), rng.normal(0, 0.15, count)
    far, width = radius * rng.uniform(1.15, 1.7, count) + 2, rng.uniform(0.9, 1.8, count)
    near, middle, end = (
        center + np.stack([np.cos(turn), np.sin(turn)], 1) * np.reshape(distance, (-1, 1))
        for turn, distance in ((angle, 0.7 * radius), (angle, 0.35 * radius + far / 2), (angle + bend, far))
    )
    strands = np.vstack([np.column_stack([near, middle, 1.4 * width]), np.column_stack([middle, end, 0.7 * width])])
    canvas.blend(canvas.strokes(strands) * (0.85 * fade), -20)


def _draw_cavity(
    canvas: Canvas, rng: np.random.Generator, place: np.ndarray, radii: tuple[float, float], angle: float
) -> None:
    """Air in a thick irregular wall, sometimes with a fluid level."""
    share = rng.uniform(0.35, 0.6)
    hole = blob(rng, place, (radii[0] * share, radii[1] * share), angle, 0.14)
    canvas.fill(hole, -930, soft=0.6)
    if rng.random() < 0.35:
        canvas.fill(np.maximum(hole, [-np.inf, place[1] + 0.3 * radii[1] * share]), 15, soft=0.3)
