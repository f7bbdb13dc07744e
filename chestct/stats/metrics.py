"""Metrics of one split's slices, each with its 95 % interval and the slices and groups that it rests on.

One function computes every metric for many weightings of the slices at once; the value is the weighting by ones, and a
resample is a weighting by how often each slice's group was drawn. An undefined metric is None with a reason, never 0 or
NaN, and no interval is without width merely because nothing went wrong in a small split.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from chestct.config.schema import classes_of
from chestct.errors import DataError
from chestct.stats.bootstrap import MIN_GROUPS, draws, effective_size, percentiles
from chestct.stats.calibration import calibration_bins, wilson

LEVELS = (90, 95)
"""Percentages at which sensitivity is read at a specificity, and the reverse."""

Statistics = dict[str, np.ndarray]


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
    """All that metrics depend on: scores float [N, K] (binary: 1 - p, p), target, decision and group int [N].

    flagged: bool [N], whether the slice counts as cancer at the threshold.
    """

    scores: np.ndarray
    target: np.ndarray
    decision: np.ndarray
    flagged: np.ndarray
    group: np.ndarray
    names: tuple[str, ...]

    @property
    def binary(self) -> bool:
        return len(self.names) == 2


def measure(
    table: pd.DataFrame,
    task: str,
    scores: np.ndarray | None = None,
    threshold: float = 0.5,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Every metric of a table of predictions (chestct.models.predictions) that holds one split.

    scores: float [N, 1] (P(cancer)) or [N, K], calibrated, in the table's order; left out: the table's own. A slice is
    called cancer if P(cancer) >= threshold; subtypes are called by the largest score. Subtype names without a class are
    macro means; `cancer/...` is the reduction to cancer by 1 - P(normal).

    Intervals: proportions (accuracy, sensitivity, specificity, precision, npv) have Wilson's with the
    `effective_size` of their slices. All others have the 2.5 and 97.5 % quantiles over `resamples` draws of groups with
    replacement, widened to `_unseen` where a class has under MIN_GROUPS groups or no draw differs from another, and to
    the value itself (resampling inflates calibration errors).
    Raises DataError without slices, or where a score is not finite.
    """
    sample = sample_of(table, task, scores, threshold)
    everything = np.ones(len(table), bool)
    values = {name: float(v[0]) for name, v in statistics(sample, np.ones((1, len(table)))).items()}
    drawn = [statistics(sample, weights) for weights in draws(sample.group, resamples, seed)]
    proportions = proportions_of(sample)
    extremes = _unseen(sample)
    few = any(0 < len(np.unique(sample.group[sample.target == k])) < MIN_GROUPS for k in range(len(sample.names)))
    estimates = {}
    for name, value in values.items():
        hit, base, empty = proportions.get(name, (None, everything, ""))
        slices, groups = int(base.sum()), len(np.unique(sample.group[base]))
        if np.isnan(value):
            estimates[name] = Estimate(None, None, None, slices, groups, empty or missing(sample))
        elif hit is not None:
            n = effective_size(hit[base], sample.group[base])
            estimates[name] = Estimate(value, *wilson(value * n, n), slices, groups)
        else:
            low, high, reason = percentiles(np.concatenate([part[name] for part in drawn]), value)
            if low is not None and high is not None and (few or high - low < 1e-9):
                low, high = min(low, float(extremes[name].min())), max(high, float(extremes[name].max()))
            estimates[name] = Estimate(value, low, high, slices, groups, reason)
    return estimates


def to_plain(estimates: dict[str, Estimate]) -> dict[str, dict[str, Any]]:
    """Estimates as plain values for JSON: {"auroc": {"value", "low", "high", "slices", "groups"[, "reason"]}}."""
    plain = {name: asdict(estimate) for name, estimate in estimates.items()}
    return {name: {k: v for k, v in row.items() if k != "reason" or v} for name, row in plain.items()}


def sample_of(table: pd.DataFrame, task: str, scores: np.ndarray | None, threshold: float) -> Sample:
    """What `measure` measures, with its decisions; arguments as there."""
    names = classes_of(task)
    if not len(table):
        raise DataError("No slices to measure: this split is empty.")
    if scores is None:
        scores = table[["score_cancer"] if task == "binary" else [f"score_{name}" for name in names]].to_numpy(float)
    if scores.shape != (len(table), 1 if task == "binary" else len(names)):
        raise ValueError(f"scores are {list(scores.shape)} for {len(table)} slices of task {task}")
    if strays := int((~np.isfinite(scores)).any(1).sum()):
        raise DataError(f"{strays} of {len(table)} slices have no finite score: the model diverged. Lower optim.lr.")
    scores = np.hstack([1 - scores, scores]) if task == "binary" else scores
    cancer = scores[:, 1] if task == "binary" else 1 - scores[:, 0]
    flagged = cancer >= threshold
    decision = flagged.astype(int) if task == "binary" else scores.argmax(1)
    group = np.unique(table["group"], return_inverse=True)[1]
    return Sample(scores, table["target"].to_numpy(int), decision, flagged, group, names)


def statistics(sample: Sample, weights: np.ndarray) -> Statistics:
    """Every metric under each of R weightings: weights float [R, N] -> {name: float [R]}, NaN where undefined.

    The tests compare each with scikit-learn's, which takes one weighting at a time: 2,000 of them take it minutes.
    """
    s, K = sample, len(sample.names)
    proportions = proportions_of(sample)
    hits = weights @ np.column_stack([hit & base for hit, base, _ in proportions.values()]).astype(float)
    bases = weights @ np.column_stack([base for _, base, _ in proportions.values()]).astype(float)
    confusion = (weights @ np.eye(K * K)[s.target * K + s.decision]).reshape(-1, K, K)
    actual, called, right = confusion.sum(2), confusion.sum(1), np.diagonal(confusion, axis1=1, axis2=2)
    total = weights.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = dict(zip(proportions, (hits / bases).T, strict=True))
        sensitivity = right / actual
        f1 = np.where(actual > 0, 2 * right / (actual + called), np.nan)
        values["balanced_accuracy"] = sensitivity.mean(1)
        # Matthews' correlation for K classes (Gorodkin 2004); NaN if one class takes all.
        covariance = right.sum(1) * total - (actual * called).sum(1)
        spread = (total**2 - (actual**2).sum(1)) * (total**2 - (called**2).sum(1))
        values["mcc"] = covariance / np.sqrt(spread)
        if s.binary:
            values["f1"] = f1[:, 1]
            values |= _ranking(s.scores[:, 1], s.target == 1, weights, LEVELS)
        else:
            outside = total[:, None] - actual
            values["sensitivity"] = sensitivity.mean(1)
            values["specificity"] = ((outside - called + right) / outside).mean(1)
            values["precision"] = (right / called).mean(1)
            values["f1"] = f1.mean(1)
            by_class = [_ranking(s.scores[:, k], s.target == k, weights) for k in range(K)]
            for name in by_class[0]:
                values[name] = np.mean([ranking[name] for ranking in by_class], axis=0)
            values |= {f"auroc/{name}": r["auroc"] for name, r in zip(s.names, by_class, strict=True)}
            values["cancer/auroc"] = auroc(-s.scores[:, 0], s.target > 0, weights)
        truth = s.scores[np.arange(len(s.target)), s.target].clip(np.finfo(float).eps, 1)
        values["brier"] = weights @ ((s.scores - np.eye(K)[s.target]) ** 2).sum(1) / total / (2 if s.binary else 1)
        values["log_loss"] = weights @ -np.log(truth) / total
        confidence = s.scores[:, 1] if s.binary else s.scores.max(1)
        member = np.eye(15)[calibration_bins(confidence, 15)]
        gap = confidence - (s.target if s.binary else s.target == s.decision)
        values["ece"] = np.abs(weights @ (member * gap[:, None])).sum(1) / total
    return values


def auroc(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve under each of R weightings, ties counted half: float [R], NaN where a class is missing.

    scores: float [N]; targets: bool [N]; weights: float [R, N], how often each slice counts; left out: once, [1]. The
    probability that a random positive scores above a random negative (Hanley & McNeil 1982).
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    with np.errstate(divide="ignore", invalid="ignore"):
        return _ranking(scores, targets.astype(bool), weights)["auroc"]


def proportions_of(sample: Sample) -> dict[str, tuple[np.ndarray, np.ndarray, str]]:
    """Metrics that are a share of slices: (which count, out of which, what it means if there are none)."""
    s = sample
    shares = {"accuracy": (s.target == s.decision, np.ones(len(s.target), bool), "")}

    def add(sensitivity: str, precision: str, k: int) -> None:
        actual, called = s.target == k, s.decision == k
        shares[sensitivity] = (called, actual, f"no {s.names[k]} slices in this split")
        shares[precision] = (actual, called, f"no slice was called {s.names[k]}")

    if s.binary:
        add("sensitivity", "precision", 1)
        add("specificity", "npv", 0)
        return shares
    for k, name in enumerate(s.names):
        add(f"sensitivity/{name}", f"precision/{name}", k)
    shares["cancer/sensitivity"] = (s.flagged, s.target > 0, "no cancer slices in this split")
    shares["cancer/specificity"] = (~s.flagged, s.target == 0, "no normal slices in this split")
    return shares


def _ranking(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray, levels: tuple[int, ...] = ()) -> Statistics:
    """AUROC (ties count half), average precision (equal scores are one step) and the best operating points.

    scores float [N], positive bool [N], weights [R, N]. `sensitivity_at_90_specificity` is the largest sensitivity of
    any threshold whose specificity is at least 0.90: what these slices allow, not what a frozen threshold reached.
    """
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)
    sorted_weights = weights[:, order]
    gained = np.add.reduceat(sorted_weights * positive[order], starts, axis=1)
    lost = np.add.reduceat(sorted_weights * ~positive[order], starts, axis=1)
    tp, fp = gained.cumsum(1), lost.cumsum(1)
    P, N = tp[:, -1:], fp[:, -1:]
    values = {
        "auroc": (gained * (N - fp + lost / 2)).sum(1) / (P * N)[:, 0],
        "average_precision": (gained * tp / np.maximum(tp + fp, 1e-300)).sum(1) / P[:, 0],
    }
    for level in levels:
        allowed = fp <= (1 - level / 100) * N + 1e-9
        enough = tp >= level / 100 * P - 1e-9
        values[f"sensitivity_at_{level}_specificity"] = np.where(allowed, tp, 0).max(1) / P[:, 0]
        values[f"specificity_at_{level}_sensitivity"] = 1 - np.where(enough, fp, np.inf).min(1) / N[:, 0]
    both = (P * N)[:, 0] > 0
    return {name: np.where(both, value, np.nan) for name, value in values.items()}


def _unseen(sample: Sample) -> Statistics:
    """Metrics if what a class may hide had been seen: float [2C] for C classes that occur, for worse and for better.

    After m groups without an exception, Wilson's interval leaves room for a share of 1 - wilson(m, m) of exceptions
    (Wilson 1927; cf. the rule of three). Here that share of each class in turn scores like the slice that is least, or
    most, like the class. For an AUROC of 1 this gives wilson(m, m) of the smaller class: the smallest AUROC that can
    be, whatever the distributions of scores.
    """
    s, K = sample, len(sample.names)
    classes = np.repeat([k for k in range(K) if (s.target == k).any()], 2)
    copied = [pick(s.scores[:, k]) for k, pick in zip(classes, (np.argmin, np.argmax) * K, strict=False)]
    beyond = np.tile([-1e-9, 1e-9], len(classes) // 2)[:, None]  # past the slice itself, lest they tie
    scores = s.scores[copied] + beyond * np.where(np.arange(K) == classes[:, None], 1, -1 / (K - 1))
    seen, unseen = np.ones((len(classes), len(s.target))), np.zeros((len(classes), len(classes)))
    for row, k in enumerate(classes):
        inside = s.target == k
        m = effective_size(np.ones(inside.sum()), s.group[inside])
        kept = wilson(m, m)[0]
        seen[row, inside] = kept
        unseen[row, row] = (1 - kept) * inside.sum()
    both = Sample(
        np.vstack([s.scores, scores]),
        np.concatenate([s.target, classes]),
        np.concatenate([s.decision, s.decision[copied]]),
        np.concatenate([s.flagged, s.flagged[copied]]),
        np.concatenate([s.group, s.group[copied]]),
        s.names,
    )
    return statistics(both, np.hstack([seen, unseen]))


def missing(sample: Sample) -> str:
    """Why a metric over all classes is undefined."""
    for index, text in ((sample.target, "no {} slices in this split"), (sample.decision, "no slice was called {}")):
        if names := [name for k, name in enumerate(sample.names) if not (index == k).any()]:
            return text.format(", no ".join(names) if "split" in text else " or ".join(names))
    return "undefined for these slices"


def confusion(table: pd.DataFrame, task: str, scores: np.ndarray | None = None, threshold: float = 0.5) -> np.ndarray:
    """Counts int [K, K], actual class by called class; arguments and decisions as in `measure`."""
    sample = sample_of(table, task, scores, threshold)
    K = len(sample.names)
    return np.bincount(sample.target * K + sample.decision, minlength=K * K).reshape(K, K)


def predictive_values(
    sensitivity: float, specificity: float, prevalences: Sequence[float]
) -> dict[float, dict[str, float | None]]:
    """{prevalence: {"ppv", "npv"}} by Bayes' rule; None where nothing would be called so.

    Test sets hold far more cancer than clinics do; precision counted on them says little about a patient.
    """

    def share(right: float, wrong: float) -> float | None:
        return right / (right + wrong) if right + wrong > 0 else None

    return {
        p: {
            "ppv": share(sensitivity * p, (1 - specificity) * (1 - p)),
            "npv": share(specificity * (1 - p), (1 - sensitivity) * p),
        }
        for p in prevalences
    }
