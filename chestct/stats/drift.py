"""Whether numbers of one set of slices still look like those of another: split against split, new against training.

A difference has to be both sure and material, since in large sets everything is significant. Of training data only
quantiles are kept: enough for both measures, of no use for finding out anything about a single patient.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chestct.imaging.statistics import STATISTICS
from chestct.stats.bootstrap import MIN_GROUPS

if TYPE_CHECKING:  # the drift report of a service works without pandas
    import pandas as pd

MEASURED = (*STATISTICS, "score", "novelty")
"""What is compared: image statistics with those of train; score and novelty, to which train has been fitted, with those
of validation."""

QUANTILES = np.linspace(0, 1, 101)
"""What is kept of a distribution: enough to draw it, too little to know a slice by."""

BINS = 10
PSI_MODERATE, PSI_LARGE = 0.1, 0.25
"""Customary marks of the population stability index (Siddiqi 2006): below the first no change, above the second a large
one."""

MATERIAL_DISTANCE = 0.2
"""KS distance between splits that matters: one fifth of the slices would have to move."""


def holm(p: np.ndarray) -> np.ndarray:
    """p-values [K] of K numbers looked at together, after Holm's step-down correction (Holm 1979)."""
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1.0)[np.argsort(order)]


def psi(quantiles: np.ndarray, values: np.ndarray) -> float:
    """Population stability index of `values` against a reference, sum of (p - q) ln(p / q) over ten bins of equal mass.

    quantiles: float [Q] of the reference at evenly spaced probabilities from 0 to 1; values: float [N]. At least 0.
    Empty bins count as half a value, so that it stays finite. Repeated quantiles merge bins.
    """
    probabilities = np.linspace(0, 1, len(quantiles))
    edges = np.unique(np.interp(np.linspace(0, 1, BINS + 1)[1:-1], probabilities, quantiles))
    # Mass of the reference up to each edge, ties included.
    upto = np.array([probabilities[np.searchsorted(quantiles, edge, side="right") - 1] for edge in edges])
    expected = np.maximum(np.diff(np.concatenate([[0.0], upto, [1.0]])), 1e-3)
    seen = np.bincount(np.searchsorted(edges, values, side="left"), minlength=len(edges) + 1)
    actual = np.maximum(seen, 0.5) / len(values)
    return float(((actual - expected) * np.log(actual / expected)).sum())


def kolmogorov_smirnov(quantiles: np.ndarray, values: np.ndarray, reference_size: int) -> tuple[float, float]:
    """Distance in [0, 1] and p-value of the two-sample test, the reference known by its quantiles.

    reference_size: from how many slices the quantiles were made; with fewer than a hundred quantiles' worth of detail
    the distance is good to about 1 / len(quantiles).
    """
    from scipy.stats import kstwobign

    points = np.unique(np.concatenate([quantiles, values]))
    probabilities = np.linspace(0, 1, len(quantiles))
    # The reference's distribution function, the upper value where quantiles repeat.
    last = np.searchsorted(quantiles, points, side="right") - 1
    reference = np.where(
        last < 0, 0.0, np.maximum(np.interp(points, quantiles, probabilities), probabilities[np.maximum(last, 0)])
    )
    empirical = np.searchsorted(np.sort(values), points, side="right") / len(values)
    distance = float(np.abs(reference - empirical).max())
    size = np.sqrt(len(values) * reference_size / (len(values) + reference_size))
    return distance, float(kstwobign.sf(size * distance))


@dataclass(frozen=True)
class Difference:
    """One number then and now: medians, population stability index, Kolmogorov-Smirnov distance and its p-value."""

    name: str
    before: float
    now: float
    psi: float
    distance: float
    p: float


def training_facts(manifest: "pd.DataFrame", predictions: "pd.DataFrame") -> dict[str, Any]:
    """What a bundle keeps to be compared with later slices (see `difference`): QUANTILES, and slices by split.

    manifest: the slices of all splits; predictions: those of validation with `probability_normal` and `novelty`.
    """
    columns = _columns(manifest[manifest["split"] == "train"], predictions[predictions["split"] == "valid"])
    return {
        "data": {"slices": {str(split): int(n) for split, n in manifest["split"].value_counts().items()}},
        "statistics": {name: np.quantile(values, QUANTILES).tolist() for name, values in columns.items()},
    }


def difference(name: str, facts: Mapping[str, Any], values: np.ndarray) -> Difference:
    """One of MEASURED, values float [N], against the training data of a bundle (facts: see `training_facts`)."""
    quantiles = np.array(facts["statistics"][name])
    size = facts["data"]["slices"]["train" if name in STATISTICS else "valid"]
    distance, p = kolmogorov_smirnov(quantiles, values, size)
    return Difference(name, float(np.median(quantiles)), float(np.median(values)), psi(quantiles, values), distance, p)


def differences(facts: Mapping[str, Any], manifest: "pd.DataFrame", predictions: "pd.DataFrame") -> list[Difference]:
    """Each of MEASURED, of the slices in both tables, against the training data of a bundle."""
    columns = _columns(manifest, predictions)
    return [difference(name, facts, columns[name]) for name in MEASURED]


def _columns(manifest: "pd.DataFrame", predictions: "pd.DataFrame") -> dict[str, np.ndarray]:
    scored = {"score": 1 - predictions["probability_normal"], "novelty": predictions["novelty"]}
    return {name: column.to_numpy(float) for name, column in {**manifest[list(STATISTICS)], **scored}.items()}


def split_shift(numbers: "pd.DataFrame", split: "pd.Series", group: "pd.Series") -> list[dict[str, Any]]:
    """Train against test in every column of `numbers`: two-sample KS tests, with Holm's correction over the columns.

    Groups are compared, not slices: a group counts with its mean. One row a column: `name`, `distance` in [0, 1], `p`,
    `train` and `test` (means over groups) and `flagged` (significant, and at least MATERIAL_DISTANCE); None with a
    `reason` where a split has fewer than MIN_GROUPS groups.
    """
    from scipy.stats import ks_2samp

    train, test = (numbers[split == name].groupby(group[split == name]).mean() for name in ("train", "test"))
    if min(len(train), len(test)) < MIN_GROUPS:
        reason = f"too few groups: {len(train)} in train, {len(test)} in test, needs {MIN_GROUPS} in each"
        undefined = {"distance": None, "p": None, "train": None, "test": None, "flagged": False, "reason": reason}
        return [{"name": name, **undefined} for name in numbers]
    distances, ps = np.array([ks_2samp(train[name], test[name]) for name in numbers]).T
    flagged = (holm(ps) < 0.05) & (distances >= MATERIAL_DISTANCE)
    values = (distances, holm(ps), train.mean(), test.mean(), flagged)
    keys = ("distance", "p", "train", "test", "flagged")
    columns = [np.asarray(value).tolist() for value in values]
    return [
        {"name": name, **dict(zip(keys, row, strict=True)), "reason": ""}
        for name, *row in zip(numbers, *columns, strict=True)
    ]
