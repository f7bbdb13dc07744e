import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk

from chestct.config.schema import classes_of
from chestct.errors import DataError
from chestct.models.lightning_module import metric_collection
from chestct.models.predictions import output_names
from chestct.stats import metrics
from chestct.stats.bootstrap import effective_size
from chestct.stats.calibration import to_scores, wilson
from chestct.stats.metrics import Estimate, _ranking, auroc_difference, sample_of, statistics


def table(targets, scores, groups=None):
    scores = np.asarray(scores, float).reshape(len(targets), -1)
    names = output_names("binary" if scores.shape[1] == 1 else "subtype")
    frame = pd.DataFrame({"target": targets, "group": range(len(targets)) if groups is None else groups})
    return frame.assign(**{f"score_{name}": scores[:, i] for i, name in enumerate(names)})


def decided(frame, task, scores=None, threshold=0.5):
    """The table with the decisions that these scores, or its own, give at a threshold."""
    scores = frame.filter(like="score_").to_numpy() if scores is None else scores
    scores = np.hstack([1 - scores, scores]) if task == "binary" else scores
    probabilities = {f"probability_{name}": scores[:, i] for i, name in enumerate(classes_of(task))}
    flagged = scores[:, 1] if task == "binary" else 1 - scores[:, 0]
    return frame.assign(flagged=flagged >= threshold, **probabilities)


def measure(frame, task, scores=None, threshold=0.5, **settings):
    """`metrics.measure`, of the table's own scores unless others are given."""
    return metrics.measure(decided(frame, task, scores, threshold), task, **settings)


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


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_metrics_equal_those_of_training_and_of_scikit_learn_with_ties(task):
    frame = drawn(200, task, decimals=1 if task == "binary" else 3)
    if task == "binary":
        frame = frame.replace({"score_cancer": {0.5: 0.6}})  # torchmetrics calls 0.5 normal
    scores = frame.filter(like="score_").to_numpy().copy()
    target = frame["target"].to_numpy().copy()
    training = metric_collection(scores.shape[1], "test")
    training.update(*map(torch.from_numpy, (scores[:, 0] if task == "binary" else scores, target)))
    theirs = {name.removeprefix("test/").replace("recall", "sensitivity"): v for name, v in training.compute().items()}
    theirs["log_loss"] = sk.log_loss(target, scores)
    theirs["brier"] = sk.brier_score_loss(target, scores, scale_by_half=task == "binary")
    ours = measure(frame, task, resamples=20)
    for name, value in theirs.items():
        if task == "subtype" and name == "specificity":
            continue  # a macro mean over subtypes is not reported
        assert ours[name].value == pytest.approx(float(value), abs=1e-6), name
    if task == "binary":
        assert ours["npv"].value == pytest.approx(sk.precision_score(1 - target, scores[:, 0] < 0.5))
    else:
        assert ours["auroc/squamous"].value == pytest.approx(sk.roc_auc_score(target == 3, scores[:, 3]))
        assert ours["precision/squamous"].value == pytest.approx(sk.precision_score(target == 3, scores.argmax(1) == 3))
        reduced = measure(table(target > 0, 1 - scores[:, 0]), "binary", resamples=20)
        assert all(ours[f"cancer/{n}"].value == reduced[n].value for n in ("auroc", "sensitivity", "specificity"))


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_a_weight_counts_a_slice_as_often_as_repeating_it(task):
    frame = drawn(150, task)
    weights = np.random.default_rng(100).integers(0, 4, (4, 150))
    frame = decided(frame, task, threshold=0.4)
    weighted = statistics(sample_of(frame, task), weights.astype(float))
    for i, times in enumerate(weights):
        repeated = frame.loc[np.repeat(frame.index, times)]
        plain = statistics(sample_of(repeated, task), np.ones((1, len(repeated))))
        assert {n: v[i] for n, v in weighted.items()} == pytest.approx({n: v[0] for n, v in plain.items()}, nan_ok=True)


def test_calibration_error_of_a_worked_example():
    scores = [0.1, 0.12, 0.7, 0.9, 0.95]  # the first two share one of fifteen bins
    ece = measure(table([0, 1, 1, 1, 0], scores), "binary", resamples=20)["ece"].value
    assert ece == pytest.approx((abs(0.1 + 0.12 - 1) + 0.3 + 0.1 + 0.95) / 5)


def test_no_ranking_is_better_than_perfect():
    rng, positive = np.random.default_rng(0), np.arange(80) < 48
    perfect = _ranking(positive + rng.random(80) / 2, positive, rng.random((200, 80)))
    assert [values.max() for values in perfect] == [1, 1]  # sums of weights had made it 1.0000000000000004


def test_a_worked_example_with_scores_and_threshold_of_its_own():
    scores = to_scores(np.array([-2, -1, 1, 2, 1.5, -0.5, 3, 0.5])[:, None])
    found = measure(table([0, 0, 0, 1, 1, 1, 1, 1], 1 - scores), "binary", scores / 2, 0.25)
    assert found["auroc"].value == pytest.approx(13 / 15)  # pairs in the right order
    for name, k, n in (("sensitivity", 4, 5), ("specificity", 2, 3), ("accuracy", 6, 8), ("precision", 4, 5)):
        assert found[name] == Estimate(pytest.approx(k / n), *map(pytest.approx, wilson(k, n)), n, n), name
    assert (found["auroc"].slices, found["auroc"].groups) == (8, 8)


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_values_lie_within_their_intervals_and_repeat_with_the_seed(task):
    frame = drawn(80, task, groups=50)
    found = measure(frame, task, resamples=300)
    assert not [name for name, e in found.items() if not (e.low <= e.value <= e.high and e.low < e.high)]
    assert found == measure(frame, task, resamples=300)
    assert found["auroc"] != measure(frame, task, resamples=300, seed=1)["auroc"]


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
    for name in ("auroc", "accuracy", "sensitivity", "specificity", "brier", "f1"):
        assert width(found[name]) == pytest.approx(width(alone[name]), rel=0.1), name
        assert width(found[name]) > 1.7 * width(naive[name]), name


def test_a_difference_to_scores_that_say_nothing_has_the_interval_of_the_auroc_over_groups():
    frame = clustered(0)
    positive, scores, chance = frame["target"] == 1, frame["score_cancer"].to_numpy(), np.zeros(len(frame))
    margin = auroc_difference(scores, chance, positive.to_numpy(), frame["group"], 2000, 0)
    auroc = measure(frame, "binary")["auroc"]
    expected = [value - 0.5 for value in (auroc.value, auroc.low, auroc.high)]
    assert [margin.value, margin.low, margin.high] == pytest.approx(expected)
    assert (margin.slices, margin.groups) == (300, 60)
    naive = auroc_difference(scores, chance, positive.to_numpy(), pd.Series(range(300)), 2000, 0)
    assert width(margin) > 1.7 * width(naive)


def test_a_difference_is_that_of_both_scores_in_the_same_draws():
    frame = clustered(0)
    positive, scores = (frame["target"] == 1).to_numpy(), frame["score_cancer"].to_numpy()
    close = scores + np.random.default_rng(1).normal(size=len(scores)) / 100
    forth, back = (
        auroc_difference(*pair, positive, frame["group"], 500, 0) for pair in ((scores, close), (close, scores))
    )
    assert 0 < width(forth) < width(measure(frame, "binary", resamples=500)["auroc"]) / 10
    assert [forth.value, forth.low, forth.high] == pytest.approx([-back.value, -back.high, -back.low])
    few = frame["group"].where(~positive, frame["group"] % 9 + 100)
    assert auroc_difference(scores, close, positive, few, 50, 0).reason == "no interval: 9 groups of a class, needs 10"


def test_the_interval_of_a_calibration_error_holds_one_of_zero_and_one_that_is_there():
    rng = np.random.default_rng(0)
    for off, runs in ((0.0, 40), (0.2, 40)):
        held = []
        for _ in range(runs):
            scores = rng.uniform(0.2, 0.8, 200)
            scores = scores[np.abs(scores - 0.5) > 1 / 30]  # the bin in the middle, where both signs would meet
            y = rng.random(len(scores)) < scores + np.sign(scores - 0.5) * off  # what is true of such a score
            ece = measure(table(y.astype(int), scores), "binary", resamples=200)["ece"]
            held.append(ece.low <= off <= ece.high)
        assert np.mean(held) >= 0.85, off


@pytest.mark.slow
def test_intervals_of_clustered_slices_hold_the_truth_as_often_as_they_say():
    """200 draws of 60 patients: near 95 % with groups, far below when slices count as independent."""
    truth = {"auroc": 0.8556, "sensitivity": 0.7734}  # Phi(1.5 / sqrt 2), Phi(0.75)
    hits, naive = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0)
    for seed in range(200):
        frame = clustered(seed, shared=0.8)
        for count, part in ((hits, frame), (naive, frame.assign(group=range(len(frame))))):
            found = measure(part, "binary", resamples=400)
            for name, value in truth.items():
                count[name] += found[name].low <= value <= found[name].high
    assert all(180 <= count <= 199 for count in hits.values())
    assert max(naive.values()) <= 160


def test_the_effective_size_of_a_share_counts_groups_not_copies():
    hit = np.random.default_rng(0).random(100) < 0.7
    assert effective_size(hit, np.arange(100)) == pytest.approx(100)
    assert effective_size(np.repeat(hit, 4), np.repeat(np.arange(100), 4)) == pytest.approx(100, rel=0.05)
    assert effective_size(np.ones(12, bool), np.repeat([0, 1, 2], [10, 1, 1])) == pytest.approx(144 / 102)
    # Two groups that happen to agree are still two groups.
    assert 1 <= effective_size(np.tile([1, 1, 1, 0], 20), np.repeat([0, 1], 40)) < 3


def test_a_perfect_score_has_an_interval_as_wide_as_its_smaller_class_deserves():
    y = np.repeat([0, 1], [8, 200])
    found = measure(table(y, np.linspace(0.01, 0.99, 208)), "binary", threshold=0.045)
    least = wilson(8, 8)[0]
    assert found["specificity"] == Estimate(1.0, pytest.approx(least), 1.0, 8, 8)
    assert found["sensitivity"].low == pytest.approx(wilson(200, 200)[0])
    assert found["auroc"].low == pytest.approx(least, abs=1e-6)
    assert found["balanced_accuracy"].low == pytest.approx((1 + least) / 2)
    assert found["average_precision"].low < 0.995
    copies = measure(table(y, np.linspace(0.01, 0.99, 208), np.r_[np.arange(8) // 2, 4 + np.arange(200)]), "binary")
    assert copies["auroc"].low == pytest.approx(wilson(4, 4)[0], abs=1e-6)


@pytest.mark.parametrize("n", [8, 80])
def test_where_all_is_called_cancer_accuracy_is_no_surer_than_sensitivity_and_specificity(n):
    found = measure(table(np.repeat([0, 1], n), np.linspace(0.6, 0.9, 2 * n)), "binary")
    room = 1 - wilson(n, n)[0]
    assert found["specificity"].high == pytest.approx(room)
    balanced = found["balanced_accuracy"]
    assert (balanced.low, balanced.high) == pytest.approx(((1 - room) / 2, (1 + room) / 2))


@pytest.mark.parametrize(("scores", "groups"), [([0.3, 0.2, 0.3], [0, 0, 0]), ([0.3, 0.3, 0.3], [0, 1, 2])])
def test_no_interval_is_without_width_or_of_a_single_group(scores, groups):
    found = measure(table([0, 0, 0], scores, groups), "binary")
    assert found["brier"].value == pytest.approx(np.mean(np.square(scores)))
    assert found["brier"].low is None
    assert found["brier"].reason.startswith("no interval: a single group")
    assert all(estimate.low is None or width(estimate) > 0.01 for estimate in found.values())


@pytest.mark.parametrize(("task", "prefix"), [("binary", ""), ("subtype", "cancer/")])
def test_metrics_of_one_class_are_none_with_the_reason_or_rest_on_that_class(task, prefix):
    frame = drawn(30, task)
    found = measure(frame[frame["target"] > 0], task, resamples=50)
    for name in ("auroc", "balanced_accuracy", "average_precision", f"{prefix}specificity"):
        assert (found[name].value, found[name].low, found[name].high) == (None, None, None), name
        assert found[name].reason == "no normal slices in this split"
    for name in ("accuracy", "brier", "log_loss", "ece", f"{prefix}sensitivity"):
        assert found[name].value is not None, name


def test_metrics_of_a_class_never_called_are_none_with_the_reason():
    found = measure(table([0, 1, 0, 1], [0.1, 0.2, 0.1, 0.3]), "binary")
    assert found["precision"] == Estimate(None, None, None, 0, 0, "no slice was called cancer")
    assert found["f1"].value == 0.0
    found = measure(table([0, 1, 2, 3], np.full((4, 4), [0.4, 0.3, 0.2, 0.1])), "subtype")
    assert found["precision"].reason == "a class is never called"


@pytest.mark.parametrize("targets", [[0, 1], [1, 1]])
@pytest.mark.parametrize("scores", [[0.2, 0.9], [0.5, 0.5], [0.0, 1.0]])
def test_two_slices_give_wide_intervals_or_none_and_never_nan(targets, scores):
    found = measure(table(targets, scores), "binary", resamples=200)
    assert "nan" not in str(found).lower()
    assert all(estimate.low is not None or estimate.reason for estimate in found.values())
    assert width(found["accuracy"]) > 0.6


def test_an_empty_split_and_scores_that_are_not_finite_are_named():
    frame = drawn(10)
    with pytest.raises(DataError, match="this split is empty"):
        measure(frame.iloc[:0], "binary")
    frame.loc[3, "score_cancer"] = np.nan
    with pytest.raises(DataError, match="1 of 10 slices have no finite score"):
        measure(frame, "binary")
