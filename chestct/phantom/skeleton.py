"""Bones of the thorax: ribs in oblique cross-section, sternum, vertebra, scapulae.

Every bone is two outlines, cortex and the marrow inside it, hung on the rib cage of the patient it belongs to.
"""

import math

import numpy as np

from chestct.phantom.anatomy import CAGE, Patient, cage_outline
from chestct.phantom.canvas import Canvas, band, blob

CORTEX, MARROW = 720.0, 220.0
"""Hounsfield units of bone of average density."""


def draw_skeleton(canvas: Canvas, rng: np.random.Generator, p: Patient) -> None:
    """Ribs in oblique cross-section, sternum, vertebra, and the scapulae at upper levels."""
    cortex, marrow = CORTEX * p.bone, MARROW * p.bone
    draw_ribs(canvas, rng, p, cortex, marrow)
    depth = p.depth * p.at(CAGE["depth"])
    # Sternum, or the manubrium, which is wider.
    half = p.at((26, 24, 17, 16, 15, 9)) * p.width
    center = (p.shift * 0.5, -0.97 * depth - 9)
    shape = blob(rng, center, (half, 6.0), 0, 0.03)
    canvas.fill(shape, cortex * 0.8)
    canvas.fill(np.array(center) + (shape - center) * [1 - 2.2 / half, 0.55], marrow * 0.8)
    draw_vertebra(canvas, rng, p, cortex, marrow)
    if p.level < 0.62:
        draw_scapulae(canvas, rng, p, cortex, marrow)


def draw_ribs(canvas: Canvas, rng: np.random.Generator, p: Patient, cortex: float, marrow: float) -> None:
    """Each rib slopes down from back to front, so a slice cuts five to seven of them a side as oblique sections."""
    for side in (0, 180):
        phase, step = rng.uniform(0, 1), rng.uniform(22, 27)
        for k in range(7):
            angle = 82 - (k + phase) * step + rng.normal(0, 1.5)
            if angle < -72:
                continue
            span = rng.uniform(5.5, 10.5) * (1.25 if angle > 40 else 1.0)
            arc = np.radians(np.linspace(angle - span, angle + span, 9))
            arc = np.pi - arc if side else arc
            slope = np.linspace(-1, 1, 9) * rng.uniform(-1.2, 1.2)
            middle = cage_outline(p, 6.3 + slope, arc % (2 * math.pi))
            thick = rng.uniform(8.0, 10.5)
            # In front the ribs turn to cartilage.
            bony = float(np.interp(angle, (-72, -48), (0.15, 1)))
            canvas.fill(band(middle, thick), bony * cortex + (1 - bony) * 90)
            canvas.fill(band(middle, thick - 4.0), bony * marrow + (1 - bony) * 90)


def draw_vertebra(canvas: Canvas, rng: np.random.Generator, p: Patient, cortex: float, marrow: float) -> None:
    """Body, pedicles, canal, transverse processes and spinous process."""
    size = p.width * p.at((0.92, 0.95, 1.0, 1.03, 1.08, 1.12))
    x, y = p.shift * 0.4, 0.64 * p.depth * p.at(CAGE["depth"])

    def place(points: list[tuple[float, float]]) -> np.ndarray:
        return np.array(points) * size + (x, y)

    for side in (-1, 1):
        canvas.fill(
            place([(side * 12, 8), (side * 15, 20), (side * 11, 32), (0, 36), (0, 30), (side * 7, 14)]), cortex * 0.75
        )
        process = place([(side * 12, 22), (side * 24, 25), (side * (36 + rng.normal(0, 2)), 30)])
        canvas.fill(band(process, 9 * size), cortex * 0.8)
        canvas.fill(band(process, 4.5 * size), marrow)
        canvas.fill(blob(rng, tuple(place([(side * 23, 12)])[0]), (9, 5), side * 0.7, 0.05), cortex * 0.7)  # rib head
    if rng.random() < 0.75:
        canvas.fill(band(place([(0, 33), (rng.normal(0, 1), 46), (rng.normal(0, 2), 60)]), 6 * size), cortex * 0.75)
    body = blob(rng, (x, y), (17.5 * size, 14.5 * size), 0, 0.02)
    canvas.fill(body, cortex * 0.85)
    canvas.fill((x, y) + (body - (x, y)) * 0.88, marrow, soft=0.8)
    canvas.fill(blob(rng, tuple(place([(0, 22)])[0]), (9 * size, 7.5 * size), 0, 0.03), 25)
    canvas.fill(blob(rng, tuple(place([(0, 22)])[0]), (4.5 * size, 3.5 * size), 0, 0.03), 45)


def draw_scapulae(canvas: Canvas, rng: np.random.Generator, p: Patient, cortex: float, marrow: float) -> None:
    """Thin blades behind and beside the ribs, with the spine of the scapula higher up."""
    gap = 12 + 12 * (1 - p.level)
    for mirror in (False, True):
        first, last = (20 - 40 * (0.6 - p.level) + rng.normal(0, 4)), 20 + 26 * (0.75 - p.level) + rng.normal(0, 3)
        arc = np.radians(np.linspace(first, last, 7))
        arc = (np.pi - arc if mirror else arc) % (2 * math.pi)
        blade = cage_outline(p, gap + np.array([6, 4, 2, 0, 0, 1, 3]) * rng.uniform(0.5, 1.5), arc)
        canvas.fill(band(blade, rng.uniform(4.5, 7)), cortex * 0.85)
        canvas.fill(band(blade, 2.2), marrow)
        if p.level < 0.3:
            out = blade[2] * (1 + rng.uniform(0.10, 0.16))
            spine = np.stack([blade[4], (blade[3] + out) / 2, out])
            canvas.fill(band(spine, 6.0), cortex * 0.8)
