import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from chestct.reporting import figures
from tests.evaluation.evaluations import draw, made_up

CURVES = ("roc", "precision_recall", "reliability", "decision_curve", "risk_coverage")


@pytest.mark.parametrize(("task", "classes"), [("binary", ["cancer"]), ("subtype", ["normal", "adenocarcinoma"])])
def test_points_of_the_roc_curve_give_the_auroc(task, classes):
    evaluation = made_up(task)
    for name in classes:
        part = pd.DataFrame([point for point in figures.points(evaluation)["roc"] if point["class"] == name])
        area = np.trapezoid(part["tpr"], part["fpr"])
        truth = evaluation.test["label" if task == "binary" else "subtype"] == name
        assert area == pytest.approx(roc_auc_score(truth, evaluation.test[f"probability_{name}"]), abs=1e-12)


def test_points_of_the_confusion_count_every_slice_at_the_threshold():
    evaluation = made_up()
    table = pd.DataFrame(figures.points(evaluation)["confusion"])
    flagged = (evaluation.test["probability_cancer"] >= evaluation.point.threshold).sum()
    assert len(table) == 80
    assert (table["predicted"] == "cancer").sum() == flagged


def test_reliability_is_given_before_and_after_calibration():
    points = pd.DataFrame(figures.points(made_up())["reliability"])
    assert points.groupby("when")["n"].sum().to_dict() == {"before": 80, "after": 80}


def test_curves_of_one_class_are_a_reason():
    _labels, logits = draw(8, "binary", 0)
    evaluation = made_up(test=(["normal"] * 8, logits))
    drawn = figures.figures(evaluation)
    assert drawn["roc"] == "n/a: no cancer slices in test"
    assert isinstance(drawn["scores"], bytes)
    assert figures.points(evaluation)["roc"] == []


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_every_figure_is_one_svg_that_fetches_nothing_and_is_the_same_each_time(task):
    evaluation = made_up(task)
    drawn = figures.figures(evaluation)
    assert set(drawn) == {*CURVES, "scores", "confusion"}
    for svg in drawn.values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert not re.search(rb'(href|src)="(?!#|data:)|url\((?!#)|@import', svg)
    assert figures.figures(evaluation) == drawn


def test_scores_of_0_and_1_can_be_drawn():
    labels, logits = draw(20, "binary", 0)
    drawn = figures.figures(made_up(test=(labels, 1000 * logits)))["scores"]
    assert not re.search(rb'"[^"]*\b(inf|nan)\b', drawn)


def test_the_history_is_drawn_with_what_it_has(tmp_path: Path):
    history = pd.DataFrame({"epoch": [0, 1], "train/loss": [1.0, 0.5], "valid/loss": [1.1, 0.7]})
    figures.draw_history(history, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 500
