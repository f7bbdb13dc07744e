"""Metrics of one split's slices, each with its 95 % interval and the slices and groups that it rests on.

Every metric is computed for many weightings of the slices at once: the value weights them by one, a resample by how
often each slice's group was drawn. An undefined metric is None with a reason, never 0 or NaN, and no interval is
without width merely because nothing went wrong in a small split.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from chestct.config.schema import classes_of
from chestct.errors import DataError
from chestct.stats.bootstrap import MIN_GROUPS, difference_interval, draws, effective_size, fewest_groups, percentiles
from chestct.stats.calibration import calibration_bins, wilson


@dataclass(frozen=True)
class Estimate:
    """A metric's value with its 95 % interval, what it rests on, and why value or interval is None where it is."""

    value: float | None
    low: float | None
    high: float | None
    slices: int
    groups: int
    reason: str = ""


@dataclass(frozen=True)
class Sample:
    """All that metrics depend on."""

    names: tuple[str, ...]
    scores: np.ndarray  # float [N, K]; binary: 1 - p, p
    target: np.ndarray  # int [N]
    decision: np.ndarray  # int [N]
    flagged: np.ndarray  # bool [N], whether the slice counts as cancer at the threshold
    group: np.ndarray  # int [N]


def measure(table: pd.DataFrame, task: str, resamples: int = 2000, seed: int = 0) -> dict[str, Estimate]:
    """Every metric of one split's predictions and decisions (docs/manifest.md).

    Slices are called cancer where the table says `flagged`, subtypes by the largest `probability_CLASS`. Subtype names
    without a class are macro means; `cancer/...` is the reduction to cancer by 1 - P(normal).

    Intervals: shares of slices have Wilson's with their `effective_size`; all else the 2.5 and 97.5 % quantiles over
    `resamples` draws of groups (of ECE turned round the value, in squares), widened to `_unseen` where a class
    has few of them or no draw differs from another.
    Raises DataError without slices, or where a score is not finite.
    """
    sample = sample_of(table, task)
    values = {name: float(v[0]) for name, v in statistics(sample, np.ones((1, len(table)))).items()}
    drawn = [statistics(sample, weights) for weights in draws(sample.group, resamples, seed)]
    proportions, extremes = proportions_of(sample), _unseen(sample)
    few = fewest_groups(sample.target, sample.group) < MIN_GROUPS
    estimates = {}
    for name, value in values.items():
        hit, base, empty = proportions.get(name, (None, np.ones(len(table), bool), ""))
        slices, groups = int(base.sum()), len(np.unique(sample.group[base]))
        if np.isnan(value):
            estimates[name] = Estimate(None, None, None, slices, groups, empty or missing(sample))
        elif hit is not None:
            n = effective_size(hit[base], sample.group[base])
            estimates[name] = Estimate(value, *wilson(value * n, n), slices, groups)
        else:
            low, high, reason = percentiles(np.concatenate([part[name] for part in drawn]), value)
            if name == "ece" and low is not None and high is not None:
                # Chance widens gaps by their squares, in the value, and in each draw once more: these are turned round.
                low, high = (max(0.0, 2 * value**2 - end**2) ** 0.5 for end in (high, low))
                high = max(value, high)
            if low is not None and high is not None and (few or high - low < 1e-9):
                low, high = min(low, float(extremes[name].min())), max(high, float(extremes[name].max()))
            if low is not None and high is not None and (groups == 1 or high - low < 1e-6):
                low, high, reason = None, None, "no interval: a single group, or the same score for all"
            estimates[name] = Estimate(value, low, high, slices, groups, reason)
    return estimates


def sample_of(table: pd.DataFrame, task: str) -> Sample:
    """What `measure` measures, of N slices and K classes. Raises DataError without slices or for a score not finite."""
    names = classes_of(task)
    if not len(table):
        raise DataError("No slices to measure: this split is empty.")
    scores = table[[f"probability_{name}" for name in names]].to_numpy(float)
    if strays := int((~np.isfinite(scores)).any(1).sum()):
        raise DataError(f"{strays} of {len(table)} slices have no finite score: the model diverged. Lower optim.lr.")
    flagged = table["flagged"].to_numpy(bool)
    decision = flagged.astype(int) if task == "binary" else scores.argmax(1)
    group = np.unique(table["group"], return_inverse=True)[1]
    return Sample(names, scores, table["target"].to_numpy(int), decision, flagged, group)


def statistics(sample: Sample, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric under each of R weightings: weights float [R, N] -> {name: float [R]}, NaN where undefined.

    The tests compare each with scikit-learn's, which would take minutes for 2,000 weightings.
    """
    s, K, proportions = sample, len(sample.names), proportions_of(sample)
    hits = weights @ np.column_stack([hit & base for hit, base, _ in proportions.values()]).astype(float)
    bases = weights @ np.column_stack([base for _, base, _ in proportions.values()]).astype(float)
    confusion = (weights @ np.eye(K * K)[s.target * K + s.decision]).reshape(-1, K, K)
    actual, called, right = confusion.sum(2), confusion.sum(1), np.diagonal(confusion, axis1=1, axis2=2)
    total = weights.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        sensitivity = right / actual
        f1 = np.where(actual > 0, 2 * right / (actual + called), np.nan)
        by_class = [_ranking(s.scores[:, k], s.target == k, weights) for k in range(K)]
        area, precision = by_class[1] if K == 2 else np.mean(by_class, axis=0)
        values = {"auroc": area, "average_precision": precision, "balanced_accuracy": sensitivity.mean(1)}
        values |= dict(zip(proportions, (hits / bases).T, strict=True)) | {"f1": f1[:, 1] if K == 2 else f1.mean(1)}
        if K > 2:
            values |= {"sensitivity": sensitivity.mean(1), "precision": (right / called).mean(1)}
            values |= {f"auroc/{name}": area for name, (area, _) in zip(s.names, by_class, strict=True)}
            values["cancer/auroc"] = auroc(-s.scores[:, 0], s.target > 0, weights)
        truth = s.scores[np.arange(len(s.target)), s.target].clip(np.finfo(float).eps, 1)
        values["brier"] = weights @ ((s.scores - np.eye(K)[s.target]) ** 2).sum(1) / total / (2 if K == 2 else 1)
        values["log_loss"] = weights @ -np.log(truth) / total
        # Gap between confidence and accuracy, averaged over bins by their slices (Guo et al. 2017, eq. 3).
        confidence = s.scores[:, 1] if K == 2 else s.scores.max(1)
        gap = confidence - (s.target if K == 2 else s.target == s.decision)
        values["ece"] = np.abs(weights @ (np.eye(15)[calibration_bins(confidence, 15)] * gap[:, None])).sum(1) / total
    return values


def auroc(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """AUROC [R] of scores float [N] for targets bool [N] under weights float [R, N] (left out: one); see `_ranking`."""
    return _ranking(scores, targets.astype(bool), np.ones((1, len(scores))) if weights is None else weights)[0]


def auroc_difference(
    a: np.ndarray, b: np.ndarray, positive: np.ndarray, groups: pd.Series, resamples: int, seed: int
) -> Estimate:
    """AUROC of scores `a` minus that of `b`, float [N] of the same slices, in the same draws of their groups [N]."""
    group = np.unique(groups, return_inverse=True)[1]

    def difference(weights: np.ndarray) -> np.ndarray:
        return auroc(a, positive, weights) - auroc(b, positive, weights)

    value = float(difference(np.ones((1, len(a))))[0])
    drawn = np.concatenate([difference(weights) for weights in draws(group, resamples, seed)])
    low, high, reason = difference_interval(drawn, value, fewest_groups(positive, group))
    return Estimate(value, low, high, len(a), len(np.unique(group)), reason)


def _ranking(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC (ties count half) and average precision (equal scores are one step), [R] each, NaN without both classes."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)
    gained = np.add.reduceat(weights[:, order] * positive[order], starts, axis=1)
    lost = np.add.reduceat(weights[:, order] * ~positive[order], starts, axis=1)
    tp, fp = gained.cumsum(1), lost.cumsum(1)
    pairs = tp[:, -1] * fp[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        area = (gained * (fp[:, -1:] - fp + lost / 2)).sum(1) / pairs
        precision = (gained * tp / np.maximum(tp + fp, 1e-300)).sum(1) / tp[:, -1]
    # Sums of weights make a perfect ranking a little better than that.
    return area.clip(max=1), np.where(pairs > 0, precision, np.nan).clip(max=1)


def proportions_of(sample: Sample) -> dict[str, tuple[np.ndarray, np.ndarray, str]]:
    """Metrics that are a share of slices: which count, out of which (bool [N] both), and what it means if none."""
    s = sample
    shares = {"accuracy": (s.target == s.decision, np.ones(len(s.target), bool), "")}
    by_class = [(1, "sensitivity", "precision"), (0, "specificity", "npv")]
    if len(s.names) > 2:
        by_class = [(k, f"sensitivity/{name}", f"precision/{name}") for k, name in enumerate(s.names)]
        shares["cancer/sensitivity"] = (s.flagged, s.target > 0, "no cancer slices in this split")
        shares["cancer/specificity"] = (~s.flagged, s.target == 0, "no normal slices in this split")
    for k, sensitivity, precision in by_class:
        actual, called = s.target == k, s.decision == k
        shares[sensitivity] = (called, actual, f"no {s.names[k]} slices in this split")
        shares[precision] = (actual, called, f"no slice was called {s.names[k]}")
    return shares


def _unseen(sample: Sample) -> dict[str, np.ndarray]:
    """Metrics if what a class may hide had been seen: float [2C] for C classes that occur, for worse and for better.

    After m groups without an exception, Wilson's interval leaves room for a share of 1 - wilson(m, m) of exceptions.
    Here that share of each class in turn scores like the slice that is least, or most, like the class, and is decided
    wrong, or right. For an AUROC of 1 this gives wilson(m, m) of the smaller class, the smallest that can be whatever
    the distributions of scores.
    """
    s, K = sample, len(sample.names)
    occurring = [k for k in range(K) if (s.target == k).any()]
    classes = np.repeat(occurring, 2)
    copied = [pick(s.scores[:, k]) for k in occurring for pick in (np.argmin, np.argmax)]
    beyond = np.tile([-1e-9, 1e-9], len(occurring))[:, None]  # past the slice itself, lest they tie
    own, worse = s.decision[copied], beyond[:, 0] < 0
    decision = np.where(worse & (own == classes), (classes + 1) % K, np.where(worse, own, classes))
    scores = s.scores[copied] + beyond * np.where(np.arange(K) == classes[:, None], 1, -1 / (K - 1))
    seen, unseen = np.ones((len(classes), len(s.target))), np.zeros((len(classes), len(classes)))
    for row, k in enumerate(classes):
        inside = s.target == k
        m = effective_size(np.ones(inside.sum()), s.group[inside])
        kept = wilson(m, m)[0]
        seen[row, inside] = kept
        unseen[row, row] = (1 - kept) * inside.sum()
    measured = (s.scores, s.target, s.decision, s.flagged, s.group)
    added = (scores, classes, decision, s.flagged[copied], s.group[copied])
    both = Sample(s.names, *map(np.concatenate, zip(measured, added, strict=True)))
    return statistics(both, np.hstack([seen, unseen]))


def missing(sample: Sample) -> str:
    """Why a metric over all classes is undefined."""
    absent = [name for k, name in enumerate(sample.names) if not (sample.target == k).any()]
    return f"no {', no '.join(absent)} slices in this split" if absent else "a class is never called"
