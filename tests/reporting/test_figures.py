import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import roc_auc_score

from chestct.reporting import figures as plots
from chestct.reporting.canvas import png, svg
from tests.evaluation.evaluations import draw, made_up


@pytest.mark.parametrize(("task", "classes"), [("binary", ["cancer"]), ("subtype", ["normal", "adenocarcinoma"])])
def test_points_of_the_roc_curve_give_the_auroc(task, classes):
    found = made_up(task)
    for name in classes:
        part = pd.DataFrame([point for point in plots.data(found)["roc"] if point["class"] == name])
        area = np.trapezoid(part["tpr"], part["fpr"])
        truth = found.test["label" if task == "binary" else "subtype"] == name
        assert area == pytest.approx(roc_auc_score(truth, found.test[f"probability_{name}"]), abs=1e-12)


def test_points_of_the_confusion_count_every_slice_at_the_threshold():
    found = made_up()
    table = pd.DataFrame(plots.data(found)["confusion"])
    flagged = (found.test["probability_cancer"] >= found.point.threshold).sum()
    assert len(table) == 80
    assert (table["predicted"] == "cancer").sum() == flagged


def test_reliability_is_told_before_and_after_calibration():
    points = pd.DataFrame(plots.data(made_up())["reliability"])
    assert points.groupby("when")["n"].sum().to_dict() == {"before": 80, "after": 80}


def test_curves_of_one_class_are_a_reason():
    _labels, logits = draw(8, "binary", 0)
    found = made_up(test=(["normal"] * 8, logits))
    drawn = plots.figures(found)
    assert drawn["roc"] == "n/a: no cancer slices in test"
    assert isinstance(drawn["scores"], Figure)
    assert plots.data(found)["roc"] == []


def test_figures_become_svg_without_anything_from_outside():
    text = svg(plots.figures(made_up())["roc"], "roc")
    assert text.startswith("<svg ")
    assert not re.search(r"https?:|<metadata|font-family|<\?xml", text)
    assert all(name.startswith("roc-") for name in re.findall(r' id="([^"]+)"', text))
    assert "operating point" in text  # text stays text
    assert "fill: #000" not in text


def test_figures_become_png_on_white():
    image = png(plots.draw_confusion(made_up("subtype")))
    assert image.startswith(b"\x89PNG")


def test_scores_of_0_and_1_can_be_drawn():
    labels, logits = draw(20, "binary", 0)
    drawn = svg(plots.figures(made_up(test=(labels, 1000 * logits)))["scores"], "scores")
    assert not re.search(r"\b(inf|nan)\b", drawn)


def test_the_history_is_drawn_with_what_it_has(tmp_path: Path):
    history = pd.DataFrame({"epoch": [0, 1], "train/loss": [1.0, 0.5], "valid/loss": [1.1, 0.7]})
    plots.draw_history(history, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 500
