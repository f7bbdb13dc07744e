"""From logits to calibrated scores, thresholds and conformal sets: fitted on validation slices, then frozen.

Serving imports this module, so everything but the fitting needs NumPy alone. Calibration has one parameter, or two
with a single logit, and keeps the order of scores: it can change no AUROC, and a small validation split can carry it.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from chestct.errors import ConfigError, DataError

SCALES = (0.05, 20.0)
"""Bounds of the scale 1/T of subtype models; a temperature outside means that something else is wrong."""


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
    validation split without an error gives finite parameters. The scale is always positive.
    Raises DataError without slices.
    """
    from scipy.optimize import minimize

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
        z = parameters[0] * logits + parameters[1] * shifted
        z -= z.max(1, keepdims=True)
        log_scores = z - np.log(np.exp(z).sum(1, keepdims=True))
        slope = np.exp(log_scores) - aims
        gradient = np.array([(slope * logits).sum(), (slope @ shifted).sum()])
        return -float((aims * log_scores).sum()) / len(targets), gradient / len(targets)

    options = {"ftol": 1e-14, "gtol": 1e-9}
    best = minimize(loss, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    return Calibration(float(best[0] / spread), float(best[1] - best[0] * center / spread))


def parse_policy(policy: str) -> tuple[str, float]:
    """A threshold policy as (kind, value): youden, cost and half have no value (0.0).

    Raises ConfigError for anything but youden, sensitivity>=X, specificity>=X (0 < X <= 1), cost and half.
    """
    if policy in ("youden", "cost", "half"):
        return policy, 0.0
    match = re.fullmatch(r"(sensitivity|specificity)\s*>=\s*(\d*\.?\d+)", policy.strip())
    if not match or not 0 < float(match[2]) <= 1:
        raise ConfigError(
            f"Unknown threshold policy '{policy}'. Use youden, sensitivity>=0.95, specificity>=0.95 (any share above "
            "0, at most 1), cost or half."
        )
    return match[1], float(match[2])


def choose_threshold(scores: np.ndarray, targets: np.ndarray, policy: str, cost_ratio: float = 1.0) -> float:
    """The score from which a slice counts as cancer (score >= threshold), chosen on validation slices.

    scores: float [N] in [0, 1], P(cancer); targets: int [N] in {0, 1}. Candidates lie midway between neighbouring
    scores, below the lowest and above the highest (there all, or none, are called cancer; slices of equal score always
    go together). Of them,
    - youden: most sensitivity + specificity (Youden 1950);
    - sensitivity>=X: most specificity at that sensitivity; specificity>=X: the reverse;
    - cost: least cost_ratio * missed cancers + false alarms, at the shares of classes that validation has;
    - half: 0.5, whatever the scores.
    Between equals the more sensitive wins, that is the lower threshold; with specificity>=X the more specific.
    Raises ConfigError for another policy, and DataError if validation lacks a class, except with half.
    """
    from sklearn.metrics import roc_curve

    kind, least = parse_policy(policy)
    if kind == "half":
        return 0.5
    cancers, normals = int(targets.sum()), int((1 - targets).sum())
    if not cancers or not normals:
        raise DataError(
            f"Validation has {cancers} cancer and {normals} normal slices; a threshold by {policy} needs both. Use "
            "another split, or evaluation.threshold=half."
        )
    false_alarms, sensitivity, levels = (values[::-1] for values in roc_curve(targets, scores, drop_intermediate=False))
    specificity = 1 - false_alarms
    worth = {
        "youden": sensitivity + specificity,
        "cost": -(cost_ratio * cancers * (1 - sensitivity) + normals * false_alarms),
        "sensitivity": np.where(sensitivity >= least - 1e-12, specificity, -1.0),
        "specificity": np.where(specificity >= least - 1e-12, sensitivity, -1.0),
    }[kind]
    best = np.flatnonzero(worth >= worth.max() - 1e-12)
    return float(_between(levels[:-1])[best[-1] if kind == "specificity" else best[0]])


def _between(levels: np.ndarray) -> np.ndarray:
    """Thresholds around sorted distinct scores: len(levels) + 1, each on its own side of every score."""
    middle = (levels[:-1] + levels[1:]) / 2
    middle = np.where(middle > levels[:-1], middle, levels[1:])  # neighbours in floating point have no middle
    above = (levels[-1] + 1) / 2 if levels[-1] < 1 else np.nextafter(1.0, 2.0)
    return np.concatenate([[levels[0] / 2], middle, [above]])


def fit_conformal(scores: np.ndarray, targets: np.ndarray, coverage: float) -> list[float]:
    """Quantile of 1 - P(true class) for each class: split conformal prediction, class-conditional (Vovk 2012).

    scores: float [N, K] over all classes (binary: 1 - p and p); targets: int [N]; coverage in (0, 1). The quantile of a
    class is its ceil((n + 1) * coverage)-th smallest value among its n validation slices; where n is too small for
    that it is 1, and the class is never excluded.

    `prediction_sets` then hold the true class with probability >= coverage, in each class by itself, averaged over
    validation splits, if new slices are exchangeable with the validation slices of their class. Two caveats: slices of
    one group are not exchangeable with others, so with large groups the coverage holds only roughly; and a validation
    split that also picked the epoch looks a little easier than new slices are.
    """
    quantiles = []
    for k in range(scores.shape[1]):
        misfit = np.sort(1 - scores[targets == k, k])
        rank = int(np.ceil((len(misfit) + 1) * coverage - 1e-9))  # 10 * 0.9 is to be 9
        quantiles.append(float(misfit[rank - 1]) if rank <= len(misfit) else 1.0)
    return quantiles


def prediction_sets(scores: np.ndarray, quantiles: list[float]) -> np.ndarray:
    """Which classes cannot be excluded: bool [N, K], for scores float [N, K] and `fit_conformal`'s quantiles.

    A set may hold no class (a slice unlike all that was seen), one or several.
    """
    return 1 - scores <= np.asarray(quantiles)


def wilson(k: float, n: float) -> tuple[float, float]:
    """95 % score interval of a share k / n (Wilson 1927; recommended by Newcombe 1998). k and n may be fractions.

    Raises ValueError unless 0 <= k <= n and n > 0.
    """
    if not (n > 0 and -1e-9 <= k <= n + 1e-9):
        raise ValueError(f"no share: {k} of {n}")
    p, z = min(max(k / n, 0.0), 1.0), 1.959963984540054
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return (0.0 if p == 0 else center - half), (1.0 if p == 1 else center + half)


def expected_calibration_error(
    scores: np.ndarray, targets: np.ndarray, bins: int = 15, adaptive: bool = False
) -> float:
    """Gap between mean score and observed share, averaged over bins by their slices (Guo et al. 2017, eq. 3).

    scores: float [N] in [0, 1]; targets: [N] in {0, 1}. Bins of equal width, closed on the right, or with `adaptive`
    of equally many slices (Nguyen & O'Connor 2015). Returns a float in [0, 1].
    Raises ValueError if the lengths differ, there are no slices, or a score lies outside [0, 1].
    """
    if len(scores) != len(targets) or not len(scores):
        raise ValueError(f"{len(scores)} scores and {len(targets)} targets")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("scores must lie in [0, 1]")
    gaps = np.bincount(calibration_bins(scores, bins, adaptive), scores - targets, bins)
    return float(np.abs(gaps).sum() / len(scores))


def calibration_bins(scores: np.ndarray, bins: int, adaptive: bool = False) -> np.ndarray:
    """The bin of each score, int [N] in 0..bins-1; equal scores share one."""
    if not adaptive:
        return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], scores, side="left")
    _, level, count = np.unique(scores, return_inverse=True, return_counts=True)
    return ((count.cumsum() - count / 2)[level] * bins / len(scores)).astype(int)


def reliability_table(scores: np.ndarray, targets: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """The reliability diagram's points: for each bin that holds slices, {"score", "observed", "n", "low", "high"}.

    score: mean of the scores; observed: share of targets that are 1, with Wilson's interval, which takes slices as
    independent. Bins of equal width.
    """
    index = calibration_bins(scores, bins)
    rows = []
    for b in np.unique(index):
        n, k = int((index == b).sum()), float(targets[index == b].sum())
        low, high = wilson(k, n)
        rows.append({"score": float(scores[index == b].mean()), "observed": k / n, "n": n, "low": low, "high": high})
    return rows


def risk_coverage(scores: np.ndarray, targets: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Share of slices decided and share of wrong decisions among them, most confident first (El-Yaniv & Wiener 2010).

    scores: float [N], P(cancer); targets: int [N] in {0, 1}. Confidence is the distance of the score from the threshold
    in log odds; slices of equal confidence come together. Returns float arrays (coverage, risk), coverage rising to 1.
    """
    p, t = np.clip(scores, 1e-9, 1 - 1e-9), np.clip(threshold, 1e-9, 1 - 1e-9)
    distance = np.abs(np.log(p / (1 - p)) - np.log(t / (1 - t)))
    _, step = np.unique(-distance.round(6), return_inverse=True)  # 0.4 and 0.6 are equal but for rounding
    decided = np.bincount(step).cumsum()
    wrong = np.bincount(step, (scores >= threshold) != targets).cumsum()
    return decided / len(scores), wrong / decided


def decision_curve(scores: np.ndarray, targets: np.ndarray, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    """Net benefit a slice of calling cancer by the model, always and never (Vickers & Elkin 2006).

    scores: float [N], calibrated P(cancer); targets: int [N] in {0, 1}; thresholds: in (0, 1), each the P(cancer) at
    which a reader would be indifferent. Returns threshold, model, treat_all and treat_none, each of their length.
    """
    odds = thresholds / (1 - thresholds)  # a false alarm, in missed cancers
    called = scores[:, None] >= thresholds
    hits, alarms = ((called & (targets == k)[:, None]).mean(0) for k in (1, 0))
    treat_all = targets.mean() - (1 - targets.mean()) * odds
    return {
        "threshold": thresholds,
        "model": hits - alarms * odds,
        "treat_all": treat_all,
        "treat_none": np.zeros_like(odds),
    }
