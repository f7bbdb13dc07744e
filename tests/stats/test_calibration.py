import subprocess
import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_curve

from chestct.errors import ConfigError, DataError
from chestct.stats.calibration import (
    Calibration,
    choose_threshold,
    expected_calibration_error,
    fit_calibration,
    fit_conformal,
    prediction_sets,
    reliability_table,
    risk_coverage,
    to_scores,
    wilson,
)


def drawn(n, seed=0, noise=2.0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    return (2 * y - 1 + noise * rng.normal(size=n))[:, None], y


def test_serving_can_import_it_without_scipy_or_torch():
    heavy = ["scipy", "torch", "sklearn", "lightning", "pandas"]
    code = f"import sys, chestct.stats.calibration; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_platt_scaling_is_logistic_regression_on_the_logit():
    logits, y = drawn(20_000)  # so many that the smoothing of targets is invisible
    theirs = LogisticRegression(C=1e9).fit(logits, y)
    ours = fit_calibration(logits, y)
    assert ours.scale == pytest.approx(theirs.coef_[0, 0], rel=2e-3)
    assert ours.shift == pytest.approx(theirs.intercept_[0], abs=2e-3)


def test_validation_without_an_error_gives_finite_parameters_that_aim_at_platts_targets():
    y = np.repeat([0, 1], [4, 18])
    scores = fit_calibration((2.0 * y - 1)[:, None], y).scores((2.0 * y - 1)[:, None])
    assert scores[0, 0] == pytest.approx(1 / 6, abs=1e-4)  # 1 / (n + 2)
    assert scores[-1, 0] == pytest.approx(19 / 20, abs=1e-4)  # (n + 1) / (n + 2)


@pytest.mark.parametrize("y", [[0, 0, 0], [1, 1, 1], [1, 0, 1]])
@pytest.mark.parametrize("logits", [[2.0, 2.0, 2.0], [-1.0, 3.0, -2.0], [1e6, -1e6, 0.0]])
def test_calibration_is_finite_and_keeps_the_order_whatever_validation_holds(y, logits):
    found = fit_calibration(np.array(logits, np.float32)[:, None], np.array(y))
    assert np.isfinite([found.scale, found.shift]).all()
    assert found.scale > 0


def test_a_temperature_undoes_overconfidence_and_keeps_decisions():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5000, 4)) * 1.5
    y = np.array([rng.choice(4, p=p) for p in to_scores(logits)])
    found = fit_calibration(3 * logits, y)
    assert found.scale == pytest.approx(1 / 3, rel=0.05)
    assert found.shift == 0
    assert (found.scores(3 * logits).argmax(1) == logits.argmax(1)).all()
    grid = [log_loss(y, Calibration(scale).scores(3 * logits)) for scale in np.linspace(0.2, 0.5, 61)]
    assert log_loss(y, found.scores(3 * logits)) <= min(grid) + 1e-4


def test_a_temperature_stays_sane_on_perfect_and_on_random_validation():
    logits = np.random.default_rng(0).normal(size=(60, 4))
    assert 0.05 <= fit_calibration(logits, np.random.default_rng(1).integers(0, 4, 60)).scale < 0.5
    assert fit_calibration(logits / 1000, logits.argmax(1)).scale == 20
    y = np.repeat(np.arange(4), 15)
    perfect = fit_calibration(30 * np.eye(4)[y], y).scores(30 * np.eye(4)[y])
    assert perfect.max(1) == pytest.approx(16 / 19, abs=1e-3)  # (n + 1) / (n + K), not 1


def test_calibration_needs_slices():
    with pytest.raises(DataError, match="validation slices"):
        fit_calibration(np.zeros((0, 1)), np.zeros(0, int))


def test_scores_of_extreme_logits_do_not_overflow():
    with np.errstate(all="raise"):
        assert Calibration(2.0, 1.0).scores(np.array([[1000.0], [-1000.0]]))[:, 0].tolist() == [1.0, 0.0]


def rates(scores, y, threshold):
    called = scores >= threshold
    return called[y == 1].mean(), 1 - called[y == 0].mean()


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_are_the_best_of_all_that_exist(seed):
    rng = np.random.default_rng(seed)
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


def test_thresholds_lie_midway_and_dear_misses_lower_them():
    scores, y = np.array([0.1, 0.2, 0.6, 0.9]), np.array([0, 0, 1, 1])
    assert choose_threshold(scores, y, "youden") == pytest.approx(0.4)
    assert choose_threshold(scores, y, "half") == 0.5
    scores, y = np.array([0.1, 0.2, 0.3, 0.9]), np.array([0, 1, 0, 1])
    assert choose_threshold(scores, y, "cost", 5.0) == pytest.approx(0.15)
    assert choose_threshold(scores, y, "cost", 0.2) == pytest.approx(0.6)


def test_between_equals_the_more_sensitive_threshold_wins():
    scores, y = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 1, 0, 1])
    assert choose_threshold(scores, y, "youden") == pytest.approx(0.15)  # 1 + 1/2, as 1/2 + 1 at 0.35
    scores, y = np.array([0.1, 0.2, 0.3]), np.array([0, 1, 1])
    assert choose_threshold(scores, y, "sensitivity>=0.5") == pytest.approx(0.15)  # not 0.25, no better for normals
    assert choose_threshold(scores, 1 - y, "specificity>=0.5") == pytest.approx(0.65)  # the reverse


@pytest.mark.parametrize(
    ("level", "policy", "called"),
    [
        (0.3, "sensitivity>=0.95", True),
        (0.3, "specificity>=0.95", False),
        (1.0, "specificity>=0.95", False),
        (0.0, "sensitivity>=1", True),
    ],
)
def test_equal_scores_go_together(level, policy, called):
    scores, y = np.full(4, level), np.array([0, 1, 0, 1])
    assert ((scores >= choose_threshold(scores, y, policy)) == called).all()


def test_neighbouring_floats_are_still_told_apart():
    scores = np.array([0.7, np.nextafter(0.7, 1)])
    threshold = choose_threshold(scores, np.array([0, 1]), "youden")
    assert (scores >= threshold).tolist() == [False, True]


@pytest.mark.parametrize("policy", ["", "sensitivity", "sensitivity>0.9", "sensitivity>=1.5", "precision>=0.9",
                                    "specificity>=0", "sensitivity>=.", "Youden"])  # fmt: skip
def test_unknown_policies_are_named_with_the_known(policy):
    with pytest.raises(ConfigError, match=r"sensitivity>=0\.95"):
        choose_threshold(np.array([0.2, 0.8]), np.array([0, 1]), policy)


def test_a_policy_needs_both_classes_in_validation():
    with pytest.raises(DataError, match="0 normal slices"):
        choose_threshold(np.array([0.2, 0.8]), np.array([1, 1]), "youden")
    assert choose_threshold(np.array([0.2, 0.8]), np.array([1, 1]), "half") == 0.5


def test_conformal_sets_cover_each_class_at_the_stated_rate():
    """Over 1,000 draws of validation and one new slice a class; the weak class must be covered like the strong one."""
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for _ in range(1000):
        y = np.repeat([0, 1], [19, 60])
        p = to_scores((np.where(y, 1.5, -0.2) + rng.normal(size=79))[:, None])
        quantiles = fit_conformal(np.hstack([1 - p, p]), y, 0.9)
        new = to_scores((np.array([-0.2, 1.5]) + rng.normal(size=2))[:, None])
        covered += np.diag(prediction_sets(np.hstack([1 - new, new]), quantiles))
    # Exact coverage is ceil((n + 1) 0.9) / (n + 1): 18/20 and 55/61; three standard errors of 1,000 draws.
    assert covered[0] / 1000 == pytest.approx(18 / 20, abs=3 * np.sqrt(0.09 / 1000))
    assert covered[1] / 1000 == pytest.approx(55 / 61, abs=3 * np.sqrt(0.09 / 1000))


def test_conformal_quantiles_of_a_worked_example():
    p = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])[:, None]  # nine cancers, no normal
    quantiles = fit_conformal(np.hstack([1 - p, p]), np.ones(9, int), 0.9)
    assert quantiles == pytest.approx([1.0, 0.9])  # rank ceil(10 * 0.9) = 9 of 9; no normal slice: never excluded
    assert fit_conformal(np.hstack([1 - p, p]), np.ones(9, int), 0.91) == [1.0, 1.0]  # rank 10 of 9
    sets = prediction_sets(np.array([[0.2, 0.8], [0.95, 0.05]]), [0.9, 0.9])
    assert sets.tolist() == [[True, True], [True, False]]
    assert prediction_sets(np.array([[0.5, 0.5]]), [0.1, 0.1]).tolist() == [[False, False]]


def test_wilson_of_published_examples():
    """Newcombe 1998, table I, method 3 (without continuity correction)."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)
    with pytest.raises(ValueError, match="0 of 0"):
        wilson(0, 0)


def test_calibration_error_of_a_worked_example():
    scores, y = np.array([0.1, 0.15, 0.7, 0.9, 0.95]), np.array([0, 1, 1, 1, 0])
    # Four bins: {0.1, 0.15} mean 0.125 observed 0.5; {0.7} observed 1; {0.9, 0.95} mean 0.925 observed 0.5.
    assert expected_calibration_error(scores, y, 4) == pytest.approx((2 * 0.375 + 0.3 + 2 * 0.425) / 5)
    # Two bins of equal mass: {0.1, 0.15} and {0.7, 0.9, 0.95}, mean 0.85 observed 2/3.
    assert expected_calibration_error(scores, y, 2, adaptive=True) == pytest.approx(
        (2 * 0.375 + 3 * (0.85 - 2 / 3)) / 5
    )
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([0, 1])) == 0
    with pytest.raises(ValueError, match="2 scores and 1"):
        expected_calibration_error(np.array([0.1, 0.2]), np.array([1]))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        expected_calibration_error(np.array([1.2]), np.array([1]))


def test_reliability_table_counts_every_slice_once():
    scores, y = np.array([0.05, 0.1, 0.1, 0.55, 0.95]), np.array([0, 0, 1, 1, 1])
    rows = reliability_table(scores, y, 10)
    assert [row["n"] for row in rows] == [3, 1, 1]  # bins are closed on the right: 0.1 is in the first
    assert rows[0]["score"] == pytest.approx(0.25 / 3)
    assert rows[0]["observed"] == pytest.approx(1 / 3)
    assert (rows[0]["low"], rows[0]["high"]) == wilson(1, 3)


def test_risk_falls_where_the_confident_are_right():
    scores, y = np.array([0.02, 0.98, 0.55, 0.45, 0.5]), np.array([0, 1, 0, 1, 1])
    coverage, risk = risk_coverage(scores, y, 0.5)
    assert coverage == pytest.approx([0.4, 0.8, 1.0])  # 0.02 and 0.98 are equally sure
    assert risk == pytest.approx([0, 0.5, 0.4])
    assert risk_coverage(np.array([0.0, 1.0]), np.array([0, 1]), 0.5)[1].tolist() == [0.0]
