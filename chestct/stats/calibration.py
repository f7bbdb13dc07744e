"""From logits to calibrated scores, thresholds and conformal sets: fitted on validation slices, then frozen.

Serving imports this module, so everything but the fitting needs NumPy alone. Calibration keeps the order of scores.
"""

import math
from dataclasses import dataclass

import numpy as np

from chestct.errors import DataError

SCALES = (0.05, 20.0)  # bounds of 1/T for subtype models


@dataclass(frozen=True)
class Calibration:
    """Platt scaling of one logit, sigmoid(scale * logit + shift), or temperature scaling of several (scale = 1/T)."""

    scale: float = 1.0
    shift: float = 0.0

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """P(class) from logits float [N, 1] (P(cancer)) or [N, K]; float64 of the same shape, in [0, 1]."""
        return to_scores(self.scale * logits.astype(np.float64) + self.shift)


def to_scores(logits: np.ndarray) -> np.ndarray:
    """P(class) from logits [N, 1] (sigmoid) or [N, K] (softmax), float64 of the same shape."""
    logits = logits.astype(np.float64)
    if logits.shape[1] == 1:
        return 0.5 * (1 + np.tanh(logits / 2))  # the sigmoid, without overflow
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def fit_calibration(logits: np.ndarray, targets: np.ndarray) -> Calibration:
    """The calibration of least log loss on validation slices: Platt scaling (Platt 1999) or a temperature (Guo 2017).

    logits: float [N, 1] or [N, K]; targets: int [N], index of the class (one logit: 1 is cancer). Targets are smoothed
    as Platt does: a class with n slices aims at (n + 1) / (n + K) for itself and 1 / (n + K) for each other, so that a
    validation split without an error gives finite parameters. The scale is positive. Raises DataError without slices.
    """
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    if not len(targets):
        raise DataError("Calibration needs validation slices, and there are none.")
    logits = logits.astype(np.float64)
    center, spread = 0.0, 1.0
    bounds: list[tuple[float | None, float | None]] = [SCALES, (0.0, 0.0)]
    shifted = np.zeros(logits.shape[1])
    if logits.shape[1] == 1:
        center, spread = float(logits.mean()), float(logits.std()) or 1.0  # well conditioned in any units
        bounds = [(1e-3, None), (None, None)]
        shifted = np.array([0.0, 1.0])
        logits = np.hstack([np.zeros_like(logits), (logits - center) / spread])  # softmax of (0, l) is sigmoid(l)
    classes = logits.shape[1]
    counts = np.bincount(targets, minlength=classes)[targets, None]
    aims = (np.eye(classes)[targets] * counts + 1) / (counts + classes)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        log_scores = log_softmax(parameters[0] * logits + parameters[1] * shifted, axis=1)
        slope = (np.exp(log_scores) - aims) / len(targets)
        gradient = np.array([(slope * logits).sum(), (slope @ shifted).sum()])
        return -float((aims * log_scores).sum()) / len(targets), gradient

    options = {"ftol": 1e-14, "gtol": 1e-9}
    best = minimize(loss, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    return Calibration(float(best[0] / spread), float(best[1] - best[0] * center / spread))


def choose_threshold(
    scores: np.ndarray, targets: np.ndarray, policy: str, cost_ratio: float = 1.0, weights: np.ndarray | None = None
) -> float:
    """The score from which a slice counts as cancer (score >= threshold), chosen on validation slices.

    scores: float [N] in [0, 1], P(cancer); targets: int [N] in {0, 1}; weights: float [N] >= 0, how much a slice counts
    within its class, one if left out. Candidates lie midway between neighbouring scores, below the lowest and above the
    highest. policy: youden (most sensitivity + specificity), sensitivity>=X (most specificity at that), specificity>=X
    (the reverse), cost (least cost_ratio * missed cancers + false alarms, at the shares of classes that validation has)
    or half (0.5, whatever the scores). Between equals the lower threshold wins; with specificity>=X the higher. Raises
    DataError if validation lacks a class, except with half.
    """
    from sklearn.metrics import roc_curve

    kind, _, share = policy.partition(">=")
    kind, least = kind.strip(), float(share or 0)
    if kind == "half":
        return 0.5
    cancers, normals = int(targets.sum()), int((1 - targets).sum())
    if not cancers or not normals:
        raise DataError(
            f"Validation has {cancers} cancer and {normals} normal slices; a threshold by {policy} needs both. Use "
            "another split, or evaluation.threshold=half."
        )
    curve = roc_curve(targets, scores, sample_weight=weights, drop_intermediate=False)
    false_alarms, sensitivity, levels = (values[::-1] for values in curve)
    specificity = 1 - false_alarms
    worth = {
        "youden": sensitivity + specificity,
        "cost": -(cost_ratio * cancers * (1 - sensitivity) + normals * false_alarms),
        "sensitivity": np.where(sensitivity >= least - 1e-12, specificity, -1.0),
        "specificity": np.where(specificity >= least - 1e-12, sensitivity, -1.0),
    }[kind]
    best = np.flatnonzero(worth >= worth.max() - 1e-12)
    edges = np.concatenate([[0.0], levels[:-1], [np.nextafter(1.0, 2.0)]])
    middle = (edges[:-1] + edges[1:]) / 2
    thresholds = np.where(middle > edges[:-1], middle, edges[1:])  # neighbours in floating point have no middle
    return float(thresholds[best[-1] if kind == "specificity" else best[0]])


def fit_conformal(scores: np.ndarray, targets: np.ndarray, coverage: float) -> list[float]:
    """Quantile of 1 - P(true class) for each class: split conformal prediction, class-conditional (Vovk 2012).

    scores: float [N, K] over all classes (binary: 1 - p and p); targets: int [N]; coverage in (0, 1). The quantile is
    the ceil((n + 1) * coverage)-th smallest of the n validation slices of its class; where n is too small it is 1, and
    the class is never excluded. Sets hold the true class with that probability as far as new slices are exchangeable
    with validation slices, which those of large groups are only roughly.
    """
    quantiles = []
    for k in range(scores.shape[1]):
        misfit = np.sort(1 - scores[targets == k, k])
        rank = int(np.ceil((len(misfit) + 1) * coverage - 1e-9))  # 10 * 0.9 is to be 9
        quantiles.append(float(misfit[rank - 1]) if rank <= len(misfit) else 1.0)
    return quantiles


def wilson(k: float, n: float) -> tuple[float, float]:
    """95 % score interval of a share k / n (Wilson 1927), n > 0; unlike SciPy's, of numbers that are not whole, too."""
    p, z = min(max(k / n, 0.0), 1.0), 1.959963984540054
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return (0.0 if p == 0 else center - half), (1.0 if p == 1 else center + half)


def calibration_bins(scores: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each score in [0, 1], int [N] in 0..bins-1, of equal width and closed on the right."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], scores, side="left")


def reliability_table(scores: np.ndarray, targets: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """The reliability diagram: for each bin that holds slices its mean score, the share of targets that are 1 with
    Wilson's interval (slices count as independent), and the slices: {"score", "observed", "n", "low", "high"}.
    """
    index = calibration_bins(scores, bins)
    rows = []
    for b in np.unique(index):
        n, k = int((index == b).sum()), float(targets[index == b].sum())
        low, high = wilson(k, n)
        rows.append({"score": float(scores[index == b].mean()), "observed": k / n, "n": n, "low": low, "high": high})
    return rows
