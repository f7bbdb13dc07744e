import numpy as np
import pytest
from scipy.stats import ks_2samp

from chestct.stats.drift import MEASURED, QUANTILES, difference, kolmogorov_smirnov, psi

REFERENCE = np.random.default_rng(0).normal(size=5000)
KEPT = np.quantile(REFERENCE, QUANTILES)


def test_psi_is_siddiqis_sum_over_ten_bins():
    values = np.random.default_rng(1).normal(0.5, 1.2, 3000)
    edges = np.quantile(REFERENCE, np.linspace(0, 1, 11))[1:-1]
    actual = np.bincount(np.searchsorted(edges, values), minlength=10) / len(values)
    assert psi(KEPT, values) == pytest.approx(((actual - 0.1) * np.log(actual / 0.1)).sum(), abs=0.01)
    assert psi(KEPT, REFERENCE) < 0.001


def test_values_of_which_half_are_equal_are_no_shift():
    mixed = np.where(np.arange(5000) % 2, REFERENCE, 0.0)
    assert psi(np.quantile(mixed, QUANTILES), mixed) < 0.01


@pytest.mark.parametrize("shift", [0.0, 0.1, 1.0])
def test_distance_and_p_are_scipys_to_the_detail_of_the_quantiles(shift):
    values = np.random.default_rng(2).normal(shift, 1, 400)
    distance, p = kolmogorov_smirnov(KEPT, values, len(REFERENCE))
    theirs = ks_2samp(REFERENCE, values)
    assert distance == pytest.approx(theirs.statistic, abs=0.01)
    assert p == pytest.approx(theirs.pvalue, abs=0.1)


def test_statistics_are_compared_with_train_and_scores_with_validation():
    facts = {
        "statistics": dict.fromkeys(MEASURED, KEPT.tolist()),
        "data": {"slices": {"train": 5000, "valid": 20}},
    }
    values = np.random.default_rng(3).normal(0.4, 1, 300)
    image, score = (difference(name, facts, values) for name in ("width", "score"))
    assert (image.before, image.now) == (pytest.approx(0, abs=0.05), pytest.approx(np.median(values)))
    assert image.distance == score.distance
    assert image.p < score.p  # few validation slices make nothing sure
