import numpy as np
import pandas as pd
import pytest
import torch

from chestct.evaluation.metrics import measure
from chestct.evaluation.summary import summary
from chestct.models.classifier import metric_collection
from chestct.models.predictions import to_scores


def table(targets, logits, names=("cancer",), split="test"):
    logits = np.asarray(logits, float).reshape(len(targets), -1)
    frame = pd.DataFrame({"split": split, "target": targets, "group": range(len(targets)), "leaked": False})
    for i, name in enumerate(names):
        frame[f"logit_{name}"] = logits[:, i]
        frame[f"score_{name}"] = to_scores(logits)[:, i]
    return frame


def test_binary_metrics_of_a_worked_example():
    found = measure(table([0, 0, 0, 1, 1, 1, 1, 1], [-2, -1, 1, 2, 1.5, -0.5, 3, 0.5]), "binary")["test"]
    assert found["accuracy"] == pytest.approx(6 / 8)
    assert found["recall"] == pytest.approx(4 / 5)
    assert found["specificity"] == pytest.approx(2 / 3)
    assert found["precision"] == pytest.approx(4 / 5)
    assert found["balanced_accuracy"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert found["auroc"] == pytest.approx(13 / 15)  # pairs in the right order
    assert (found["slices"], found["slices/normal"], found["slices/cancer"]) == (8, 3, 5)


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_metrics_equal_those_of_training(task):
    rng = np.random.default_rng(0)
    names = ("cancer",) if task == "binary" else ("normal", "adenocarcinoma", "large_cell", "squamous")
    classes = max(2, len(names))
    targets = rng.integers(0, classes, 200)
    logits = rng.normal(size=(200, len(names)))
    logits[np.arange(200), np.minimum(targets, len(names) - 1)] += 1
    theirs = metric_collection(len(names), "test")
    scores = torch.from_numpy(to_scores(logits)).float()
    theirs.update(scores[:, 0] if task == "binary" else scores, torch.from_numpy(targets))
    ours = measure(table(targets, logits, names), task)["test"]
    for name, value in theirs.compute().items():
        assert ours[name.removeprefix("test/")] == pytest.approx(float(value), abs=1e-6), name


def test_undefined_metrics_are_none_with_the_reason():
    found = measure(table([1, 1], [3.0, -1.0]), "binary")["test"]
    assert found["auroc"] is None
    assert found["specificity"] is None
    assert found["undefined"] == "no normal slices in this split"
    assert found["recall"] == 0.5
    about = {"task": "binary", "split": "grouped", "synthetic": False, "leaked": 0}
    text = summary({"test": found, "about": about})
    assert "n/a" in text
    assert "nan" not in text.lower()


def test_equal_scores_are_chance():
    assert measure(table([0, 1, 0, 1], [0.3] * 4), "binary")["test"]["auroc"] == 0.5


def test_scores_of_extreme_logits_do_not_overflow():
    with np.errstate(all="raise"):
        assert to_scores(np.array([[1000.0], [-1000.0]]))[:, 0].tolist() == [1.0, 0.0]


def test_the_summary_says_first_what_the_numbers_do_not_mean():
    metrics = measure(table([0, 1], [-1.0, 1.0]), "binary")
    about = {"task": "binary", "split": "official", "synthetic": True, "leaked": 46}
    text = summary(metrics | {"about": about})
    assert text.startswith("SYNTHETIC")
    assert "LEAKY SPLIT (official): 46" in text
