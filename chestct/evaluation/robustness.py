"""How much the score depends on what should not matter: noise, blur, compression, grey levels, size and position.

Every change is a pure function of a uint8 square and a strength, with three strengths that go from hardly visible to
hard to bear; the model is asked again about the changed slices, and its answers are compared slice by slice.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score

Change = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
"""(uint8 [S, S], strength, random stream) -> uint8 [S, S]"""


@dataclass(frozen=True)
class Perturbation:
    """One kind of change; unit says what its strengths count."""

    name: str
    strengths: tuple[float, float, float]
    unit: str
    change: Change


def _to_levels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def noise(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return _to_levels(image + 255 * strength * rng.standard_normal(image.shape))


def blur(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return _to_levels(ndimage.gaussian_filter(image.astype(float), strength * len(image)))


def jpeg(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    with io.BytesIO() as file:
        Image.fromarray(image).save(file, "JPEG", quality=int(strength))
        return np.asarray(Image.open(file).convert("L"))


def brightness(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return _to_levels(image.astype(float) + 255 * strength)


def contrast(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return _to_levels((image.astype(float) - 127.5) * strength + 127.5)


def window(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Darkest and brightest levels are clipped, as a narrower CT window around the same centre would."""
    return _to_levels((image.astype(float) - 127.5) / (1 - strength) + 127.5)


def gamma(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return _to_levels(255 * (image / 255) ** strength)


def rescale(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Down to a fraction of the resolution and up again."""
    small = max(1, round(strength * len(image)))
    picture = Image.fromarray(image).resize((small, small), Image.Resampling.BILINEAR)
    return np.asarray(picture.resize(image.shape[::-1], Image.Resampling.BILINEAR))


def crop(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A margin cut off on every side, and the rest enlarged."""
    margin, side = strength * len(image), len(image)
    box = (margin, margin, side - margin, side - margin)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR, box=box))


def rotation(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Either way at random, with black corners."""
    angle = strength * rng.choice((-1, 1))
    return np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR))


PERTURBATIONS = (
    Perturbation("noise", (0.02, 0.05, 0.10), "standard deviation / grey range", noise),
    Perturbation("blur", (0.005, 0.01, 0.02), "standard deviation / side", blur),
    Perturbation("jpeg", (50, 20, 5), "JPEG quality", jpeg),
    Perturbation("brighter", (0.05, 0.10, 0.20), "shift / grey range", brightness),
    Perturbation("darker", (-0.05, -0.10, -0.20), "shift / grey range", brightness),
    Perturbation("less contrast", (0.9, 0.75, 0.5), "factor", contrast),
    Perturbation("narrower window", (0.1, 0.25, 0.5), "share of the window's width lost", window),
    Perturbation("gamma", (1.1, 1.3, 1.8), "exponent", gamma),
    Perturbation("rescale", (0.75, 0.5, 0.25), "share of the resolution left", rescale),
    Perturbation("crop", (0.02, 0.05, 0.10), "margin / side", crop),
    Perturbation("rotation", (3, 8, 15), "degrees", rotation),
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
    rows = [_row("none", 0, 0.0, "", plain, plain, targets, threshold)]
    for kind in PERTURBATIONS:
        for level, strength in enumerate(kind.strengths, 1):
            # Each slice has its own stream, so that a row does not depend on which others were computed.
            streams = [np.random.default_rng([seed, i]) for i in range(len(images))]
            pairs = zip(images, streams, strict=True)
            changed = np.stack([kind.change(image, strength, rng) for image, rng in pairs])
            scores = np.asarray(score_of(changed), float)
            rows.append(_row(kind.name, level, strength, kind.unit, scores, plain, targets, threshold))
    return pd.DataFrame(rows)


def _row(
    name: str,
    level: int,
    strength: float,
    unit: str,
    scores: np.ndarray,
    plain: np.ndarray,
    targets: np.ndarray,
    threshold: float,
) -> dict[str, object]:
    auroc, before = _auroc(targets, scores), _auroc(targets, plain)
    return {
        "perturbation": name,
        "level": level,
        "strength": strength,
        "unit": unit,
        "auroc": auroc,
        "auroc_change": None if auroc is None or before is None else auroc - before,
        "score_change": float(np.abs(scores - plain).mean()),
        "flipped": float(((scores >= threshold) != (plain >= threshold)).mean()),
        "slices": len(scores),
    }


def _auroc(targets: np.ndarray, scores: np.ndarray) -> float | None:
    return float(roc_auc_score(targets, scores)) if len(np.unique(targets)) == 2 else None
