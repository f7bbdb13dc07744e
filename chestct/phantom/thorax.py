"""Draws one synthetic axial slice of a thorax in Hounsfield units, with the mask of its lesion.

The anatomy, the lesion and the noise take separate random streams: a normal and a cancer slice drawn from one seed
differ in the lesion alone, and nothing else in a slice can tell its class.
"""

import math
from dataclasses import dataclass
from itertools import chain

import numpy as np
from scipy.ndimage import gaussian_filter

from chestct.config.schema import SUBTYPES, PhantomConfig
from chestct.phantom import anatomy, lesions
from chestct.phantom.canvas import Canvas, smooth_noise
from chestct.phantom.lungs import draw_lungs
from chestct.phantom.skeleton import skeleton

PADDING = -2000.0
"""HU that scanners write outside their circular field of view."""


@dataclass
class Phantom:
    """A drawn slice.

    hu: float32 [H, W], Hounsfield units (PADDING outside a circular field of view); mask: bool [H, W], the lesion,
    all False for normal; lung: bool [H, W], both lungs with vessels and lesion; spacing: millimetres a pixel;
    level: 0 thoracic inlet to 1 liver dome; window: (centre, width) in HU for display.
    """

    hu: np.ndarray
    mask: np.ndarray
    lung: np.ndarray
    subtype: str
    spacing: float
    level: float
    window: tuple[float, float]


def draw(rng: np.random.Generator, subtype: str, cfg: PhantomConfig) -> Phantom:
    """A random slice of the subtype; the same generator state gives the same slice.

    Raises ValueError if the subtype is not one of chestct.config.schema.SUBTYPES.
    """
    if subtype not in SUBTYPES:
        raise ValueError(f"subtype must be one of {SUBTYPES}, got {subtype!r}")
    scan_rng, body_rng, lung_rng, lesion_rng, noise_rng = rng.spawn(5)
    window = _sample_window(scan_rng)
    patient = anatomy.sample_patient(body_rng)
    canvas = _sample_canvas(scan_rng, patient, cfg.size)
    organs = list(anatomy.domes(body_rng, patient))
    shapes = (anatomy.body(body_rng, patient), anatomy.mediastinum(body_rng, patient), organs)
    around = canvas.paint(chain(*shapes, skeleton(body_rng, patient)), anatomy.AIR)
    lung = canvas.cover(patient.outline(-2.0))
    for outline in (anatomy.mediastinum_outline(patient), *(organ.points for organ in organs)):
        lung = lung * (1 - canvas.cover(outline))
    draw_lungs(canvas, lung_rng, patient, lung, cfg.difficulty)
    mask = np.zeros(lung.shape, bool)
    if subtype != "normal":
        mask = lesions.plant(canvas, lesion_rng, patient, lung, subtype, cfg.difficulty)
    hu = _scan(around + lung * (canvas.hu - around), noise_rng)
    return Phantom(hu, mask, lung > 0.5, subtype, 1 / canvas.scale, patient.level, window)


def _sample_window(rng: np.random.Generator) -> tuple[float, float]:
    """Centre and width in HU: mostly lung windows, some wide ones, a few that lean towards soft tissue."""
    kind = rng.random()
    if kind < 0.82:
        return float(rng.normal(-600, 30)), float(rng.normal(1500, 80))
    if kind < 0.96:
        return float(rng.normal(-250, 80)), float(rng.normal(2000, 150))
    return float(rng.normal(-100, 60)), float(rng.normal(1000, 100))


def _sample_canvas(rng: np.random.Generator, patient: anatomy.Patient, size: int) -> Canvas:
    """An empty slice with a random number of pixels, field of view and pose."""
    side = size * rng.uniform(0.82, 1.18)
    # Some are square as the scanner made them, most cropped to the patient as in published collections.
    aspect = 1.0 if rng.random() < 0.4 else rng.uniform(1.2, 1.45)
    width, height = round(side * math.sqrt(aspect)), round(side / math.sqrt(aspect))
    _, skin = anatomy.wall_thickness(patient)
    body = np.abs(patient.outline(skin)).max(0)
    margin = rng.uniform(0.95, 1.08)
    scale = float(min(width / (2 * body[0]), height / (2 * body[1] + 12)) / margin)
    center = (width / 2 + rng.normal(0, 0.015) * width, height / 2 + rng.normal(0, 0.015) * height)
    return Canvas(np.zeros((height, width), np.float32), center, scale, math.radians(rng.normal(0, 3.5)))


def _scan(hu: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What the scanner adds: blur, correlated noise, faint streaks, a circular field of view."""
    shape = hu.shape
    hu = gaussian_filter(hu, rng.uniform(0.35, 0.75))
    grain = rng.standard_normal(shape, dtype=np.float32)
    # Filtered back projection leaves noise poor in low frequencies (Riederer, Pelc & Chesler 1978): a band-pass.
    fine = rng.uniform(0.5, 0.9)
    noise = gaussian_filter(grain, fine) - 0.8 * gaussian_filter(grain, 2.5 * fine)
    hu += noise * ((34 * rng.beta(2, 3.5) + 6) / noise.std())
    if rng.random() < 0.35:
        # Photon starvation across the shoulders smears noise along the long axis of the body.
        hu += smooth_noise(rng, shape, 2, 40) * np.float32(rng.uniform(4, 22)) * (hu > -950)
    if rng.random() < 0.25:
        rows, columns = np.ogrid[: shape[0], : shape[1]]
        reach = max(shape) / 2 * rng.uniform(0.98, 1.05)
        hu[np.hypot(rows - shape[0] / 2, columns - shape[1] / 2) > reach] = PADDING
    return np.maximum(hu, PADDING)


def display(hu: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Window Hounsfield units for display: uint8 [H, W]. window: (centre, width) in HU."""
    center, width = window
    return np.round(np.clip((hu - center) / width + 0.5, 0, 1) * 255).astype(np.uint8)
