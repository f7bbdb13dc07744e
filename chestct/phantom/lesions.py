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
from chestct.phantom.lungs import Segment, grow, hila

DIAMETER = {"adenocarcinoma": (26.0, 48.0), "squamous": (36.0, 66.0), "large_cell": (52.0, 90.0)}
"""Millimetres at difficulty 0.5."""


def plant(
    canvas: Canvas, rng: np.random.Generator, p: Patient, lung: np.ndarray, subtype: str, difficulty: float
) -> np.ndarray:
    """Draw one lesion of the subtype into the lung.

    lung: float32 [H, W] in [0, 1], coverage of both lungs. difficulty in [0, 1] shrinks and fades the lesion.
    Returns the mask, bool [H, W]: the lesion's outline within the lung, cavity included, spicules and
    satellites not.
    """
    low, high = DIAMETER[subtype]
    # Chosen so that a linear head on frozen VGG16 scores an AUROC near 0.92 at difficulty 0.5 with 600 slices.
    size, reaction = 1.4 - difficulty + 0.4 * difficulty**2, 1.9 - 1.5 * difficulty + 0.4 * difficulty**2
    radius = rng.uniform(low, high) / 2 * size
    center = choose_place(canvas, rng, p, lung, subtype, radius)
    radii = (radius * rng.uniform(0.85, 1.15), radius * rng.uniform(0.8, 1.1))
    angle = rng.uniform(0, math.pi)
    fade = 1.0 - 0.35 * difficulty**2 * rng.uniform(0.3, 1.0)
    draw_reaction(canvas, rng, lung, subtype, center, radius, reaction * rng.uniform(0.7, 1.3))
    if subtype == "large_cell":
        outline = blob(rng, center, radii, angle, 0.045, (2, 4, 7, 9))
        canvas.fill(outline, 45, alpha=fade, soft=0.6, within=lung)
        if rng.random() < 0.6:
            dead = blob(rng, center, (radii[0] * 0.5, radii[1] * 0.45), angle, 0.15)
            canvas.fill(dead, rng.uniform(-40, 15), alpha=0.9, soft=2.0, within=lung)
    elif subtype == "squamous":
        outline = blob(rng, center, radii, angle, 0.08)
        canvas.fill(outline, 42, alpha=fade, soft=0.8, within=lung)
        draw_spicules(canvas, rng, lung, center, radius, int(rng.integers(3, 9)), fade)
        if rng.random() < 0.45:
            draw_cavity(canvas, rng, lung, center, radii, angle)
    else:
        outline = blob(rng, center, radii, angle, 0.09)
        solid = rng.uniform(0.55, 1.0)
        canvas.fill(outline, rng.uniform(-560, -300), alpha=fade, soft=1.2, within=lung)
        core = blob(rng, center, (radii[0] * solid, radii[1] * solid), angle, 0.12)
        canvas.fill(core, rng.uniform(-60, 40), alpha=fade, soft=0.8, within=lung)
        draw_spicules(canvas, rng, lung, center, radius, int(rng.integers(7, 18)), fade)
    mask = (canvas.cover(outline) > 0.5) & (lung > 0.5)
    if not mask.any():  # smaller than a pixel
        mask.flat[np.argmax(canvas.cover(outline, soft=1 / canvas.scale) * lung)] = True
    return mask


def choose_place(
    canvas: Canvas, rng: np.random.Generator, p: Patient, lung: np.ndarray, subtype: str, radius: float
) -> tuple[float, float]:
    """A centre, in millimetres, that suits the subtype: near a hilum for squamous, near the chest wall otherwise."""
    step = max(1, round(2.5 * canvas.scale))  # pixels; a centre needs no finer grid
    x, y = (axis[::step, ::step] for axis in canvas.grid)
    lung = lung[::step, ::step]
    depth = distance_transform_edt(np.pad(lung > 0.5, 1))[1:-1, 1:-1] * step / canvas.scale
    to_hilum = np.min([np.hypot(x - hx, y - hy) for hx, hy in hila(p).values()], axis=0)
    if subtype == "squamous":
        weight = np.exp(-(((to_hilum - 14) / 16) ** 2))
        wanted = 0.6 * radius
    else:
        weight = 1 / (1 + np.exp((58 - to_hilum) / 6))
        wanted = radius * (0.8 if subtype == "large_cell" else 1.3)
    weight = weight * np.exp(-(((depth - wanted) / (0.3 * radius + 3)) ** 2)) * (lung > 0.5) + 1e-9 * lung
    chance = weight.ravel().astype(np.float64)
    i = rng.choice(chance.size, p=chance / chance.sum())
    return float(x.flat[i]), float(y.flat[i])


def draw_reaction(
    canvas: Canvas,
    rng: np.random.Generator,
    lung: np.ndarray,
    subtype: str,
    center: tuple[float, float],
    radius: float,
    strength: float,
) -> None:
    """The lung around a tumour: thickened septa (lymphangitic spread) for adenocarcinoma, consolidation with air
    bronchograms behind an obstructing squamous carcinoma, satellite nodules for large cell carcinoma.

    strength: 0 for none, about 1 for a lot.
    """
    reach = radius + 6 + 26 * strength
    soft = 2.5 if subtype == "squamous" else 6.0
    halo = canvas.cover(blob(rng, center, (reach, reach), 0, 0.1), soft=soft) * lung
    spread = rng.random((2, int(strength * reach**2 / 11)))
    away, around = 0.6 * radius + spread[0] * (1.15 * reach - 0.6 * radius), 2 * math.pi * spread[1]
    start = np.stack([away * np.cos(around), away * np.sin(around)], 1) + center
    if subtype == "squamous":
        canvas.blend(halo * min(0.85, 0.25 + 0.4 * strength), -180)
        heading = np.arange(14) * (2 * math.pi / 14) + rng.normal(0, 0.15, 14)
        tubes = grow(rng, np.full(14, center[0]), np.full(14, center[1]), heading, rng.uniform(1.5, 3.0, 14))
        canvas.blend(canvas.strokes(tubes) * halo * min(1.0, strength), -930)
    elif subtype == "large_cell":
        canvas.hu += halo * (90 * strength)
        size = rng.uniform(3.0, 8.5, len(start))
        some = rng.random(len(start)) < 0.15
        nodules = np.column_stack([start, start + 0.3, size])[some]
        canvas.blend(canvas.strokes(nodules) * lung * min(1.0, 0.4 + 0.6 * strength), 10)
    else:
        canvas.hu += halo * (200 * strength)
        heading, length = rng.uniform(0, math.pi, len(start)), rng.uniform(4, 12, len(start))
        end = start + np.stack([np.cos(heading), np.sin(heading)], 1) * length[:, None]
        septa = np.column_stack([start, end, rng.uniform(0.9, 1.7, len(start))])
        canvas.blend(canvas.strokes(septa) * lung * min(1.0, 0.4 + 0.6 * strength), -160)


def draw_spicules(
    canvas: Canvas,
    rng: np.random.Generator,
    lung: np.ndarray,
    center: tuple[float, float],
    radius: float,
    count: int,
    fade: float,
) -> None:
    """Thin strands that radiate from the lesion into the lung."""
    segments: list[Segment] = []
    for angle in rng.uniform(0, 2 * math.pi, count):
        bend = angle + rng.normal(0, 0.15)
        near, far = radius * 0.7, radius * rng.uniform(1.15, 1.7) + 2
        middle = (center[0] + 0.5 * (near + far) * math.cos(angle), center[1] + 0.5 * (near + far) * math.sin(angle))
        start = (center[0] + near * math.cos(angle), center[1] + near * math.sin(angle))
        end = (center[0] + far * math.cos(bend), center[1] + far * math.sin(bend))
        width = rng.uniform(0.9, 1.8)
        segments += [(*start, *middle, width * 1.4), (*middle, *end, width * 0.7)]
    canvas.blend(canvas.strokes(segments) * lung * (0.85 * fade), -20)


def draw_cavity(
    canvas: Canvas,
    rng: np.random.Generator,
    lung: np.ndarray,
    center: tuple[float, float],
    radii: tuple[float, float],
    angle: float,
) -> None:
    """Air in a thick irregular wall, off the middle, sometimes with a fluid level."""
    share = rng.uniform(0.35, 0.6)
    place = (center[0] + rng.normal(0, 0.1) * radii[0], center[1] + rng.normal(0, 0.1) * radii[1])
    hole = blob(rng, place, (radii[0] * share, radii[1] * share), angle, 0.14)
    canvas.fill(hole, -930, soft=0.6, within=lung)
    if rng.random() < 0.35:
        fluid = np.maximum(hole, [-np.inf, place[1] + 0.3 * radii[1] * share])
        canvas.fill(fluid, 15, soft=0.3, within=lung)
