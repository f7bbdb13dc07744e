"""Draws one synthetic axial slice of a thorax in Hounsfield units, with the mask of its lesion.

The anatomy, the lesion and the noise take separate random streams: a normal and a cancer slice drawn from one seed
differ in the lesion alone, and nothing else in a slice can tell its class.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from chestct.config.schema import PhantomConfig
from chestct.phantom import anatomy
from chestct.phantom.canvas import Canvas, smooth_noise
from chestct.phantom.lungs import draw_lungs, plant

PADDING = -2000.0  # HU that scanners write outside their circular field of view

WINDOWS = ((0.82, -600, 30, 1500, 80), (0.14, -250, 80, 2000, 150), (0.04, -100, 60, 1000, 100))
"""Lung windows, wide ones and soft ones: how often, centre and its spread, width and its spread, in HU."""


@dataclass
class Phantom:
    """A drawn slice.

    hu: float32 [H, W], Hounsfield units (PADDING outside a circular field of view); mask: bool [H, W], the lesion,
    all False for normal; lung: bool [H, W], both lungs with vessels and lesion; spacing: millimetres a pixel;
    window: (centre, width) in HU for display.
    """

    hu: np.ndarray
    mask: np.ndarray
    lung: np.ndarray
    spacing: float
    window: tuple[float, float]


def draw(rng: np.random.Generator, subtype: str, cfg: PhantomConfig) -> Phantom:
    """A random slice of one of SUBTYPES; the same generator state gives the same slice."""
    scan_rng, body_rng, lung_rng, lesion_rng, noise_rng = rng.spawn(5)
    patient = anatomy.Patient(body_rng)
    canvas = _sample_canvas(scan_rng, patient, cfg.size)
    organs = list(anatomy.domes(body_rng, patient))
    parts = (part(body_rng, patient) for part in (anatomy.body, anatomy.mediastinum, anatomy.skeleton))
    around = canvas.paint([*(shape for part in parts for shape in part), *organs], anatomy.AIR)
    lung = canvas.cover(patient.outline(-2.0))
    for outline in (anatomy.mediastinum_outline(patient), *(organ.points for organ in organs)):
        lung = lung * (1 - canvas.cover(outline))
    draw_lungs(canvas, lung_rng, patient, lung, cfg.difficulty)
    mask = np.zeros(lung.shape, bool)
    if subtype != "normal":
        mask = plant(canvas, lesion_rng, patient, lung, subtype, cfg.difficulty)
    hu = _scan(around + lung * (canvas.hu - around), noise_rng)
    _, center, center_sd, width, width_sd = WINDOWS[scan_rng.choice(3, p=[window[0] for window in WINDOWS])]
    window = float(scan_rng.normal(center, center_sd)), float(scan_rng.normal(width, width_sd))
    return Phantom(hu, mask, lung > 0.5, 1 / canvas.scale, window)


def _sample_canvas(rng: np.random.Generator, patient: anatomy.Patient, size: int) -> Canvas:
    """An empty slice with a random number of pixels, field of view and pose."""
    side = size * rng.uniform(0.82, 1.18)
    # Some are square as the scanner made them, most cropped to the patient as in published collections.
    aspect = math.sqrt(1.0 if rng.random() < 0.4 else rng.uniform(1.2, 1.45))
    width, height = round(side * aspect), round(side / aspect)
    x, y = np.abs(patient.outline(patient.skin)).max(0)
    scale = min(width / (2 * x), height / (2 * y + 12)) / rng.uniform(0.95, 1.08)
    center = rng.normal(0.5, 0.015, 2) * (width, height)
    return Canvas(np.zeros((height, width), np.float32), center, float(scale), math.radians(rng.normal(0, 3.5)))


def _scan(hu: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What the scanner adds: blur, correlated noise, faint streaks, a circular field of view."""
    hu = gaussian_filter(hu, rng.uniform(0.35, 0.75))
    grain = rng.standard_normal(hu.shape, dtype=np.float32)
    # Filtered back projection leaves noise poor in low frequencies (Riederer, Pelc & Chesler 1978): a band-pass.
    fine = rng.uniform(0.5, 0.9)
    noise = gaussian_filter(grain, fine) - 0.8 * gaussian_filter(grain, 2.5 * fine)
    hu += noise * ((34 * rng.beta(2, 3.5) + 6) / noise.std())
    if rng.random() < 0.35:  # photon starvation across the shoulders smears noise along the long axis of the body
        hu += smooth_noise(rng, hu.shape, 2, 40) * np.float32(rng.uniform(4, 22)) * (hu > -950)
    if rng.random() < 0.25:
        rows, columns = np.indices(hu.shape) - np.reshape(hu.shape, (2, 1, 1)) / 2
        hu[np.hypot(rows, columns) > max(hu.shape) / 2 * rng.uniform(0.98, 1.05)] = PADDING
    return np.maximum(hu, PADDING)


def display(hu: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Window Hounsfield units for display: uint8 [H, W]. window: (centre, width) in HU."""
    center, width = window
    return np.round(np.clip((hu - center) / width + 0.5, 0, 1) * 255).astype(np.uint8)
