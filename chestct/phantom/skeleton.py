"""Bones of the thorax: ribs in oblique cross-section, sternum, vertebra, scapulae.

Every bone is cortex with the marrow inside it, hung on the rib cage of the patient it belongs to.
"""

from collections.abc import Iterator

import numpy as np

from chestct.phantom.anatomy import CAGE_DEPTH, Patient
from chestct.phantom.canvas import Shape, blob

CORTEX, MARROW = 720.0, 220.0
"""Hounsfield units of bone of average density."""


def skeleton(rng: np.random.Generator, p: Patient) -> Iterator[Shape]:
    """All bones that a slice at the patient's level cuts."""
    cortex, marrow = CORTEX * p.bone, MARROW * p.bone
    yield from _ribs(rng, p, cortex, marrow)
    half = p.at((26, 24, 17, 16, 15, 9)) * p.width  # sternum, or the manubrium, which is wider
    center = np.array([p.shift * 0.5, -0.97 * p.depth * p.at(CAGE_DEPTH) - 9])
    sternum = blob(rng, center, (half, 6.0), 0, 0.03)
    yield Shape(sternum, cortex * 0.8)
    yield Shape(center + (sternum - center) * [1 - 2.2 / half, 0.55], marrow * 0.8)
    yield from _vertebra(rng, p, cortex, marrow)
    if p.level < 0.62:
        yield from _scapulae(rng, p, cortex, marrow)


def _ribs(rng: np.random.Generator, p: Patient, cortex: float, marrow: float) -> Iterator[Shape]:
    """Each rib slopes down from back to front, so a slice cuts five to seven of them a side as oblique sections."""
    for side in (-1, 1):
        phase, step = rng.uniform(0, 1), rng.uniform(22, 27)
        for k in range(7):
            angle = 82 - (k + phase) * step + rng.normal(0, 1.5)
            if angle < -72:
                continue
            span = rng.uniform(5.5, 10.5) * (1.25 if angle > 40 else 1.0)
            arc = np.radians(np.linspace(angle - span, angle + span, 16))
            slope = np.linspace(-1, 1, 16) * rng.uniform(-1.2, 1.2)
            thick = rng.uniform(7.5, 10.0) * np.sin(np.linspace(0.35, np.pi - 0.35, 16)) ** 0.5 / 2
            bony = float(np.interp(angle, (-72, -48), (0.15, 1)))  # in front the ribs turn to cartilage
            arc = arc if side > 0 else np.pi - arc
            for half, hu in ((thick, cortex), (thick - 2.0, marrow)):
                inner, outer = (p.outline(6.3 + slope + sign * np.maximum(half, 0), arc) for sign in (-1, 1))
                yield Shape(np.vstack([inner, outer[::-1]]), bony * hu + (1 - bony) * 90)


def _vertebra(rng: np.random.Generator, p: Patient, cortex: float, marrow: float) -> Iterator[Shape]:
    """Body, pedicles, canal, transverse processes and spinous process."""
    size = p.width * p.at((0.92, 0.95, 1.0, 1.03, 1.08, 1.12))
    middle = np.array([p.shift * 0.4, 0.64 * p.depth * p.at(CAGE_DEPTH)])

    def place(*points: tuple[float, float]) -> np.ndarray:
        return np.array(points) * size + middle

    for side in (-1, 1):
        arch = place((side * 12, 8), (side * 15, 20), (side * 11, 32), (0, 36), (0, 30), (side * 7, 14))
        yield Shape(arch, cortex * 0.75)
        process = place((side * 12, 22), (side * 24, 25), (side * (36 + rng.normal(0, 2)), 30))
        yield Shape(process, cortex * 0.8, 8 * size)
        yield Shape(process, marrow, 4 * size)
    if rng.random() < 0.75:
        yield Shape(place((0, 33), (rng.normal(0, 1), 46), (rng.normal(0, 2), 60)), cortex * 0.75, 5 * size)
    vertebral_body = blob(rng, middle, (17.5 * size, 14.5 * size), 0, 0.02)
    yield Shape(vertebral_body, cortex * 0.85)
    yield Shape(middle + (vertebral_body - middle) * 0.88, marrow)
    for radii, hu in (((9, 7.5), 25), ((4.5, 3.5), 45)):  # canal and cord
        yield Shape(blob(rng, place((0, 22))[0], (radii[0] * size, radii[1] * size), 0, 0.03), hu)


def _scapulae(rng: np.random.Generator, p: Patient, cortex: float, marrow: float) -> Iterator[Shape]:
    """Thin blades behind the ribs and at their sides."""
    for mirrored in (False, True):
        first, last = (20 - 40 * (0.6 - p.level) + rng.normal(0, 4)), 20 + 26 * (0.75 - p.level) + rng.normal(0, 3)
        arc = np.radians(np.linspace(first, last, 7))
        bend = np.array([6, 4, 2, 0, 0, 1, 3]) * rng.uniform(0.5, 1.5)
        blade = p.outline(12 + 12 * (1 - p.level) + bend, np.pi - arc if mirrored else arc)
        yield Shape(blade, cortex * 0.85, rng.uniform(4, 6))
        yield Shape(blade, marrow, 2.0)
