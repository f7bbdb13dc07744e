import numpy as np
import pytest
from scipy.stats import ks_2samp

from chestct.stats.drift import MEASURED, QUANTILES, differences, holm, psi, reference

BEFORE = np.random.default_rng(0).normal(size=5000)
FACTS = {
    "statistics": dict.fromkeys(MEASURED, np.quantile(BEFORE, QUANTILES).tolist()),
    "data": {"slices": {"train": 5000, "valid": 20}},
}


def test_psi_is_siddiqis_sum_over_ten_bins():
    values = np.random.default_rng(1).normal(0.5, 1.2, 3000)
    edges = np.quantile(BEFORE, np.linspace(0, 1, 11))[1:-1]
    actual = np.bincount(np.searchsorted(edges, values), minlength=10) / len(values)
    expected = ((actual - 0.1) * np.log(actual / 0.1)).sum()
    assert psi(reference(FACTS, "mean"), values) == pytest.approx(expected, abs=0.01)
    assert psi(reference(FACTS, "mean"), BEFORE) < 0.001
    ties = np.where(np.arange(5000) % 2, BEFORE, 0.0)
    assert psi(ties, ties[::-1]) == pytest.approx(0)


def test_psi_sees_a_change_from_a_value_that_all_or_many_slices_had_to_either_side():
    width = np.full(1000, 512.0)
    some = np.where(np.arange(1000) < 250, 512.0, np.arange(1000.0))
    for other in (256.0, 1024.0):
        assert psi(width, np.full(200, other)) > 1
        assert psi(some, np.where(some == 512, other, some)) > 1
    assert psi(width, np.full(50, 512.0)) < 0.1  # two empty bins of half a value each


@pytest.mark.parametrize("shift", [0.0, 0.1, 1.0])
def test_quantiles_tell_distance_and_p_nearly_as_the_slices_themselves_would(shift):
    values = np.random.default_rng(2).normal(shift, 1, 400)
    found = {d.name: d for d in differences(FACTS, dict.fromkeys(MEASURED, values))}
    ours, theirs = found["mean"], ks_2samp(BEFORE, values)
    assert ours.distance == pytest.approx(theirs.statistic, abs=0.01)
    assert np.log10(ours.p) == pytest.approx(np.log10(theirs.pvalue), abs=0.05)
    assert (ours.before, ours.now) == (pytest.approx(0, abs=0.05), pytest.approx(np.median(values)))
    assert found["score"].p > ours.p  # a score is compared with validation, whose few slices make nothing sure


def test_holm_agrees_with_the_worked_example_of_the_method():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    assert holm(np.zeros(0)).shape == (0,)
