"""How much the score depends on what should not matter: noise, blur, compression, grey levels, size and position.

Every change is a pure function of a uint8 square and a strength, with three strengths that go from hardly visible to
hard to bear; the model scores the changed slices again, and its answers are compared slice by slice.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score

Change = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
"""(uint8 [S, S], strength, random stream) -> levels [S, S]"""


@dataclass(frozen=True)
class Perturbation:
    """One kind of change; unit says what its strengths count."""

    name: str
    strengths: tuple[float, float, float]
    unit: str
    levels: Change

    def change(self, image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
        """The changed square, uint8 [S, S]: levels are rounded, and saturate."""
        return np.clip(np.rint(self.levels(image, strength, rng)), 0, 255).astype(np.uint8)


def _noise(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return image + 255 * strength * rng.standard_normal(image.shape)


def _blur(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return ndimage.gaussian_filter(image.astype(float), strength * len(image))


def _jpeg(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    with io.BytesIO() as file:
        Image.fromarray(image).save(file, "JPEG", quality=int(strength))
        return np.asarray(Image.open(file).convert("L"))


def _brightness(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return image + 255 * strength


def _contrast(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return (image - 127.5) * strength + 127.5


def _window(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Darkest and brightest levels are clipped, as a narrower CT window around the same centre would."""
    return (image - 127.5) / (1 - strength) + 127.5


def _gamma(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return 255 * (image / 255) ** strength


def _rescale(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Down to a fraction of the resolution and up again."""
    small = max(1, round(strength * len(image)))
    picture = Image.fromarray(image).resize((small, small), Image.Resampling.BILINEAR)
    return np.asarray(picture.resize(image.shape[::-1], Image.Resampling.BILINEAR))


def _crop(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A margin cut off on every side, and the rest enlarged."""
    margin, side = strength * len(image), len(image)
    box = (margin, margin, side - margin, side - margin)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR, box=box))


def _rotation(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Either way at random, with black corners."""
    return np.asarray(Image.fromarray(image).rotate(strength * rng.choice((-1, 1)), Image.Resampling.BILINEAR))


PERTURBATIONS = (
    Perturbation("noise", (0.02, 0.05, 0.10), "standard deviation / grey range", _noise),
    Perturbation("blur", (0.005, 0.01, 0.02), "standard deviation / side", _blur),
    Perturbation("jpeg", (50, 20, 5), "JPEG quality", _jpeg),
    Perturbation("brighter", (0.05, 0.10, 0.20), "shift / grey range", _brightness),
    Perturbation("darker", (-0.05, -0.10, -0.20), "shift / grey range", _brightness),
    Perturbation("less contrast", (0.9, 0.75, 0.5), "factor", _contrast),
    Perturbation("narrower window", (0.1, 0.25, 0.5), "share of the window's width lost", _window),
    Perturbation("gamma", (1.1, 1.3, 1.8), "exponent", _gamma),
    Perturbation("rescale", (0.75, 0.5, 0.25), "share of the resolution left", _rescale),
    Perturbation("crop", (0.02, 0.05, 0.10), "margin / side", _crop),
    Perturbation("rotation", (3, 8, 15), "degrees", _rotation),
)


def robustness(
    score_of: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    targets: np.ndarray,
    threshold: float = 0.5,
    seed: int = 0,
) -> pd.DataFrame:
    """One row for the slices as they are, and one a perturbation and strength.

    score_of: P(cancer) float [N] in [0, 1] of uint8 [N, S, S]; images: uint8 [N, S, S]; targets: int [N], cancer 1;
    threshold: score from which a slice counts as cancer. Columns: perturbation ("none" in the first row), level (1-3,
    0 for none), strength, unit, auroc (None with one class), auroc_change, score_change (mean absolute), flipped
    (share of decisions that change), slices.
    """
    plain = np.asarray(score_of(images), float)
    both = len(np.unique(targets)) == 2

    def row(name: str, level: int, strength: float, unit: str, scores: np.ndarray) -> dict[str, object]:
        auroc, before = (float(roc_auc_score(targets, s)) if both else math.nan for s in (scores, plain))
        return {
            "perturbation": name,
            "level": level,
            "strength": strength,
            "unit": unit,
            "auroc": auroc if both else None,
            "auroc_change": auroc - before if both else None,
            "score_change": float(np.abs(scores - plain).mean()),
            "flipped": float(((scores >= threshold) != (plain >= threshold)).mean()),
            "slices": len(scores),
        }

    rows = [row("none", 0, 0.0, "", plain)]
    for kind in PERTURBATIONS:
        for level, strength in enumerate(kind.strengths, 1):
            # Each slice has its own stream, so that a row does not depend on which others were computed.
            streams = [np.random.default_rng([seed, i]) for i in range(len(images))]
            changed = np.stack([kind.change(image, strength, rng) for image, rng in zip(images, streams, strict=True)])
            rows.append(row(kind.name, level, strength, kind.unit, np.asarray(score_of(changed), float)))
    return pd.DataFrame(rows)
