"""The thorax's soft parts without the lungs' contents: body wall, mediastinum, organs under the diaphragm.

Shapes are tables over the axial level (0: thoracic inlet, 1: liver dome), read off typical CT atlases in millimetres
for an average adult and interpolated between: one set of numbers then gives every level, and each patient varies it.
"""

import math
from dataclasses import dataclass

import numpy as np

from chestct.phantom.canvas import Canvas, band, blob, closed_curve

FAT, MUSCLE, SKIN, LIVER, AIR = -105.0, 50.0, 10.0, 60.0, -1000.0
"""Hounsfield units."""

ANGLES = np.linspace(0, 2 * math.pi, 160, endpoint=False)
"""Directions, in radians, at which the cage and the body wall are tabulated: 0 is the patient's left, pi/2 the back."""

LEVELS = (0.0, 0.2, 0.38, 0.52, 0.75, 1.0)
"""Axial levels of the tables: inlet, aortic arch, carina, hilum, four chambers, liver dome."""

CAGE = {"width": (98, 122, 130, 134, 139, 140), "depth": (68, 82, 90, 95, 100, 102)}
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
    """What varies between people and scans; lengths in millimetres, HU where named so."""

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


def sample_patient(rng: np.random.Generator) -> Patient:
    """A random person at a random level."""
    female = rng.random() < 0.5
    build = rng.normal(0.96 if female else 1.03, 0.06)
    level, width, depth = rng.uniform(0.08, 0.94), build * rng.normal(1, 0.04), build * rng.normal(1, 0.07)
    half_axes = [size * np.interp(level, LEVELS, CAGE[name]) for size, name in ((width, "width"), (depth, "depth"))]
    return Patient(
        level=level,
        width=width,
        depth=depth,
        cage=cage_radius(rng, *half_axes),
        fat=float(np.clip(rng.gamma(3.0, 4.0), 4, 28)),
        muscle=rng.uniform(0.7, 1.0) if female else rng.uniform(0.85, 1.3),
        breast=rng.gamma(3.0, 7.0) if female else 0.0,
        blood=42.0 if rng.random() < 0.45 else rng.uniform(110, 280),
        bone=rng.uniform(0.75, 1.2),
        borders=rng.normal(1, 0.07, (2, len(BORDER_Y))),
        shift=rng.normal(0, 3.0),
    )


def cage_radius(rng: np.random.Generator, half_width: float, half_depth: float) -> np.ndarray:
    """Distance in millimetres from the middle of the rib cage to its inner surface at ANGLES."""
    cos, sin = np.cos(ANGLES), np.sin(ANGLES)
    # Narrower in front than behind, as a thorax is; behind, the lungs bulge on either side of the spine.
    across = half_width * (1 + 0.09 * sin + rng.normal(0, 0.02) * cos)
    along = half_depth * np.where(sin > 0, 1.0, 0.97)
    corner = rng.uniform(2.0, 2.35)
    radius = (np.abs(cos / across) ** corner + np.abs(sin / along) ** corner) ** (-1 / corner)
    radius *= 1 + 0.06 * (bump(ANGLES, 56, 17) + bump(ANGLES, 124, 17)) - 0.04 * bump(ANGLES, 90, 12)
    for k in range(2, 6):
        radius *= 1 + rng.normal(0, 0.012) * np.cos(k * ANGLES) + rng.normal(0, 0.012) * np.sin(k * ANGLES)
    return radius


def cage_outline(p: Patient, offset: np.ndarray | float = 0.0, angles: np.ndarray = ANGLES) -> np.ndarray:
    """The rib cage's inner surface, pushed outwards by `offset`: [N, 2] in millimetres, one point an angle."""
    radius = p.cage if angles is ANGLES else np.interp(angles, ANGLES, p.cage, period=2 * math.pi)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * (radius + offset)[:, None]


def bump(theta: np.ndarray, center: float, width: float) -> np.ndarray:
    """A smooth bump of height 1 around an angle, both in degrees."""
    gap = (np.degrees(theta) - center + 180) % 360 - 180
    return np.exp(-0.5 * (gap / width) ** 2)


def wall_thickness(p: Patient) -> tuple[np.ndarray, np.ndarray]:
    """Millimetres from the cage's inner surface to the outside of the muscles, and to the skin, at ANGLES."""
    theta = ANGLES
    upper = (1 - p.level) ** 1.5
    sides = bump(theta, 15, 28) + bump(theta, 165, 28)
    front = bump(theta, -55, 20) + bump(theta, -125, 20)
    shoulder = bump(theta, 42, 22) + bump(theta, 138, 22)
    back = bump(theta, 72, 14) + bump(theta, 108, 14) + 0.5 * bump(theta, 90, 12)
    muscle = 13 + p.muscle * (
        sides * (6 + 42 * upper) + front * (3 + 14 * upper) + shoulder * (9 + 26 * upper) + back * (20 + 6 * upper)
    )
    fat = p.fat * (0.8 + 0.4 * sides - 0.35 * bump(theta, -90, 16) - 0.15 * np.sin(theta))
    in_breast = bump(np.array([p.level * 180]), 105, 33)[0]
    fat = fat + p.breast * in_breast * (bump(theta, -50, 17) + bump(theta, -130, 17))
    return muscle, muscle + np.maximum(fat, 2.5)


def draw_body(canvas: Canvas, rng: np.random.Generator, p: Patient) -> None:
    """Skin, fat with its septa, muscles and what lies inside the cage as one piece of fat."""
    muscle, skin = wall_thickness(p)
    outer = cage_outline(p, skin)
    # The back lies flat on the table.
    rest = outer[:, 1].max() * rng.uniform(0.9, 0.97)
    flat = flatten(outer, rest)
    draw_table(canvas, rng, rest + rng.uniform(1, 10))
    canvas.fill(flat, SKIN)
    canvas.fill(flat * (1 - 2.2 / np.hypot(*flat.T))[:, None], FAT + rng.normal(0, 6))
    if p.breast > 8:
        draw_glands(canvas, rng, p, muscle, skin)
    canvas.fill(flatten(cage_outline(p, muscle), rest - max(3.0, 0.3 * p.fat)), MUSCLE + rng.normal(0, 6))
    # Fat planes between the muscles of the shoulder girdle and the chest wall.
    for side in (-90, 90):
        for share in (0.45, 0.7):
            arc = np.radians(np.linspace(-90 + side * 0.25, -90 + side * rng.uniform(1.2, 1.7), 8)) % (2 * math.pi)
            depth = np.interp(arc, ANGLES, muscle, period=2 * math.pi)
            plane = cage_outline(p, 11 + share * (depth - 11) + rng.normal(0, 1, 8), arc)
            canvas.fill(band(plane, rng.uniform(1.0, 2.8)), FAT, alpha=0.8)
    canvas.fill(cage_outline(p, 1.5), FAT)


def flatten(outline: np.ndarray, rest: float) -> np.ndarray:
    """The outline with whatever lies behind y = rest pressed flat, with rounded corners."""
    x, y = outline.T
    return np.stack([x, rest - 5 * np.logaddexp(0, (rest - y) / 5)], 1)


def draw_glands(canvas: Canvas, rng: np.random.Generator, p: Patient, muscle: np.ndarray, skin: np.ndarray) -> None:
    """Strands of glandular tissue in the breasts."""
    depth = (muscle + skin) / 2
    inside = canvas.cover(cage_outline(p, skin - 4)) - canvas.cover(cage_outline(p, muscle))
    density = rng.uniform(0, 0.5)
    for center in (-50, -130):
        for _ in range(rng.integers(4, 12)):
            angle = math.radians(center + rng.normal(0, 9)) % (2 * math.pi)
            middle = cage_outline(p, np.interp(angle, ANGLES, depth) + rng.normal(2, 4), np.array([angle]))[0]
            strand = blob(
                rng, (middle[0], middle[1]), (rng.uniform(3, 11), rng.uniform(1.5, 4)), rng.uniform(0, 3), 0.2
            )
            canvas.fill(strand, 25, alpha=density, soft=1.5, within=np.maximum(inside, 0))


def draw_table(canvas: Canvas, rng: np.random.Generator, top: float) -> None:
    """The couch's two carbon-fibre shells and what lies on it."""
    half, gap, bend = rng.uniform(190, 230), rng.uniform(18, 45), rng.uniform(300, 900)
    x = np.linspace(-half, half, 17)
    for lift in (0.0, gap):
        shell = np.stack([x, top + lift - (x**2) / (2 * bend) * (1 - lift / 200)], 1)
        canvas.fill(band(shell, rng.uniform(2.0, 4.0)), rng.uniform(-400, 0))
    if rng.random() < 0.6:
        canvas.fill(band(np.stack([x, top - 5 - (x**2) / (2 * bend)], 1), 7), rng.uniform(-960, -880), alpha=0.9)


def mediastinum_outline(p: Patient) -> np.ndarray:
    """The border between mediastinum and lungs, spine included: [N, 2] in millimetres."""
    y = np.array(BORDER_Y) * p.depth * p.at(CAGE["depth"])
    columns = (*zip(*RIGHT_BORDER, strict=True), *zip(*LEFT_BORDER, strict=True))
    right, left = np.reshape([p.at(c) for c in columns], (2, len(BORDER_Y))) * p.borders * p.width
    down = np.stack([left + p.shift, y], 1)
    up = np.stack([-right + p.shift, y], 1)[::-1]
    return closed_curve(np.vstack([down, up]), 160)


def draw_mediastinum(canvas: Canvas, rng: np.random.Generator, p: Patient) -> None:
    """Heart, great vessels, airways and oesophagus; the fat between them is already there."""
    z, blood = p.level, p.blood
    unit = p.width

    def ellipse(x: float, y: float, rx: float, ry: float, hu: float, angle: float = 0.0, soft: float = 0.6) -> None:
        x, y = x + rng.normal(0, 1.2) + p.shift, y + rng.normal(0, 1.2)
        rx, ry = rx * rng.normal(1, 0.06), ry * rng.normal(1, 0.06)
        canvas.fill(blob(rng, (x * unit, y * p.depth), (rx * unit, ry * unit), angle, 0.025), hu, soft=soft)

    def vessel(x: float, y: float, rx: float, ry: float, angle: float = 0.0, share: float = 1.0) -> None:
        ellipse(x, y, rx, ry, MUSCLE - 8 + share * (blood - 42) + rng.normal(0, 5), angle)

    if z < 0.16:
        for x, y, r in ((-22, -30, 9), (20, -32, 8), (-16, -10, 7), (11, -8, 5), (26, 4, 6), (-4, -34, 5)):
            vessel(x, y, r, r * rng.uniform(0.85, 1.2))
        ellipse(-20, 2, 8, 11, 80)  # thyroid's lower pole, lymphatic tissue
        ellipse(20, -4, 7, 10, 80)
    if 0.16 <= z < 0.3:
        vessel(14, 2, 15, 42, math.radians(-32))
        vessel(-26, -18, 9, 10, share=1.2)
        ellipse(-2, -40, 14, 7, 0)  # thymic remnant
    if z >= 0.3:
        if z < 0.85:
            vessel(-10 + 6 * z, -34 + 20 * (z - 0.3), 17, 16)
        vessel(26 - 6 * (z - 0.3), 36, 12.5, 12.5)
    if 0.3 <= z < 0.66:
        vessel(-29, -14, 8.5, 9.5, share=1.3)
    if 0.42 <= z < 0.64:
        vessel(19, -30, 14, 16, math.radians(25), share=1.1)
        vessel(-14, -2, 32, 9, math.radians(-12), share=1.1)
        vessel(34, 0, 11, 13, share=1.1)
    if z >= 0.6:
        draw_heart(canvas, rng, p)
    if z >= 0.8:
        ellipse(-20, 4, 12, 11, LIVER + 0.5 * (blood - 42))  # inferior vena cava
    draw_airways(canvas, rng, p)


def draw_heart(canvas: Canvas, rng: np.random.Generator, p: Patient) -> None:
    """Myocardium with four chambers that show only in enhanced blood."""
    grow = float(np.interp(p.level, (0.6, 0.72, 0.9, 1.0), (0.7, 1.0, 1.0, 0.85))) * p.width
    tilt = math.radians(rng.normal(28, 6))
    x, y = 20 + p.shift, -26 * p.depth
    inside = canvas.cover(closed_curve((mediastinum_outline(p)[::4] - (x, y)) * 0.965 + (x, y)))
    muscle = MUSCLE - 5 + 0.3 * (p.blood - 42)
    canvas.fill(blob(rng, (x, y), (70 * grow, 58 * grow), tilt, 0.03), muscle, soft=1.2, within=inside)
    for dx, dy, rx, ry, share in (
        (26, 8, 24, 17, 0.9),
        (-2, -22, 27, 14, 1.0),
        (-4, 26, 24, 14, 0.95),
        (-36, -2, 16, 22, 1.05),
    ):
        chamber = blob(rng, (x + dx * grow, y + dy * grow), (rx * grow, ry * grow), tilt, 0.06)
        canvas.fill(chamber, 42 + share * (p.blood - 42), alpha=0.8, soft=3.0, within=inside)


def draw_airways(canvas: Canvas, rng: np.random.Generator, p: Patient) -> None:
    """Trachea above the carina, main bronchi below, and the oesophagus behind."""
    z, unit = p.level, p.width
    if z < 0.37:
        tubes = [(rng.normal(-1, 2), 8 + 14 * z, rng.uniform(7.5, 9.5), rng.uniform(7.5, 9.5), 0.0)]
    elif z < 0.43:
        tubes = [(-1.0, 13.0, rng.uniform(14, 18), 8.0, 0.0)]
    elif z < 0.62:
        out = (z - 0.43) * 90
        tubes = [(-16 - out, 15, 6.5, 6.5, 0.0), (17 + out, 18, 7.5, 5.5, 0.3)]
    else:
        tubes = []
    for x, y, rx, ry, angle in tubes:
        lumen = blob(rng, ((x + p.shift) * unit, y * p.depth), (rx, ry), angle, 0.03)
        middle = lumen.mean(0)
        canvas.fill(middle + (lumen - middle) * (1 + 1.8 / rx), MUSCLE - 10)
        canvas.fill(lumen, AIR, soft=0.4)
    place = (7 + p.shift + rng.normal(0, 2), p.depth * float(np.interp(z, (0, 0.4, 1), (30, 34, 42))))
    canvas.fill(blob(rng, place, (8, 5.5), 0.2, 0.08), MUSCLE - 8)
    if rng.random() < 0.35:
        canvas.fill(blob(rng, place, (2.5, 1.5), 0, 0.1), -800)


def draw_abdomen(canvas: Canvas, rng: np.random.Generator, p: Patient, inside: np.ndarray) -> np.ndarray:
    """Domes of the diaphragm with what lies under them; returns their coverage, float32 [H, W] in [0, 1].

    inside: coverage of the lungs before, which the domes rise into.
    """
    top = {-1: rng.normal(0.84, 0.03), 1: rng.normal(0.91, 0.03)}
    total = np.zeros_like(canvas.hu)
    for side, start in top.items():
        rise = p.level - start
        if rise <= 0:
            continue
        # A dome's section is the half of the cage it hangs in, shrunk: a disc near its top, all but a rim below.
        arc = np.radians(np.linspace(-80, 72, 9))
        wall = cage_outline(p, -3.0, (arc if side > 0 else np.pi - arc) % (2 * math.pi))
        middle = np.array([side * 66.0 * p.width, -6.0])
        half = closed_curve(np.vstack([wall, [side * 28.0 * p.width, 10.0]]))
        share = min(0.96, 0.28 + 2.6 * rise**0.7)
        round_ = half - middle
        round_ *= (np.hypot(*round_.T).mean() / np.hypot(*round_.T))[:, None] ** (1 - share)
        dome = canvas.cover(middle + share * round_, soft=2.0)
        organ = LIVER + 0.35 * (p.blood - 42) if side < 0 else 45 + 0.2 * (p.blood - 42)
        canvas.blend(dome * inside, organ)
        total = np.maximum(total, dome)
    return total
