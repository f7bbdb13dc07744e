"""The thorax around the lungs: body wall, mediastinum, organs under the diaphragm, bones.

Shapes are tables over the axial level (0: thoracic inlet, 1: liver dome), read off typical CT atlases in millimetres
for an average adult and interpolated between: one set of numbers then gives every level, and each patient varies it.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator, make_interp_spline
from scipy.ndimage import gaussian_filter1d

from chestct.phantom.canvas import Shape, blob, scaled, toward

FAT, MUSCLE, BLOOD, LIVER, AIR, CORTEX, MARROW = -105.0, 50.0, 42.0, 60.0, -1000.0, 720.0, 220.0
"""Hounsfield units; bone of average density."""

ANGLES = np.linspace(0, 2 * math.pi, 160, endpoint=False)
"""Directions, in radians, at which the cage and the body wall are tabulated: 0 is the patient's left, pi/2 the back."""

LEVELS = (0.2, 0.45, 0.72, 1.0)  # axial levels of the tables: aortic arch, hilum, four chambers, liver dome
CAGE_WIDTH, CAGE_DEPTH = (122, 132, 138, 140), (82, 92, 99, 102)  # half axes of the rib cage's inner surface

BORDER_Y = (-1.08, -0.8, -0.5, -0.2, 0.1, 0.35, 0.6, 0.85, 1.1)
"""Heights of the mediastinal border, as fractions of the cage's depth; negative is anterior."""

BORDER_X = (
    ((9, 7, 22, 37, 45, 42, 24, 23, 42), (-9, -7, -24, -31, -28, -18, -18, -22, -42)),
    ((6, 6, 32, 41, 40, 41, 25, 23, 42), (-5, -3, -23, -40, -35, -18, -18, -22, -42)),
    ((11, 39, 70, 81, 70, 38, 25, 23, 44), (-8, -16, -40, -50, -40, -14, -18, -22, -44)),
    ((20, 58, 82, 87, 62, 35, 25, 23, 44), (-13, -24, -40, -46, -32, -14, -18, -22, -44)),
)
"""Left and right border of mediastinum and spine, one row a level, one column a height."""

ORGANS = (
    (0.60, 1.00, 20, -26, 66, 54, 28, 0.3),  # heart, and four chambers that show only in enhanced blood
    (0.60, 1.00, 46, -18, 24, 17, 28, 0.6),
    (0.60, 1.00, 18, -48, 27, 14, 28, 0.6),
    (0.60, 1.00, 16, 0, 24, 14, 28, 0.6),
    (0.60, 1.00, -16, -28, 16, 22, 28, 0.6),
    (0.00, 0.30, 14, 2, 15, 42, -32, 1.0),  # aortic arch
    (0.00, 0.66, -28, -15, 8.5, 9.5, 0, 1.25),  # superior vena cava
    (0.30, 0.70, -7, -31, 17, 16, 0, 1.0),  # ascending aorta
    (0.30, 1.00, 24, 36, 12.5, 12.5, 0, 1.0),  # descending aorta
    (0.42, 0.64, 19, -30, 14, 16, 25, 1.1),  # pulmonary trunk and its branches
    (0.42, 0.64, -14, -2, 32, 9, -12, 1.1),
    (0.42, 0.64, 34, 0, 11, 13, 0, 1.1),
    (0.80, 1.00, -20, 4, 12, 11, 0, 0.6),  # inferior vena cava
    (0.00, 1.00, 7, 36, 8, 5.5, 12, 0.0),  # oesophagus
    (0.00, 0.37, -1, 11, 8.5, 8.5, 0, AIR),  # trachea, carina, main bronchi
    (0.37, 0.43, -1, 13, 16, 8, 0, AIR),
    (0.43, 0.52, -20, 15, 6.5, 6.5, 0, AIR),
    (0.43, 0.52, 21, 18, 7.5, 5.5, 0, AIR),
    (0.52, 0.62, -28, 15, 6, 6, 0, AIR),
    (0.52, 0.62, 29, 18, 6, 5.5, 0, AIR),
)
"""First and last level, place (x, y), half axes, turn in degrees, and the share of the contrast medium, or AIR."""


def bumps(center: float, width: float) -> np.ndarray:
    """A smooth bump of height 1 around an angle in degrees and another on the body's other side, at ANGLES."""
    gaps = ((np.degrees(ANGLES) - middle + 180) % 360 - 180 for middle in (center, 180 - center))
    return np.sum([np.exp(-0.5 * (gap / width) ** 2) for gap in gaps], axis=0)


class Patient:
    """A random person at a random level: what varies between people and scans."""

    def __init__(self, rng: np.random.Generator) -> None:
        female = rng.random() < 0.5
        build = rng.normal(0.96 if female else 1.03, 0.06)
        self.level = rng.uniform(0.12, 0.94)
        self.width, self.depth = build * rng.normal(1, 0.04), build * rng.normal(1, 0.07)  # factors
        self.contrast = 0.0 if rng.random() < 0.45 else rng.uniform(70, 240)  # of blood, in HU
        self.bone = rng.uniform(0.75, 1.2)
        self.shift = rng.normal(0, 3.0)  # of the mediastinum, in mm
        self.borders = rng.normal(1, 0.07, (2, len(BORDER_Y)))

        cos, sin = np.cos(ANGLES), np.sin(ANGLES)
        # Narrower in front than behind, as a thorax is; behind, the lungs bulge on either side of the spine.
        across = self.width * self.at(CAGE_WIDTH) * (1 + 0.09 * sin + rng.normal(0, 0.02) * cos)
        corner = rng.uniform(2.0, 2.35)
        cage = np.abs(cos / across) ** corner + np.abs(sin / (self.depth * self.at(CAGE_DEPTH))) ** corner
        waves = np.cos(np.outer(np.arange(2, 6), ANGLES) + rng.uniform(0, 2 * math.pi, (4, 1)))
        bulge = 1 + 0.06 * bumps(56, 17) - 0.02 * bumps(90, 12) + rng.normal(0, 0.016, 4) @ waves
        self.cage = bulge * cage ** (-1 / corner)  # mm at ANGLES

        upper, stature = (1 - self.level) ** 1.5, rng.uniform(0.7, 1.0) if female else rng.uniform(0.85, 1.3)
        sides, front, shoulder = bumps(15, 28), bumps(-55, 20), bumps(42, 22)
        back = (bumps(72, 14) + 0.25 * bumps(90, 12)) * (20 + 6 * upper)
        thick = sides * (6 + 42 * upper) + front * (3 + 14 * upper) + shoulder * (9 + 26 * upper) + back
        self.muscle = 13 + stature * thick  # mm from the cage to the outside of the muscles, at ANGLES
        self.fat = float(np.clip(rng.gamma(3.0, 4.0), 4, 28))
        fat = self.fat * (0.8 + 0.4 * sides - 0.18 * bumps(-90, 16) - 0.15 * sin)
        if female:
            fat += rng.gamma(3.0, 7.0) * math.exp(-0.5 * ((self.level - 0.58) / 0.18) ** 2) * bumps(-50, 17)
        self.skin = self.muscle + np.maximum(fat, 2.5)

    def at(self, table: Sequence[Any]) -> Any:
        """The row of a table at this patient's level."""
        return make_interp_spline(LEVELS, table, k=1)(max(self.level, LEVELS[0]))

    def outline(self, offset: np.ndarray | float = 0.0, angles: np.ndarray = ANGLES) -> np.ndarray:
        """The rib cage's inner surface, pushed outwards by `offset` mm: [N, 2] in millimetres, one point an angle."""
        return toward(angles, np.interp(angles, ANGLES, self.cage, period=2 * math.pi) + offset)


def body(rng: np.random.Generator, p: Patient) -> Iterator[Shape]:
    """Couch, skin, fat, muscles, and what lies inside the cage as one piece of fat."""
    outer = p.outline(p.skin)
    rest = outer[:, 1].max() * rng.uniform(0.9, 0.97)  # the back lies flat on the couch
    x = np.linspace(-1, 1, 33) * rng.uniform(190, 230)
    top = rest + rng.uniform(1, 10) - x**2 / rng.uniform(600, 1800)
    for lift in (0.0, rng.uniform(18, 45)):
        yield Shape(np.stack([x, top + lift], 1), rng.uniform(-400, 0), rng.uniform(1.5, 3.0))
    muscle = p.outline(p.muscle)
    for outline, back, hu in (
        (outer, rest, 10),
        (p.outline(p.skin - 2.2), rest - 2.2, FAT + rng.normal(0, 6)),
        (muscle, rest - max(3.0, 0.3 * p.fat), MUSCLE + rng.normal(0, 6)),
    ):  # whatever lies further back is pressed flat, with rounded corners
        yield Shape(np.stack([outline[:, 0], back - 5 * np.logaddexp(0, (back - outline[:, 1]) / 5)], 1), hu)
    yield Shape(p.outline(1.5), FAT)


def mediastinum_outline(p: Patient) -> np.ndarray:
    """The border between mediastinum and lungs, spine included: [N, 2] in millimetres."""
    y = np.linspace(BORDER_Y[0], BORDER_Y[-1], 60)
    left, right = PchipInterpolator(BORDER_Y, p.at(BORDER_X) * p.borders, axis=1)(y) * p.width + p.shift
    y *= p.depth * p.at(CAGE_DEPTH)
    return np.vstack([np.stack([left, y], 1), np.stack([right, y], 1)[::-1]])


def mediastinum(rng: np.random.Generator, p: Patient) -> Iterator[Shape]:
    """Heart, great vessels, airways and oesophagus; what reaches over the border, the lungs cover."""
    for low, high, x, y, rx, ry, turn, share in ORGANS:
        if low <= p.level < high:
            size, (dx, dy) = rng.uniform(0.9, 1.1) * p.width, rng.normal(0, 1.2, 2)
            place = ((x + p.shift + dx) * p.width, (y + dy) * p.depth)
            outline = blob(rng, place, (rx * size, ry * size), math.radians(turn + rng.normal(0, 4)), 0.035)
            if share == AIR:
                yield Shape(scaled(outline, 1 + 1.8 / rx), MUSCLE - 10)
                yield Shape(outline, AIR)
            else:
                yield Shape(outline, BLOOD + share * p.contrast + rng.normal(0, 4))


def domes(rng: np.random.Generator, p: Patient) -> Iterator[Shape]:
    """Domes of the diaphragm, filled with the organ under them, where the slice is low enough."""
    for side, start, hu in ((-1, 0.84, LIVER + 0.35 * p.contrast), (1, 0.91, 45.0 + 0.2 * p.contrast)):
        rise = p.level - rng.normal(start, 0.03)
        if rise > 0:
            # A dome's section is the half of the cage it hangs in, shrunk: a disc near its top, all but a rim below.
            middle, share = np.array([side * 66.0 * p.width, -6.0]), min(0.96, 0.28 + 2.6 * rise**0.7)
            x, y = p.outline(-3.0).T
            half = np.stack([side * np.maximum(side * x, 28.0 * p.width), y], 1) - middle
            half = gaussian_filter1d(half, 6, axis=0, mode="wrap")
            away = np.hypot(*half.T)
            yield Shape(middle + share * half * (away.mean() / away)[:, None] ** (1 - share), hu)


def skeleton(rng: np.random.Generator, p: Patient) -> Iterator[Shape]:
    """All bones that a slice at the patient's level cuts, each cortex with its marrow inside."""
    cortex, marrow = CORTEX * p.bone, MARROW * p.bone
    for side in (-1, 1):
        yield from _ribs(rng, p, side)
    half = p.at((24, 16, 15, 9)) * p.width  # sternum, or the manubrium, which is wider
    sternum = blob(rng, (p.shift * 0.5, -0.97 * p.depth * p.at(CAGE_DEPTH) - 9), (half, 6.0), 0, 0.03)
    yield Shape(sternum, cortex * 0.8)
    yield Shape(scaled(sternum, (1 - 2.2 / half, 0.55)), marrow * 0.8)

    size, middle = p.width * p.at((0.95, 1.0, 1.07, 1.12)), (p.shift * 0.4, 0.64 * p.depth * p.at(CAGE_DEPTH))
    half = np.array(
        [(12, 8), (15, 18), (25, 22), (rng.normal(37, 2), 27), (35, 33), (22, 30), (8, 36), (2, 60), (0, 62)]
    )
    arch = np.vstack([half, half[::-1] * (-1, 1)]) * size + middle  # with its transverse and spinous processes
    vertebral_body = blob(rng, middle, (17.5 * size, 14.5 * size), 0, 0.02)
    canal = blob(rng, np.array([0, 22]) * size + middle, (9 * size, 7.5 * size), 0, 0.03)
    yield from (Shape(arch, cortex * 0.75), Shape(scaled(arch, 0.75), marrow))
    yield from (Shape(vertebral_body, cortex * 0.85), Shape(scaled(vertebral_body, 0.88), marrow))
    yield from (Shape(canal, 25), Shape(scaled(canal, 0.5), 45))

    if p.level < 0.62:  # scapulae: thin blades behind the ribs and at their sides
        for mirrored in (False, True):
            arc = np.radians(np.linspace(-4 + 40 * p.level, 40 - 26 * p.level, 7) + rng.normal(0, 4))
            bend = 12 + 12 * (1 - p.level) + np.array([6, 4, 2, 0, 0, 1, 3]) * rng.uniform(0.5, 1.5)
            blade = p.outline(bend, np.pi - arc if mirrored else arc)
            yield from (Shape(blade, cortex * 0.85, rng.uniform(4, 6)), Shape(blade, marrow, 2.0))


def _ribs(rng: np.random.Generator, p: Patient, side: int) -> Iterator[Shape]:
    """Each rib slopes down from back to front, so a slice cuts five to seven of them a side as oblique sections."""
    for angle in np.arange(82 - rng.uniform(0, 25), -72, -rng.uniform(22, 27)):
        span = rng.uniform(5.5, 10.5) * (1.25 if angle > 40 else 1.0)
        arc = np.radians(np.linspace(angle - span, angle + span, 16))
        slope = np.linspace(-1, 1, 16) * rng.uniform(-1.2, 1.2)
        thick = rng.uniform(7.5, 10.0) * np.sin(np.linspace(0.35, np.pi - 0.35, 16)) ** 0.5 / 2
        bony = float(np.interp(angle, (-72, -48), (0.15, 1)))  # in front the ribs turn to cartilage
        for half, hu in ((thick, CORTEX), (np.maximum(thick - 2.0, 0), MARROW)):
            inner, outer = (p.outline(6.3 + slope + sign * half, arc if side > 0 else np.pi - arc) for sign in (-1, 1))
            yield Shape(np.vstack([inner, outer[::-1]]), bony * hu * p.bone + (1 - bony) * 90)
