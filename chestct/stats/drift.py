"""Whether numbers of new slices still look like those of the training data.

A difference has to be both sure and material, since in large sets everything is significant. Of training data a bundle
keeps quantiles alone: enough to compare with, of no use for finding out anything about a single patient.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import ks_2samp

from chestct.errors import BundleError
from chestct.imaging.statistics import STATISTICS

if TYPE_CHECKING:  # the drift report of a service works without pandas
    import pandas as pd

MEASURED = (*STATISTICS, "score", "novelty")
"""What is compared: image statistics with those of train; score and novelty, to which train has been fitted, with those
of validation."""

QUANTILES = np.linspace(0, 1, 101)  # what is kept of a distribution: enough to draw it, too little to know a slice by
BINS = 10
PSI_LARGE = 0.25  # population stability index from which a change is large, by custom (Siddiqi 2006)


@dataclass(frozen=True)
class Difference:
    """One number then and now: medians, population stability index, Kolmogorov-Smirnov distance and its p-value."""

    name: str
    before: float
    now: float
    psi: float
    distance: float
    p: float


def holm(p: np.ndarray) -> np.ndarray:
    """p-values [K] of K numbers looked at together, after Holm's step-down correction (Holm 1979)."""
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1.0)[np.argsort(order)]


def psi(before: np.ndarray, now: np.ndarray) -> float:
    """Population stability index, sum of (p - q) ln(p / q) over ten bins of equal mass before; at least 0.

    before, now: float [N] and [M]. Empty bins count as half a value, so that it stays finite; a value that is many of
    the edges has a bin of its own.
    """
    edges, times = np.unique(np.quantile(before, np.linspace(0, 1, BINS + 1)[1:-1]), return_counts=True)
    edges = np.sort([*edges, *np.nextafter(edges[times > 1], -np.inf)])
    counts = [np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1) for values in (before, now)]
    q, p = (np.maximum(count, 0.5) / count.sum() for count in counts)
    return float(((p - q) * np.log(p / q)).sum())


def check_reference(facts: Mapping[str, Any], bundle: str) -> None:
    """Raises BundleError where a bundle keeps too little to compare with. bundle: its id."""
    statistics, slices = facts.get("statistics", {}), facts.get("data", {}).get("slices", {})
    missing = [f"statistics of {name}" for name in MEASURED if name not in statistics]
    missing += [f"number of {split} slices" for split in ("train", "valid") if not slices.get(split)]
    if missing:
        raise BundleError(f"The bundle {bundle} has no {missing[0]} to compare with. Export it again.")


def reference(facts: Mapping[str, Any], name: str) -> np.ndarray:
    """Values with the quantiles that a bundle keeps of one of MEASURED, as many as there were slices."""
    quantiles = facts["statistics"][name]
    slices = facts["data"]["slices"]["train" if name in STATISTICS else "valid"]
    return np.interp(np.linspace(0, 1, slices), np.linspace(0, 1, len(quantiles)), quantiles)


def differences(facts: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> list[Difference]:
    """Each of MEASURED, float [N] of new slices in `columns`, against the training data of a bundle."""
    result = []
    for name in MEASURED:
        before, now = reference(facts, name), columns[name]
        test, medians = ks_2samp(before, now, method="asymp"), (float(np.median(before)), float(np.median(now)))
        result.append(Difference(name, *medians, psi(before, now), float(test.statistic), float(test.pvalue)))
    return result


def measured(manifest: "pd.DataFrame", predictions: "pd.DataFrame") -> dict[str, np.ndarray]:
    """Each of MEASURED of the slices in both tables, float [N]."""
    scored = {"score": 1 - predictions["probability_normal"], "novelty": predictions["novelty"]}
    return {name: column.to_numpy(float) for name, column in {**manifest[list(STATISTICS)], **scored}.items()}
