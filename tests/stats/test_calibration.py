import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_curve

from chestct.errors import DataError
from chestct.stats.calibration import (
    Calibration,
    choose_threshold,
    fit_calibration,
    fit_conformal,
    reliability_table,
    to_scores,
    wilson,
)


def test_platt_scaling_is_logistic_regression_on_the_logit():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 20_000)  # so many that the smoothing of targets is invisible
    logits = (2 * y - 1 + 2 * rng.normal(size=20_000))[:, None]
    theirs = LogisticRegression(C=1e9).fit(logits, y)
    ours = fit_calibration(logits, y)
    assert ours.scale == pytest.approx(theirs.coef_[0, 0], rel=2e-3)
    assert ours.shift == pytest.approx(theirs.intercept_[0], abs=2e-3)


def test_validation_without_an_error_gives_finite_parameters_that_aim_at_platts_targets():
    y = np.repeat([0, 1], [4, 18])
    scores = fit_calibration((2.0 * y - 1)[:, None], y).scores((2.0 * y - 1)[:, None])
    assert scores[0, 0] == pytest.approx(1 / 6, abs=1e-4)  # 1 / (n + 2)
    assert scores[-1, 0] == pytest.approx(19 / 20, abs=1e-4)  # (n + 1) / (n + 2)
    y = np.repeat(np.arange(4), 15)
    perfect = fit_calibration(30 * np.eye(4)[y], y).scores(30 * np.eye(4)[y])
    assert perfect.max(1) == pytest.approx(16 / 19, abs=1e-3)  # (n + 1) / (n + K), not 1


@pytest.mark.parametrize("y", [[0, 0, 0], [1, 1, 1], [1, 0, 1]])
@pytest.mark.parametrize("logits", [[2.0, 2.0, 2.0], [-1.0, 3.0, -2.0], [1e6, -1e6, 0.0]])
def test_calibration_is_finite_and_keeps_the_order_whatever_validation_holds(y, logits):
    fitted = fit_calibration(np.array(logits, np.float32)[:, None], np.array(y))
    assert 0 < fitted.scale < np.inf
    assert np.isfinite(fitted.shift)


def test_a_temperature_undoes_overconfidence_and_keeps_decisions():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5000, 4)) * 1.5
    y = np.array([rng.choice(4, p=p) for p in to_scores(logits)])
    fitted = fit_calibration(3 * logits, y)
    assert fitted.scale == pytest.approx(1 / 3, rel=0.05)
    assert fitted.shift == 0
    assert (fitted.scores(3 * logits).argmax(1) == logits.argmax(1)).all()
    grid = [log_loss(y, Calibration(scale).scores(3 * logits)) for scale in np.linspace(0.2, 0.5, 61)]
    assert log_loss(y, fitted.scores(3 * logits)) <= min(grid) + 1e-4


def rates(scores, y, threshold):
    called = scores >= threshold
    return called[y == 1].mean(), 1 - called[y == 0].mean()


def test_thresholds_are_the_best_of_all_that_exist():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 60)
    scores = np.round(to_scores((2 * y - 1 + 2 * rng.normal(size=60))[:, None])[:, 0], 1)  # many ties
    everything = [rates(scores, y, t) for t in [*np.unique(scores), 2.0]]
    sensitivity, specificity = rates(scores, y, choose_threshold(scores, y, "youden"))
    fpr, tpr, _ = roc_curve(y, scores)
    assert sensitivity + specificity == pytest.approx((tpr + 1 - fpr).max())
    sensitivity, specificity = rates(scores, y, choose_threshold(scores, y, "sensitivity>=0.9"))
    assert (specificity, sensitivity) == max((sp, se) for se, sp in everything if se >= 0.9)
    sensitivity, specificity = rates(scores, y, choose_threshold(scores, y, "specificity >= .8"))
    assert (sensitivity, specificity) == max((se, sp) for se, sp in everything if sp >= 0.8)
    n1, n0 = y.sum(), (1 - y).sum()
    sensitivity, specificity = rates(scores, y, choose_threshold(scores, y, "cost", 3.0))
    cost = [3 * n1 * (1 - se) + n0 * (1 - sp) for se, sp in everything]
    assert 3 * n1 * (1 - sensitivity) + n0 * (1 - specificity) == pytest.approx(min(cost))


@pytest.mark.parametrize(
    ("y", "policy", "cost_ratio", "threshold"),
    [
        ([0, 0, 0, 1], "youden", 1, 0.6),  # midway
        ([0, 1, 0, 1], "half", 1, 0.5),
        ([0, 1, 0, 1], "cost", 5, 0.15),  # dear misses lower it
        ([0, 1, 0, 1], "cost", 0.2, 0.6),
        ([0, 1, 0, 1], "youden", 1, 0.15),  # 1 + 1/2, as 1/2 + 1 at 0.6: the more sensitive wins
        ([0, 1, 1, 1], "sensitivity>=0.5", 1, 0.15),  # not higher, which is no better for normals
        ([1, 0, 0, 0], "specificity>=0.5", 1, 0.95),  # the reverse
    ],
)
def test_thresholds_lie_midway_and_ties_are_settled(y, policy, cost_ratio, threshold):
    assert choose_threshold(np.array([0.1, 0.2, 0.3, 0.9]), np.array(y), policy, cost_ratio) == pytest.approx(threshold)


def test_thresholds_at_the_ends_and_between_neighbouring_floats():
    for scores, policy, called in (
        ([0.3, 0.3], "sensitivity>=0.95", [True, True]),  # equal scores go together
        ([1.0, 1.0], "specificity>=0.95", [False, False]),
        ([0.0, 0.0], "sensitivity>=1", [True, True]),
        ([0.7, np.nextafter(0.7, 1)], "youden", [False, True]),
    ):
        threshold = choose_threshold(np.array(scores), np.array([0, 1]), policy)
        assert [score >= threshold for score in scores] == called, policy


def test_calibration_needs_slices_and_a_policy_both_classes():
    with pytest.raises(DataError, match="validation slices"):
        fit_calibration(np.zeros((0, 1)), np.zeros(0, int))
    with pytest.raises(DataError, match="0 normal slices"):
        choose_threshold(np.array([0.2, 0.8]), np.array([1, 1]), "youden")


def test_conformal_sets_cover_each_class_at_the_stated_rate():
    """Over 1,000 draws of validation and one new slice a class; the weak class must be covered like the strong one."""
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for _ in range(1000):
        y = np.repeat([0, 1], [19, 60])
        p = to_scores((np.where(y, 1.5, -0.2) + rng.normal(size=79))[:, None])
        quantiles = fit_conformal(np.hstack([1 - p, p]), y, 0.9)
        new = to_scores((np.array([-0.2, 1.5]) + rng.normal(size=2))[:, None])
        covered += np.diag(1 - np.hstack([1 - new, new]) <= quantiles)
    # Exact coverage is ceil((n + 1) 0.9) / (n + 1): 18/20 and 55/61; three standard errors of 1,000 draws.
    assert covered / 1000 == pytest.approx([18 / 20, 55 / 61], abs=3 * np.sqrt(0.09 / 1000))


def test_conformal_quantiles_of_a_worked_example():
    p = np.arange(0.9, 0.05, -0.1)[:, None]  # nine cancers, no normal
    fitted = [fit_conformal(np.hstack([1 - p, p]), np.ones(9, int), coverage) for coverage in (0.9, 0.91)]
    assert fitted[0] == pytest.approx([1.0, 0.9])  # rank ceil(10 * 0.9) = 9 of 9; no normal slice: never excluded
    assert fitted[1] == [1.0, 1.0]  # rank 10 of 9


def test_wilson_of_published_examples():
    """Newcombe 1998, table I, method 3 (without continuity correction)."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


def test_reliability_table_counts_every_slice_once():
    scores, y = np.array([0.05, 0.1, 0.1, 0.55, 0.95]), np.array([0, 0, 1, 1, 1])
    rows = reliability_table(scores, y, 10)
    assert [row["n"] for row in rows] == [3, 1, 1]  # bins are closed on the right: 0.1 is in the first
    low, high = wilson(1, 3)
    assert rows[0] == pytest.approx({"score": 0.25 / 3, "observed": 1 / 3, "n": 3, "low": low, "high": high})
