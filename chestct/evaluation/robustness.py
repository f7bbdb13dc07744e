"""How much the score depends on what should not matter: noise, blur, compression, grey levels, resolution, position.

Every change is a pure function of a uint8 square and a strength, with three strengths that go from hardly visible to
hard to bear; the model scores the changed slices again, and its answers are compared slice by slice.
"""

import io
from collections.abc import Callable

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from chestct.stats.metrics import auroc

Change = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
"""(uint8 [S, S], strength, random stream) -> levels [S, S], not rounded"""


def _jpeg(image: np.ndarray, quality: float, _: np.random.Generator) -> np.ndarray:
    with io.BytesIO() as file:
        Image.fromarray(image).save(file, "JPEG", quality=int(quality))
        return np.asarray(Image.open(file).convert("L"))


def _rotation(image: np.ndarray, degrees: float, rng: np.random.Generator) -> np.ndarray:
    """Either way at random, with black corners."""
    return np.asarray(Image.fromarray(image).rotate(degrees * rng.choice((-1, 1)), Image.Resampling.BILINEAR))


def _rescale(image: np.ndarray, share: float, _: np.random.Generator) -> np.ndarray:
    """Down to a share of the resolution and up again."""
    small = max(1, round(share * len(image)))
    picture = Image.fromarray(image).resize((small, small), Image.Resampling.BILINEAR)
    return np.asarray(picture.resize(image.shape[::-1], Image.Resampling.BILINEAR))


PERTURBATIONS: dict[str, tuple[str, tuple[float, float, float], Change]] = {
    "noise": ("sd / grey range", (0.02, 0.05, 0.10), lambda x, s, rng: x + 255 * s * rng.standard_normal(x.shape)),
    "blur": ("sd / side", (0.005, 0.01, 0.02), lambda x, s, _: ndimage.gaussian_filter(x.astype(float), s * len(x))),
    "jpeg": ("JPEG quality", (50, 20, 5), _jpeg),
    "brighter": ("shift / grey range", (0.05, 0.10, 0.20), lambda x, s, _: x + 255 * s),
    "less contrast": ("factor", (0.9, 0.75, 0.5), lambda x, s, _: (x - 127.5) * s + 127.5),
    "gamma": ("exponent", (1.1, 1.3, 1.8), lambda x, s, _: 255 * (x / 255) ** s),
    "rescale": ("share of the resolution left", (0.75, 0.5, 0.25), _rescale),
    "rotation": ("degrees", (3, 8, 15), _rotation),
}
"""Name -> what its strengths count, three strengths, the change."""


def changed(name: str, image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The changed square, uint8 [S, S]: levels are rounded, and saturate."""
    return np.clip(np.rint(PERTURBATIONS[name][2](image, strength, rng)), 0, 255).astype(np.uint8)


def robustness(
    score_of: Callable[[np.ndarray], np.ndarray], images: np.ndarray, targets: np.ndarray, threshold: float
) -> pd.DataFrame:
    """One row for the slices as they are ("none"), and one a perturbation and strength.

    score_of: P(cancer) float [N] of uint8 [N, S, S]; images: uint8 [N, S, S]; targets: int [N], cancer 1; threshold:
    score from which a slice counts as cancer. Columns: perturbation, strength, unit, auroc (NaN with one class),
    score_change (mean absolute), flipped (share of decisions that change).
    """
    plain = score_of(images)
    rows = []
    levels = [(name, unit, strength) for name, (unit, strengths, _) in PERTURBATIONS.items() for strength in strengths]
    for name, unit, strength in [("none", "", 0.0), *levels]:
        scores = plain
        if name != "none":
            # Each slice has its own stream, so that a row does not depend on which others were computed.
            streams = [np.random.default_rng([0, i]) for i in range(len(images))]
            squares = [changed(name, image, strength, rng) for image, rng in zip(images, streams, strict=True)]
            scores = score_of(np.stack(squares))
        change = np.abs(scores - plain).mean()
        flipped = ((scores >= threshold) != (plain >= threshold)).mean()
        rows.append((name, strength, unit, auroc(scores, targets)[0], change, flipped))
    columns = ["perturbation", "strength", "unit", "auroc", "score_change", "flipped"]
    return pd.DataFrame(rows, columns=columns)
