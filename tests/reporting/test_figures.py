import base64
import io
import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from sklearn.metrics import roc_auc_score

from chestct.reporting.figures import figures, gallery, points
from tests.conftest import network
from tests.evaluation.evaluations import made_up, with_images


def test_points_give_the_auroc_and_count_every_slice():
    evaluation = made_up("subtype")
    part = pd.DataFrame([point for point in points(evaluation)["roc"] if point["class"] == "adenocarcinoma"])
    theirs = roc_auc_score(
        evaluation.test["subtype"] == "adenocarcinoma", evaluation.test["probability_adenocarcinoma"]
    )
    assert np.trapezoid(part["tpr"], part["fpr"]) == pytest.approx(theirs, abs=1e-12)
    evaluation = made_up()
    table = pd.DataFrame(points(evaluation)["confusion"])
    assert len(table) == 80 == sum(row["n"] for row in points(evaluation)["reliability"])
    assert (table["predicted"] == "cancer").sum() == evaluation.test["flagged"].sum()


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_every_figure_is_one_svg_that_fetches_nothing_and_is_the_same_each_time(task, tmp_path: Path):
    evaluation = made_up(task)
    history = pd.DataFrame(
        {"epoch": [0, 1], "train/loss": [1.0, 0.5], "valid/loss": [1.1, 0.7], "valid/auroc": [0.5, 1]}
    )
    history.to_csv(tmp_path / "history.csv")
    evaluation.cfg.ckpt = str(tmp_path / "checkpoints" / "best.ckpt")
    assert figures(evaluation)["held_out"] == "n/a: no source was left out"
    evaluation.held_out = evaluation.test.assign(threshold=0.3)
    drawn = figures(evaluation)
    assert set(drawn) == {"roc", "scores", "reliability", "curves", "held_out"}
    for svg in drawn.values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert not re.search(rb'(href|src)="(?!#|data:)|url\((?!#)|@import|"[^"]*\b(inf|nan)\b', svg)
    assert figures(evaluation) == drawn


def test_each_source_has_a_histogram_of_its_own_and_long_names_lie_over_nothing(monkeypatch):
    made = []
    monkeypatch.setattr("chestct.reporting.figures.Figure", lambda *a, **k: made.append(Figure(*a, **k)) or made[-1])
    evaluation, names = made_up(), [r"$\frac$ a $x$", "a_university_hospital_" + "far_away_" * 12, "west"]
    rows = evaluation.table.index
    evaluation.table["source"] = np.where(rows % 4 < 2, names[0], np.where(rows % 4 == 2, *names[1:]))
    figures(evaluation)
    scores = made[1]
    assert len(scores.axes) == 3
    (legend,) = scores.legends
    boxes = [legend.get_window_extent(), *(axis.get_window_extent() for axis in scores.axes)]
    for axis, (source, part) in zip(scores.axes, evaluation.test.groupby("source"), strict=True):
        (title,) = (text for text in axis.get_children() if isinstance(text, Text) and text.get_text())
        slices = [f"{label}, {len(own)} slices" for label, own in part.groupby("label")]
        assert title.get_text().split() == f"{source.replace('_', ' ')}: {'; '.join(slices)}".split()
        boxes.append(title.get_window_extent())
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(scores.bbox.x0 <= box.x0 and box.x1 <= scores.bbox.x1 for box in boxes)


@pytest.mark.parametrize("outputs", [1, 4])
def test_the_gallery_shows_the_surest_errors_and_some_that_were_right_with_their_heat(outputs):
    evaluation = with_images(made_up("binary" if outputs == 1 else "subtype"), network(outputs, 32), 32)
    evaluation.cfg.evaluation.gallery = 2
    shown = gallery(evaluation)
    assert 0 < len(shown["errors"]) <= 2
    assert len(shown["right"]) == 2
    for kind, pictures in shown.items():
        assert all((picture["truth"] == picture["called"]) == (kind == "right") for picture in pictures)
    sure = [picture["sureness"] for picture in shown["errors"]]
    assert sure == sorted(sure, reverse=True)
    first = shown["right"][0]
    encoded = [first[name].split(",")[1] for name in ("plain", "heat")]
    plain, heat = (Image.open(io.BytesIO(base64.b64decode(part))) for part in encoded)
    assert (plain.mode, heat.mode) == ("L", "RGB")
    square = evaluation.images[evaluation.manifest.set_index("path")["row"][first["path"]]]
    assert np.corrcoef(np.asarray(plain.resize((32, 32))).ravel(), square.ravel())[0, 1] > 0.9
    evaluation.table["group"] = 0  # slices of one group would show the same again
    assert {len(pictures) for pictures in gallery(evaluation).values()} <= {0, 1}
    assert gallery(made_up()) == {}  # without a network
