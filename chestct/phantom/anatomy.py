"""The thorax around the lungs: body wall, mediastinum, organs under the diaphragm.

Shapes are tables over the axial level (0: thoracic inlet, 1: liver dome), read off typical CT atlases in millimetres
for an average adult and interpolated between: one set of numbers then gives every level, and each patient varies it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from chestct.phantom.canvas import Shape, blob, closed_curve

FAT, MUSCLE, LIVER, AIR = -105.0, 50.0, 60.0, -1000.0
"""Hounsfield units."""

ANGLES = np.linspace(0, 2 * math.pi, 160, endpoint=False)
"""Directions, in radians, at which the cage and the body wall are tabulated: 0 is the patient's left, pi/2 the back."""

LEVELS = (0.0, 0.2, 0.38, 0.52, 0.75, 1.0)
"""Axial levels of the tables: inlet, aortic arch, carina, hilum, four chambers, liver dome."""

CAGE_WIDTH, CAGE_DEPTH = (98, 122, 130, 134, 139, 140), (68, 82, 90, 95, 100, 102)
"""Half axes of the rib cage's inner surface."""

BORDER_Y = (-1.08, -0.8, -0.5, -0.2, 0.1, 0.35, 0.6, 0.85, 1.1)
"""Heights of the mediastinal border, as fractions of the cage's depth; negative is anterior."""

RIGHT_BORDER = (
    (26, 27, 31, 33, 30, 24, 20, 23, 40),
    (9, 7, 24, 31, 28, 18, 18, 22, 42),
    (5, 3, 24, 37, 31, 18, 18, 22, 42),
    (5, 3, 22, 42, 38, 17, 18, 22, 42),
    (8, 18, 42, 51, 40, 14, 18, 22, 44),
    (13, 24, 40, 46, 32, 14, 18, 22, 44),
)
LEFT_BORDER = (
    (26, 27, 33, 35, 31, 25, 21, 23, 40),
    (9, 7, 22, 37, 45, 42, 24, 23, 42),
    (6, 5, 28, 38, 39, 42, 25, 23, 42),
    (7, 8, 36, 44, 42, 40, 26, 23, 42),
    (12, 44, 75, 86, 74, 38, 25, 23, 44),
    (20, 58, 82, 87, 62, 35, 25, 23, 44),
)
"""Half widths of the mediastinum with the spine, one row a level, one column a height."""


@dataclass
class Patient:
    """What varies between people and scans: sizes as factors, `cage` (radius at ANGLES), `fat`, `breast` and `shift`
    in millimetres, `blood` in HU, `level` in [0, 1]."""

    level: float
    width: float
    depth: float
    cage: np.ndarray
    fat: float
    muscle: float
    breast: float
    blood: float
    bone: float
    borders: np.ndarray
    shift: float

    def at(self, table: tuple[float, ...]) -> float:
        """The table's value at this patient's level."""
        return float(np.interp(self.level, LEVELS, table))

    def outline(self, offset: np.ndarray | float = 0.0, angles: np.ndarray = ANGLES) -> np.ndarray:
        """The rib cage's inner surface, pushed outwards by `offset` mm: [N, 2] in millimetres, one point an angle."""
        radius = np.interp(angles % (2 * math.pi), ANGLES, self.cage, period=2 * math.pi)
        return np.stack([np.cos(angles), np.sin(angles)], 1) * (radius + offset)[:, None]


def sample_patient(rng: np.random.Generator) -> Patient:
    """A random person at a random level."""
    female = rng.random() < 0.5
    build = rng.normal(0.96 if female else 1.03, 0.06)
    level, width, depth = rng.uniform(0.08, 0.94), build * rng.normal(1, 0.04), build * rng.normal(1, 0.07)
    return Patient(
        level=level,
        width=width,
        depth=depth,
        cage=_cage(rng, width * np.interp(level, LEVELS, CAGE_WIDTH), depth * np.interp(level, LEVELS, CAGE_DEPTH)),
        fat=float(np.clip(rng.gamma(3.0, 4.0), 4, 28)),
        muscle=rng.uniform(0.7, 1.0) if female else rng.uniform(0.85, 1.3),
        breast=rng.gamma(3.0, 7.0) if female else 0.0,
        blood=42.0 if rng.random() < 0.45 else rng.uniform(110, 280),
        bone=rng.uniform(0.75, 1.2),
        borders=rng.normal(1, 0.07, (2, len(BORDER_Y))),
        shift=rng.normal(0, 3.0),
    )


def _cage(rng: np.random.Generator, half_width: float, half_depth: float) -> np.ndarray:
    cos, sin = np.cos(ANGLES), np.sin(ANGLES)
    # Narrower in front than behind, as a thorax is; behind, the lungs bulge on either side of the spine.
    across = half_width * (1 + 0.09 * sin + rng.normal(0, 0.02) * cos)
    along = half_depth * np.where(sin > 0, 1.0, 0.97)
    corner = rng.uniform(2.0, 2.35)
    radius = (np.abs(cos / across) ** corner + np.abs(sin / along) ** corner) ** (-1 / corner)
    radius *= 1 + 0.06 * (_bump(56, 17) + _bump(124, 17)) - 0.04 * _bump(90, 12)
    for k in range(2, 6):
        radius *= 1 + rng.normal(0, 0.012) * np.cos(k * ANGLES) + rng.normal(0, 0.012) * np.sin(k * ANGLES)
    return radius


def _bump(center: float, width: float) -> np.ndarray:
    """A smooth bump of height 1 around an angle in degrees, at ANGLES."""
    gap = (np.degrees(ANGLES) - center + 180) % 360 - 180
    return np.exp(-0.5 * (gap / width) ** 2)


def wall_thickness(p: Patient) -> tuple[np.ndarray, np.ndarray]:
    """Millimetres from the cage's inner surface to the outside of the muscles, and to the skin, at ANGLES."""
    upper = (1 - p.level) ** 1.5
    sides, front = _bump(15, 28) + _bump(165, 28), _bump(-55, 20) + _bump(-125, 20)
    shoulder = _bump(42, 22) + _bump(138, 22)
    back = _bump(72, 14) + _bump(108, 14) + 0.5 * _bump(90, 12)
    muscle = 13 + p.muscle * (
        sides * (6 + 42 * upper) + front * (3 + 14 * upper) + shoulder * (9 + 26 * upper) + back * (20 + 6 * upper)
    )
    fat = p.fat * (0.8 + 0.4 * sides - 0.35 * _bump(-90, 16) - 0.15 * np.sin(ANGLES))
    breast = p.breast * np.exp(-0.5 * ((p.level - 0.58) / 0.18) ** 2) * (_bump(-50, 17) + _bump(-130, 17))
    return muscle, muscle + np.maximum(fat + breast, 2.5)


def body(rng: np.random.Generator, p: Patient) -> Iterator[Shape]:
    """Couch, skin, fat, muscles with their fat planes, and what lies inside the cage as one piece of fat."""
    muscle, skin = wall_thickness(p)
    outer = p.outline(skin)
    rest = outer[:, 1].max() * rng.uniform(0.9, 0.97)  # the back lies flat on the couch
    half, bend, top = rng.uniform(190, 230), rng.uniform(300, 900), rest + rng.uniform(1, 10)
    x = np.linspace(-half, half, 33)
    for lift in (0.0, rng.uniform(18, 45)):
        shell = np.stack([x, top + lift - x**2 / (2 * bend) * (1 - lift / 200)], 1)
        yield Shape(shell, rng.uniform(-400, 0), rng.uniform(1.5, 3.0))
    flat = _flatten(outer, rest)
    yield Shape(flat, 10)
    yield Shape(flat * (1 - 2.2 / np.hypot(*flat.T))[:, None], FAT + rng.normal(0, 6))
    yield Shape(_flatten(p.outline(muscle), rest - max(3.0, 0.3 * p.fat)), MUSCLE + rng.normal(0, 6))
    for side in (-90, 90):
        for share in (0.45, 0.7):
            arc = np.radians(np.linspace(-90 + side * 0.25, -90 + side * rng.uniform(1.2, 1.7), 16))
            depth = np.interp(arc % (2 * math.pi), ANGLES, muscle)
            yield Shape(p.outline(11 + share * (depth - 11) + rng.normal(0, 1), arc), -70, rng.uniform(0.8, 2.2))
    yield Shape(p.outline(1.5), FAT)


def _flatten(outline: np.ndarray, rest: float) -> np.ndarray:
    """The outline with whatever lies behind y = rest pressed flat, with rounded corners."""
    x, y = outline.T
    return np.stack([x, rest - 5 * np.logaddexp(0, (rest - y) / 5)], 1)


def mediastinum_outline(p: Patient) -> np.ndarray:
    """The border between mediastinum and lungs, spine included: [N, 2] in millimetres."""
    y = np.array(BORDER_Y) * p.depth * p.at(CAGE_DEPTH)
    right, left = (
        np.array([p.at(column) for column in zip(*border, strict=True)]) * wobble * p.width
        for border, wobble in zip((RIGHT_BORDER, LEFT_BORDER), p.borders, strict=True)
    )
    return closed_curve(np.vstack([np.stack([left + p.shift, y], 1), np.stack([p.shift - right, y], 1)[::-1]]))


def mediastinum(rng: np.random.Generator, p: Patient) -> Iterator[Shape]:
    """Heart, great vessels, airways and oesophagus; what reaches over the border, the lungs cover."""
    z, blood = p.level, p.blood

    def organ(x: float, y: float, rx: float, ry: float, hu: float, angle: float = 0.0, wobble: float = 0.03) -> Shape:
        place = ((x + p.shift + rng.normal(0, 1.2)) * p.width, (y + rng.normal(0, 1.2)) * p.depth)
        return Shape(blob(rng, place, (rx * p.width, ry * p.width), math.radians(angle), wobble), hu)

    def vessel(x: float, y: float, rx: float, ry: float, angle: float = 0.0, share: float = 1.0) -> Shape:
        return organ(x, y, rx, ry, MUSCLE - 8 + share * (blood - 42) + rng.normal(0, 5), angle)

    if z < 0.16:  # neck vessels
        for x, y, r in ((-22, -30, 9), (20, -32, 8), (-16, -10, 7), (11, -8, 5), (26, 4, 6), (-4, -34, 5)):
            yield vessel(x, y, r, r * rng.uniform(0.85, 1.2))
    elif z < 0.3:  # aortic arch, superior vena cava
        yield vessel(14, 2, 15, 42, -32)
        yield vessel(-26, -18, 9, 10, share=1.2)
    else:  # ascending and descending aorta
        if z < 0.85:
            yield vessel(-10 + 6 * z, -34 + 20 * (z - 0.3), 17, 16)
        yield vessel(26 - 6 * (z - 0.3), 36, 12.5, 12.5)
    if 0.3 <= z < 0.66:
        yield vessel(-29, -14, 8.5, 9.5, share=1.3)
    if 0.42 <= z < 0.64:  # pulmonary trunk and its branches
        yield vessel(19, -30, 14, 16, 25, 1.1)
        yield vessel(-14, -2, 32, 9, -12, 1.1)
        yield vessel(34, 0, 11, 13, share=1.1)
    if z >= 0.6:  # myocardium, and four chambers that show only in enhanced blood
        grow, tilt = float(np.interp(z, (0.6, 0.72, 0.9, 1.0), (0.7, 1.0, 1.0, 0.85))), rng.normal(28, 6)
        yield organ(20, -26, 70 * grow, 58 * grow, MUSCLE - 5 + 0.3 * (blood - 42), tilt)
        for dx, dy, rx, ry in ((26, 8, 24, 17), (-2, -22, 27, 14), (-4, 26, 24, 14), (-36, -2, 16, 22)):
            chamber = organ(20 + dx * grow, -26 + dy * grow, rx * grow, ry * grow, 0, tilt, 0.06).points
            for size, share in ((1.0, 0.45), (0.92, 0.6), (0.84, 0.75)):  # blurred by its motion
                yield Shape(chamber.mean(0) + (chamber - chamber.mean(0)) * size, 42 + share * (blood - 42))
    if z >= 0.8:
        yield organ(-20, 4, 12, 11, LIVER + 0.5 * (blood - 42))  # inferior vena cava
    if z < 0.37:  # trachea, carina, main bronchi
        tubes = [(rng.normal(-1, 2), 8 + 14 * z, rng.uniform(7.5, 9.5), rng.uniform(7.5, 9.5))]
    elif z < 0.43:
        tubes = [(-1.0, 13.0, rng.uniform(14, 18), 8.0)]
    else:
        tubes = [(-16 - (z - 0.43) * 90, 15, 6.5, 6.5), (17 + (z - 0.43) * 90, 18, 7.5, 5.5)] if z < 0.62 else []
    for tube in tubes:
        lumen = organ(*tube, AIR).points
        yield Shape(lumen.mean(0) + (lumen - lumen.mean(0)) * (1 + 1.8 / tube[2]), MUSCLE - 10)
        yield Shape(lumen, AIR)
    back = float(np.interp(z, (0, 0.4, 1), (30, 34, 42)))  # oesophagus, now and then with air in it
    yield organ(7, back, 8, 5.5, MUSCLE - 8, 12, 0.08)
    if rng.random() < 0.35:
        yield organ(7, back, 2.5, 1.5, -800, 0, 0.1)


def domes(rng: np.random.Generator, p: Patient) -> Iterator[Shape]:
    """Domes of the diaphragm, filled with the organ under them, where the slice is low enough."""
    for side, start, hu in ((-1, 0.84, LIVER + 0.35 * (p.blood - 42)), (1, 0.91, 45.0 + 0.2 * (p.blood - 42))):
        rise = p.level - rng.normal(start, 0.03)
        if rise > 0:
            # A dome's section is the half of the cage it hangs in, shrunk: a disc near its top, all but a rim below.
            arc = np.radians(np.linspace(-80, 72, 9))
            wall = p.outline(-3.0, arc if side > 0 else np.pi - arc)
            middle = np.array([side * 66.0 * p.width, -6.0])
            half = closed_curve(np.vstack([wall, [side * 28.0 * p.width, 10.0]])) - middle
            share = min(0.96, 0.28 + 2.6 * rise**0.7)
            half *= (np.hypot(*half.T).mean() / np.hypot(*half.T))[:, None] ** (1 - share)
            yield Shape(middle + share * half, hu)
