import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk

from chestct.errors import DataError
from chestct.models.lightning_module import metric_collection
from chestct.models.predictions import output_names, to_scores
from chestct.stats.bootstrap import draws, effective_size
from chestct.stats.calibration import decision_curve, expected_calibration_error, wilson
from chestct.stats.metrics import (
    Estimate,
    confusion,
    measure,
    predictive_values,
    sample_of,
    statistics,
    to_plain,
)

SUBTYPES = ("normal", "adenocarcinoma", "large_cell", "squamous")


def table(targets, scores, groups=None):
    scores = np.asarray(scores, float).reshape(len(targets), -1)
    names = output_names("binary" if scores.shape[1] == 1 else "subtype")
    frame = pd.DataFrame({"target": targets, "group": range(len(targets)) if groups is None else groups})
    return frame.assign(**{f"score_{name}": scores[:, i] for i, name in enumerate(names)})


def drawn(n, task="binary", seed=0, decimals=1, groups=None):
    """A table whose scores are rounded so that many tie."""
    rng = np.random.default_rng(seed)
    outputs = 1 if task == "binary" else 4
    targets = rng.integers(0, max(2, outputs), n)
    signal = (2 * targets - 1)[:, None] if task == "binary" else 2 * np.eye(4)[targets]
    scores = to_scores(signal + rng.normal(size=(n, outputs)) * 1.5).round(decimals)
    if task == "subtype":
        scores[:, 0] = 1 - scores[:, 1:].sum(1)
        scores = scores.clip(0, 1)
    return table(targets, scores, None if groups is None else rng.integers(0, groups, n))


def values(estimates):
    return {name: estimate.value for name, estimate in estimates.items()}


def sklearn_binary(y, p, threshold, weight):
    w = {"sample_weight": weight}
    called = p >= threshold
    fpr, tpr, _ = sk.roc_curve(y, p, drop_intermediate=False, **w)
    return {
        "auroc": sk.roc_auc_score(y, p, **w),
        "average_precision": sk.average_precision_score(y, p, **w),
        "accuracy": sk.accuracy_score(y, called, **w),
        "balanced_accuracy": sk.balanced_accuracy_score(y, called, **w),
        "sensitivity": sk.recall_score(y, called, **w),
        "specificity": sk.recall_score(y, called, pos_label=0, **w),
        "precision": sk.precision_score(y, called, **w),
        "npv": sk.precision_score(y, called, pos_label=0, **w),
        "f1": sk.f1_score(y, called, **w),
        "mcc": sk.matthews_corrcoef(y, called, **w),
        "brier": sk.brier_score_loss(y, p, **w),
        "log_loss": sk.log_loss(y, p, **w),
        "sensitivity_at_90_specificity": tpr[fpr <= 0.1 + 1e-9].max(),
        "sensitivity_at_95_specificity": tpr[fpr <= 0.05 + 1e-9].max(),
        "specificity_at_90_sensitivity": 1 - fpr[tpr >= 0.9 - 1e-9].min(),
        "specificity_at_95_sensitivity": 1 - fpr[tpr >= 0.95 - 1e-9].min(),
    }


def sklearn_subtype(y, p, threshold, weight):
    w = {"sample_weight": weight}
    called, one_hot, eye = p.argmax(1), np.eye(4)[y], range(4)
    macro = {"average": "macro", **w}
    recall, precision = (f(y, called, average=None, **w) for f in (sk.recall_score, sk.precision_score))
    auroc = [sk.roc_auc_score(one_hot[:, k], p[:, k], **w) for k in eye]
    flagged = 1 - p[:, 0] >= threshold
    return {
        "accuracy": sk.accuracy_score(y, called, **w),
        "balanced_accuracy": sk.balanced_accuracy_score(y, called, **w),
        "sensitivity": sk.recall_score(y, called, **macro),
        "specificity": np.mean([sk.recall_score(y == k, called == k, pos_label=0, **w) for k in eye]),
        "precision": sk.precision_score(y, called, **macro),
        "f1": sk.f1_score(y, called, **macro),
        "mcc": sk.matthews_corrcoef(y, called, **w),
        "auroc": np.mean(auroc),
        "average_precision": sk.average_precision_score(one_hot, p, **macro),
        "brier": np.average(((p - one_hot) ** 2).sum(1), weights=weight),
        "log_loss": np.average(-np.log(p[np.arange(len(y)), y].clip(np.finfo(float).eps)), weights=weight),
        "cancer/auroc": sk.roc_auc_score(y > 0, 1 - p[:, 0], **w),
        "cancer/sensitivity": sk.recall_score(y > 0, flagged, **w),
        "cancer/specificity": sk.recall_score(y > 0, flagged, pos_label=0, **w),
        **{f"auroc/{name}": auroc[k] for k, name in enumerate(SUBTYPES)},
        **{f"sensitivity/{name}": recall[k] for k, name in enumerate(SUBTYPES)},
        **{f"precision/{name}": precision[k] for k, name in enumerate(SUBTYPES)},
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("task", "theirs"), [("binary", sklearn_binary), ("subtype", sklearn_subtype)])
def test_every_metric_equals_scikit_learns_with_ties_and_with_weights(task, theirs, seed):
    frame = drawn(150, task, seed)
    y = frame["target"].to_numpy()
    p = frame.filter(like="score_").to_numpy()
    weights = np.vstack([np.ones(150), np.random.default_rng(seed + 100).integers(0, 4, (6, 150))]).astype(float)
    ours = statistics(sample_of(frame, task, None, 0.4), weights)
    for i, weight in enumerate(weights):
        expected = theirs(y, p[:, 0] if task == "binary" else p, 0.4, weight)
        assert {name: float(v[i]) for name, v in ours.items() if name != "ece"} == pytest.approx(expected, abs=1e-12)
    assert values(measure(frame, task, threshold=0.4, resamples=20)) == pytest.approx(
        {name: float(v[0]) for name, v in ours.items()}
    )


def test_calibration_error_is_of_the_score_or_of_the_top_label():
    frame = drawn(300)
    expected = expected_calibration_error(frame["score_cancer"].to_numpy(), frame["target"].to_numpy())
    assert measure(frame, "binary", resamples=20)["ece"].value == pytest.approx(expected)
    frame = drawn(300, "subtype")
    p = frame.filter(like="score_").to_numpy()
    expected = expected_calibration_error(p.max(1), (p.argmax(1) == frame["target"]).to_numpy())
    assert measure(frame, "subtype", resamples=20)["ece"].value == pytest.approx(expected)


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_metrics_equal_those_of_training(task):
    frame = drawn(200, task, decimals=3)
    scores = torch.from_numpy(frame.filter(like="score_").to_numpy().copy())
    theirs = metric_collection(scores.shape[1], "test")
    theirs.update(scores[:, 0] if task == "binary" else scores, torch.from_numpy(frame["target"].to_numpy()))
    ours = measure(frame, task, resamples=20)
    for name, value in theirs.compute().items():
        name = name.removeprefix("test/").replace("recall", "sensitivity")
        assert ours[name].value == pytest.approx(float(value), abs=1e-6), name


def test_a_worked_example():
    scores = to_scores(np.array([-2, -1, 1, 2, 1.5, -0.5, 3, 0.5])[:, None])
    found = measure(table([0, 0, 0, 1, 1, 1, 1, 1], scores), "binary")
    assert found["auroc"].value == pytest.approx(13 / 15)  # pairs in the right order
    for name, k, n in (("sensitivity", 4, 5), ("specificity", 2, 3), ("accuracy", 6, 8), ("precision", 4, 5)):
        estimate = found[name]
        assert (estimate.slices, estimate.groups, estimate.reason) == (n, n, "")
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((k / n, *wilson(k, n)))
    assert (found["auroc"].slices, found["auroc"].groups) == (8, 8)


def test_calibrated_scores_and_threshold_are_taken_where_given():
    frame = drawn(100)
    scores = frame[["score_cancer"]].to_numpy() / 2
    halved = measure(frame, "binary", scores, 0.25, resamples=20)
    plain = measure(frame, "binary", resamples=20)
    assert halved["accuracy"] == plain["accuracy"]
    assert halved["brier"].value == pytest.approx(sk.brier_score_loss(frame["target"], scores[:, 0]))
    with pytest.raises(ValueError, match=r"\[99, 1\] for 100 slices"):
        measure(frame, "binary", scores[1:])


def test_confusion_counts_actual_by_called():
    frame = table([0, 0, 0, 1, 1], [0.1, 0.2, 0.8, 0.4, 0.9])
    assert confusion(frame, "binary").tolist() == [[2, 1], [1, 1]]
    assert confusion(frame, "binary", threshold=0.3).tolist() == [[2, 1], [0, 2]]
    frame = drawn(80, "subtype")
    expected = sk.confusion_matrix(frame["target"], frame.filter(like="score_").to_numpy().argmax(1))
    assert (confusion(frame, "subtype") == expected).all()


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_values_lie_within_their_intervals_and_repeat_with_the_seed(task):
    frame = drawn(80, task, groups=50)
    found = measure(frame, task, resamples=300)
    for name, estimate in found.items():
        assert estimate.low <= estimate.value <= estimate.high, name
        assert estimate.low < estimate.high, name
    assert found == measure(frame, task, resamples=300)
    assert found["auroc"] != measure(frame, task, resamples=300, seed=1)["auroc"]


def test_draws_take_whole_groups_and_as_many_as_there_are():
    group = np.array([0, 0, 1, 2, 2, 2])
    weights = np.concatenate(list(draws(group, 500, 0)))
    assert weights.shape == (500, 6)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()
    assert weights.mean() == pytest.approx(1, abs=0.05)


def clustered(seed, groups=60, size=5, shared=1.0):
    """Slices of a group share most of their noise, as slices of one patient do; true AUROC is the same throughout."""
    rng = np.random.default_rng(seed)
    y = np.repeat(rng.integers(0, 2, groups), size)
    noise = np.sqrt(shared) * np.repeat(rng.normal(size=groups), size)
    noise += np.sqrt(1 - shared) * rng.normal(size=groups * size)
    return table(y, to_scores((1.5 * y - 0.75 + noise)[:, None]), np.repeat(np.arange(groups), size))


def width(estimate):
    return estimate.high - estimate.low


def test_copies_do_not_narrow_an_interval():
    frame = clustered(0)
    found = measure(frame, "binary")
    alone = measure(frame[~frame["group"].duplicated()], "binary")
    naive = measure(frame.assign(group=range(len(frame))), "binary")
    for name in ("auroc", "accuracy", "sensitivity", "specificity", "brier", "mcc"):
        assert width(found[name]) == pytest.approx(width(alone[name]), rel=0.1), name
        assert width(found[name]) > 1.7 * width(naive[name]), name


@pytest.mark.slow
def test_intervals_of_clustered_slices_hold_the_truth_as_often_as_they_say():
    """200 draws of 60 patients: near 95 % with groups, far below when slices count as independent."""
    truth = {"auroc": 0.8556, "sensitivity": 0.7734}  # Phi(1.5 / sqrt 2), Phi(0.75)
    hits, naive = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0)
    for seed in range(200):
        frame = clustered(seed, shared=0.8)
        for count, found in (
            (hits, measure(frame, "binary", resamples=400)),
            (naive, measure(frame.assign(group=range(len(frame))), "binary", resamples=400)),
        ):
            for name, value in truth.items():
                count[name] += found[name].low <= value <= found[name].high
    assert min(hits.values()) >= 180
    assert max(hits.values()) <= 199
    assert max(naive.values()) <= 160


def test_the_effective_size_of_a_share_counts_groups_not_copies():
    rng = np.random.default_rng(0)
    hit = rng.random(100) < 0.7
    assert effective_size(hit, np.arange(100)) == pytest.approx(100)
    assert effective_size(np.repeat(hit, 4), np.repeat(np.arange(100), 4)) == pytest.approx(100, rel=0.05)
    assert effective_size(np.ones(12, bool), np.repeat([0, 1, 2], [10, 1, 1])) == pytest.approx(144 / 102)
    assert effective_size(np.ones(12, bool), np.zeros(12, int)) == 1
    alike = effective_size(np.tile([1, 1, 1, 0], 20), np.repeat([0, 1], 40))
    assert 1 <= alike < 3  # two groups that happen to agree are still two groups


def test_a_perfect_score_has_an_interval_as_wide_as_its_smaller_class_deserves():
    y = np.repeat([0, 1], [8, 200])
    found = measure(table(y, np.linspace(0.01, 0.99, 208)), "binary", threshold=0.045)
    least = wilson(8, 8)[0]
    assert found["specificity"] == Estimate(1.0, pytest.approx(least), 1.0, 8, 8)
    assert found["sensitivity"].low == pytest.approx(wilson(200, 200)[0])
    assert found["auroc"].low == pytest.approx(least, abs=1e-6)
    assert found["balanced_accuracy"].low == pytest.approx((1 + least) / 2)
    for name in ("average_precision", "f1", "mcc", "specificity_at_90_sensitivity", "sensitivity_at_90_specificity"):
        assert found[name].value == 1.0, name
        assert found[name].low < 0.995, name
    copies = measure(table(y, np.linspace(0.01, 0.99, 208), np.r_[np.arange(8) // 2, 4 + np.arange(200)]), "binary")
    assert copies["auroc"].low == pytest.approx(wilson(4, 4)[0], abs=1e-6)


def test_a_perfect_subtype_model_has_intervals_too():
    y = np.repeat(np.arange(4), 12)
    found = measure(table(y, 0.97 * np.eye(4)[y] + 0.0075), "subtype")
    for name in ("auroc", "auroc/squamous", "sensitivity/squamous", "balanced_accuracy", "f1", "mcc", "accuracy"):
        assert found[name].value == pytest.approx(1.0), name
        assert 0.3 < found[name].low < 0.97, name
    assert found["auroc/squamous"].low == pytest.approx(wilson(12, 12)[0], abs=1e-6)


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_metrics_of_one_class_are_none_with_the_reason_or_rest_on_that_class(task):
    frame = drawn(30, task)
    found = measure(frame[frame["target"] > 0], task, resamples=50)
    for name in (
        "auroc",
        "balanced_accuracy",
        "average_precision",
        ("cancer/" if task == "subtype" else "") + "specificity",
    ):
        assert found[name].value is None, name
        assert (found[name].low, found[name].high) == (None, None)
        assert found[name].reason == "no normal slices in this split"
    for name in ("accuracy", "brier", "log_loss", "ece", "sensitivity" if task == "binary" else "cancer/sensitivity"):
        assert found[name].value is not None, name
    assert "NaN" not in json.dumps(to_plain(found))


def test_metrics_of_a_class_never_called_are_none_with_the_reason():
    found = measure(table([0, 1, 0, 1], [0.1, 0.2, 0.1, 0.3]), "binary")
    assert found["precision"] == Estimate(None, None, None, 0, 0, "no slice was called cancer")
    assert found["mcc"].reason == "no slice was called cancer"
    assert found["f1"].value == 0.0
    found = measure(table([0, 1, 2, 3], np.full((4, 4), [0.4, 0.3, 0.2, 0.1])), "subtype")
    assert found["precision"].reason == "no slice was called adenocarcinoma or large_cell or squamous"


@pytest.mark.parametrize("targets", [[0, 1], [1, 1]])
@pytest.mark.parametrize("scores", [[0.2, 0.9], [0.9, 0.2], [0.5, 0.5], [0.0, 1.0]])
def test_two_slices_give_wide_intervals_or_none_and_never_nan(targets, scores):
    found = measure(table(targets, scores), "binary", resamples=200)
    for name, estimate in found.items():
        assert "nan" not in str(estimate).lower(), name
        assert estimate.value is not None or estimate.reason, name
        assert (estimate.low is None) == (estimate.high is None), name
        assert estimate.low is not None or estimate.reason, name
    assert width(found["accuracy"]) > 0.6
    if targets == [0, 1]:
        assert "for want of groups" in found["auroc"].reason


def test_an_empty_split_is_named():
    with pytest.raises(DataError, match="this split is empty"):
        measure(drawn(10).iloc[:0], "binary")


def test_scores_that_are_not_finite_are_counted():
    frame = drawn(10)
    frame.loc[3, "score_cancer"] = np.nan
    with pytest.raises(DataError, match="1 of 10 slices have no finite score"):
        measure(frame, "binary")


def test_predictive_values_follow_bayes():
    found = predictive_values(0.9, 0.8, [0.01, 0.5])
    assert found[0.01]["ppv"] == pytest.approx(0.009 / (0.009 + 0.198))
    assert found[0.01]["npv"] == pytest.approx(0.792 / (0.792 + 0.001))
    assert found[0.5] == {"ppv": pytest.approx(0.9 / 1.1), "npv": pytest.approx(0.8 / 0.9)}
    assert predictive_values(0.0, 1.0, [0.1])[0.1]["ppv"] is None


def test_net_benefit_of_a_worked_example():
    """Vickers & Elkin 2006: net benefit = TP/n - FP/n * t / (1 - t)."""
    scores, y = np.array([0.1, 0.3, 0.4, 0.8]), np.array([0, 1, 0, 1])
    curve = decision_curve(scores, y, np.array([0.2, 0.5]))
    assert curve["model"].tolist() == pytest.approx([2 / 4 - 1 / 4 * 0.25, 1 / 4])
    assert curve["treat_all"].tolist() == pytest.approx([0.5 - 0.5 * 0.25, 0.0])
    assert curve["treat_none"].tolist() == [0, 0]


def test_estimates_become_plain_values():
    plain = to_plain(measure(table([0, 1, 1], [0.1, 0.8, 0.9]), "binary", resamples=50))
    assert set(plain["accuracy"]) == {"value", "low", "high", "slices", "groups"}
    assert json.loads(json.dumps(plain)) == plain
    assert all(type(v) in (float, int, str, type(None)) for row in plain.values() for v in row.values())
