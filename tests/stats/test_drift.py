import numpy as np
import pandas as pd
import pytest
from scipy.stats import ks_2samp

from chestct.stats.drift import MEASURED, QUANTILES, differences, holm, psi, reference, split_shift

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


@pytest.mark.parametrize("shift", [0.0, 0.1, 1.0])
def test_quantiles_tell_distance_and_p_nearly_as_the_slices_themselves_would(shift):
    values = np.random.default_rng(2).normal(shift, 1, 400)
    found = {d.name: d for d in differences(FACTS, dict.fromkeys(MEASURED, values))}
    ours, theirs = found["mean"], ks_2samp(BEFORE, values)
    assert ours.distance == pytest.approx(theirs.statistic, abs=0.01)
    assert ours.p == pytest.approx(theirs.pvalue, abs=0.1)
    assert (ours.before, ours.now) == (pytest.approx(0, abs=0.05), pytest.approx(np.median(values)))
    assert found["score"].p > ours.p  # a score is compared with validation, whose few slices make nothing sure


def test_holm_agrees_with_the_worked_example_of_the_method():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    assert holm(np.zeros(0)).shape == (0,)


def splits(n, seed=0):
    """Numbers of n slices in n groups, which of them are test, and their groups."""
    rng = np.random.default_rng(seed)
    numbers = pd.DataFrame({name: rng.uniform(0.2, 0.4, n) for name in ("mean", "std", "border_mean")})
    return numbers, pd.Series(rng.choice(["train", "valid", "test"], n, p=[0.6, 0.15, 0.25])), pd.Series(range(n))


def test_a_test_set_from_elsewhere_is_flagged_by_the_number_that_differs_and_a_random_one_is_not():
    numbers, split, group = splits(300)
    assert not any(row["flagged"] for row in split_shift(numbers, split, group))
    numbers["border_mean"] += 0.1 * (split == "test")
    rows = split_shift(numbers, split, group)
    assert [row["name"] for row in rows if row["flagged"]] == ["border_mean"]
    theirs = ks_2samp(numbers["border_mean"][split == "train"], numbers["border_mean"][split == "test"])
    assert rows[2]["distance"] == pytest.approx(theirs.statistic)
    assert rows[2]["p"] == pytest.approx(3 * theirs.pvalue)  # Holm's, of three the surest
    assert rows[2]["test"] == pytest.approx(numbers["border_mean"][split == "test"].mean())


def test_neither_small_differences_nor_copies_of_one_slice_make_a_shift_and_few_groups_give_a_reason():
    numbers, split, group = splits(6000)
    numbers["mean"] += 0.02 * (split == "test")
    row = split_shift(numbers, split, group)[0]
    assert (row["p"] < 0.001, row["flagged"]) == (True, False)
    numbers, split, group = splits(100)
    rows = np.r_[np.arange(100), np.repeat(np.flatnonzero(split == "test")[:2], 200)]
    repeated = (part.iloc[rows].reset_index(drop=True) for part in (numbers, split, group))
    assert not any(row["flagged"] for row in split_shift(*repeated))
    row = split_shift(*splits(20))[0]
    assert row["distance"] is None
    assert "too few groups" in row["reason"]
