import numpy as np
import pytest

from chestct.config.schema import EvaluationConfig
from chestct.models.operating_point import OperatingPoint, source_weights
from chestct.stats.calibration import Calibration

CFG = EvaluationConfig(threshold="sensitivity>=0.75")


def test_each_source_counts_alike_in_the_threshold_however_many_slices_it_has() -> None:
    # 90 cancers of a large source score high, 10 of a small one low, normals from below all to between the two.
    logits = np.concatenate([np.linspace(2, 3, 90), np.linspace(-3, -2, 10), np.linspace(-4, 1, 100)])[:, None]
    targets = np.repeat([1, 0], 100)
    sources = ["large"] * 90 + ["small"] * 10 + ["large"] * 50 + ["small"] * 50
    over_slices, over_sources = (OperatingPoint.fit(logits, targets, CFG, given) for given in ((), sources))
    cancer = over_slices.probabilities(logits)[:, 1]
    assert (cancer[:90] >= over_slices.threshold).mean() >= 75 / 90  # slices: the small source may be missed
    assert not (cancer[90:100] >= over_slices.threshold).any()
    assert (cancer[90:100] >= over_sources.threshold).mean() == 0.5  # with 1.0 in the large one: 0.75 in the mean


def test_conformal_sets_hold_what_cannot_be_excluded_and_may_be_empty() -> None:
    point = OperatingPoint(Calibration(), 0.5, "half", 0.9, (0.9, 0.1))
    probabilities = np.array([[0.2, 0.8], [0.5, 0.5], [0.05, 0.95], [0.0999, 0.8]])
    assert point.sets(probabilities).tolist() == [[True, False], [True, False], [False, True], [False, False]]


def test_the_slices_of_a_class_of_a_source_weigh_one_together() -> None:
    weights = source_weights(["a", "a", "a", "b"], np.array([True, True, False, True]))
    assert weights.tolist() == pytest.approx([1 / 2, 1 / 2, 1, 1])
