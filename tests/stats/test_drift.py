import numpy as np
import pandas as pd
import pytest
from scipy.stats import ks_2samp

from chestct.stats.drift import (
    MEASURED,
    QUANTILES,
    difference,
    holm,
    kolmogorov_smirnov,
    psi,
    split_shift,
)

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


def test_holm_agrees_with_the_worked_example_of_the_method():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    assert holm(np.zeros(0)).shape == (0,)


def splits(n, seed=0):
    """Numbers of n slices in n groups, which of them are test, and their groups."""
    rng = np.random.default_rng(seed)
    numbers = pd.DataFrame({name: rng.uniform(0.2, 0.4, n) for name in ("mean", "std", "border_mean")})
    return numbers, pd.Series(rng.choice(["train", "valid", "test"], n, p=[0.6, 0.15, 0.25])), pd.Series(range(n))


def test_splits_drawn_at_random_show_no_shift():
    assert not any(row["flagged"] for row in split_shift(*splits(600)))


def test_a_test_set_from_elsewhere_is_flagged_by_the_number_that_differs():
    numbers, split, group = splits(300)
    numbers["border_mean"] += 0.1 * (split == "test")
    rows = split_shift(numbers, split, group)
    assert [row["name"] for row in rows if row["flagged"]] == ["border_mean"]
    theirs = ks_2samp(numbers["border_mean"][split == "train"], numbers["border_mean"][split == "test"])
    assert rows[2]["distance"] == pytest.approx(theirs.statistic)
    assert rows[2]["p"] == pytest.approx(3 * theirs.pvalue)  # Holm's, of three the surest
    assert rows[2]["test"] == pytest.approx(numbers["border_mean"][split == "test"].mean())


def test_a_significant_difference_that_is_small_is_not_flagged():
    numbers, split, group = splits(6000)
    numbers["mean"] += 0.02 * (split == "test")
    row = split_shift(numbers, split, group)[0]
    assert row["p"] < 0.001
    assert not row["flagged"]


def test_copies_of_one_slice_do_not_make_a_shift():
    numbers, split, group = splits(100)
    rows = np.r_[np.arange(100), np.repeat(np.flatnonzero(split == "test")[:2], 200)]
    repeated = (part.iloc[rows].reset_index(drop=True) for part in (numbers, split, group))
    assert not any(row["flagged"] for row in split_shift(*repeated))


def test_too_few_groups_give_a_reason():
    row = split_shift(*splits(20))[0]
    assert row["distance"] is None
    assert "too few groups" in row["reason"]
