"""How far new numbers lie from those of training, of which only quantiles are kept.

Quantiles are enough for both measures, are no use for finding out anything about a single patient, and make a bundle no
larger.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from chestct.imaging.statistics import STATISTICS

MEASURED = (*STATISTICS, "score", "novelty")
"""What is compared: image statistics with those of train; score and novelty, to which train has been fitted, with those
of validation."""

QUANTILES = np.linspace(0, 1, 101)
"""What is kept of a distribution: enough to draw it, too little to know a slice by."""

BINS = 10
PSI_MODERATE, PSI_LARGE = 0.1, 0.25
"""Customary marks of the population stability index (Siddiqi 2006): below the first no change, above the second a large
one."""


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
    known = np.where(
        last < 0, 0.0, np.maximum(np.interp(points, quantiles, probabilities), probabilities[np.maximum(last, 0)])
    )
    empirical = np.searchsorted(np.sort(values), points, side="right") / len(values)
    distance = float(np.abs(known - empirical).max())
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


def difference(name: str, facts: Mapping[str, Any], values: np.ndarray) -> Difference:
    """One of MEASURED against the training data of a bundle.

    facts: `statistics`, the QUANTILES of each name, and `data`, whose `slices` are counts by split; values: float [N].
    """
    quantiles = np.array(facts["statistics"][name])
    size = facts["data"]["slices"]["train" if name in STATISTICS else "valid"]
    distance, p = kolmogorov_smirnov(quantiles, values, size)
    return Difference(name, float(np.median(quantiles)), float(np.median(values)), psi(quantiles, values), distance, p)
