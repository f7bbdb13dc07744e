import json
import re

import numpy as np
import pandas as pd
import pytest

from chestct.evaluation.evaluate import Evaluation, Row
from chestct.evaluation.protocol import Part
from chestct.reporting import render
from chestct.reporting.environment import as_text
from chestct.reporting.text import answer, headline, summary
from chestct.stats.drift import Difference
from chestct.stats.metrics import Estimate
from tests.evaluation.evaluations import made_up

EXPLANATION = {
    "failure": "The hottest point is not in the lesion.",
    "pointing": {"slices": 20, "heat map": Estimate(0.25, 0.1, 0.5, 20, 20), "random place in the lungs": 0.1}
    | {"usual place": None},
}
AUDIT = {
    "verdict": {"severity": "error", "text": "A high score proves little here."},
    "findings": [{"kind": "leakage", "severity": "error", "text": "46 of 54 <b>leak</b>.", "action": "Split again."}],
}
CHANGE = {"perturbation": "noise", "strength": 0.02, "unit": "sd", "auroc": float("nan"), "flipped": 0.2}
SHARE = Estimate(0.75, 0.5, 0.9, 20, 20)
NOVELTY = {"kind": "noise", "pictures": 20, "median": 1.7, "auroc": 0.98, "beyond": SHARE, "refused": SHARE}
FLAG = "sensitivity below the 0.9 of all slices"


@pytest.fixture(scope="module")
def full() -> Evaluation:
    """Everything that can be requested, with a file name that is HTML."""
    part = Estimate(0.7, 0.5, 0.8, 20, 20)
    row = {"by": "file", "name": "PNG <RGBA>", "normal": 5, "cancer": 15, "groups": 20, "flag": FLAG}
    evaluation = made_up(
        explanation=EXPLANATION,
        audit=AUDIT,
        robustness=pd.DataFrame([CHANGE]),
        novelty=[NOVELTY],
        shift=[Difference("border_mean", 0.1, 0.2, 0.4, 0.3, 0.0004)],
        subgroups=[{**row, "sensitivity": part, "specificity": part, "auroc": Estimate(None, None, None, 0, 0, "why")}],
        made={"command": "evaluate.py ckpt='<x>'", "date": "today"},
    )
    evaluation.rows.append(Row("official", {}, {}, 0, 0, note="not available: no <train> folder"))
    return evaluation


@pytest.fixture(scope="module")
def page(full: Evaluation) -> str:
    return render.html(full)


def read(html: str) -> str:
    """What a person reads: without styles, tags and pictures."""
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.S))


def test_every_file_is_written_and_json_has_no_nan(full, tmp_path):
    render.write(full, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.json", "evaluation.json", "roc.json", "confusion.json", "reliability.json", "roc.svg", "scores.svg",
        "reliability.svg", "predictions.parquet", "report.html", "MODEL_CARD.md"
    }  # fmt: skip
    for path in tmp_path.glob("*.json"):
        told = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
        assert path.name != "evaluation.json" or told["sections"]["robustness"] == [CHANGE | {"auroc": None}]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "predictions.parquet"), full.table)
    test = render.flat(full)["test"]
    assert test["auroc_low"] < test["auroc"] < test["auroc_high"]
    assert (test["slices"], test["groups"], test["margin"]) == (80, 80, 0.1)


def test_the_page_stands_alone_and_escapes_names(page):
    assert not re.search(r"<script|<x>|(src|href)=\"(?!data:|#)|url\((?!#)|@import|https?://", page)
    assert {"46 of 54 &lt;b&gt;leak&lt;/b&gt;.", "PNG &lt;RGBA&gt;"} <= set(re.findall(r"46[^<]*\.|PNG [^<]*", page))
    assert "prefers-color-scheme: dark" in page
    assert page.count("<table>") == page.count("</table>")
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert len(re.findall(r'<img src="data:image/svg\+xml;base64,[^"]+" alt="[^"]{40}', page)) == 3


def test_the_answer_its_numbers_and_the_caveats_come_first_and_nothing_is_without_its_reason(full, page):
    first, text = read(page.split("<h2")[0]), read(page)
    assert first.index("not for clinical use") < first.index(answer(full)) < first.index("+0.100")
    for shown in ("+0.050 to +0.150", "normal and cancer test slices in 80 groups", "Heat maps"):
        assert shown in first
    for shown in ("do not read them as the place of the lesion", EXPLANATION["failure"], FLAG, "n/a (why)",
                  "0.700 [0.500, 0.800]", "not available: no &lt;train&gt; folder"):  # fmt: skip
        assert shown in text
    bare = render.html(made_up())
    for setting in ("evaluation.phantoms=", "evaluation.novelty=", "evaluation.robustness=", "chestct audit"):
        assert setting in bare
        assert f"<code>{setting}" not in page


@pytest.mark.parametrize(
    ("task", "labels", "equal"),
    [
        ("subtype", ["normal", "squamous"], True),
        ("binary", ["normal"] * 6, False),
        ("subtype", ["large_cell"] * 6, False),
        ("binary", ["normal"] * 6 + ["squamous", "large_cell"], True),
    ],
)
def test_bad_data_gives_n_a_with_a_reason_and_never_nan(task, labels, equal, tmp_path):
    logits = np.zeros((len(labels), 1 if task == "binary" else 4))
    if not equal:
        logits += np.random.default_rng(0).normal(size=logits.shape)
    evaluation = made_up(task, test=(labels, logits))
    render.write(evaluation, tmp_path)
    text = read((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not re.search(r"\b(nan|None|inf)\b", text + render.model_card(evaluation) + summary(evaluation))
    if len(set(labels)) == 1:
        assert f"n/a: no {'cancer' if labels[0] == 'normal' else 'normal'} slices in test" in text
        assert "n/a: the history of the training is not at hand" in text
        assert render.flat(evaluation)["test"]["auroc"] is None


def test_other_data_is_held_against_training_and_names_that_are_no_utf_8_are_written(tmp_path):
    findings = [{**AUDIT["findings"][0], "text": "test/\udcff.png"}]
    evaluation = made_up(shift=[Difference("mean", 0.2, 0.3, 0.4, 0.3, 0.0)], audit={**AUDIT, "findings": findings})
    evaluation.table = evaluation.test
    del evaluation.metrics["valid"]
    evaluation.about |= {"split": "external", "left_out": 3}
    render.write(evaluation, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "How far is this data from the training data?" in text
    assert "Not measured: 3 slices that the model learned from, or near-copies of such." in text
    assert "\\udcff" in text
    assert "\\udcff" in (tmp_path / "MODEL_CARD.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_the_card_says_what_the_report_says(task):
    named = [{**finding, "text": f"{finding['text']} For example MUELLER_1.png."} for finding in AUDIT["findings"]]
    evaluation = made_up(task, audit={**AUDIT, "findings": named}, explanation=EXPLANATION)
    evaluation.about["synthetic"] = True
    evaluation.cfg.model.weights = "/home/somebody/trial/vgg.safetensors"
    evaluation.rows.append(Row("official", {}, {}, 0, 0, note="no <train> | folder"))
    card = render.model_card(evaluation)
    assert headline(evaluation) in card
    rule = evaluation.point.validation
    assert f"of which it calls {rule['found']} and {rule['flagged']} cancer" in card
    assert "each source counting alike" not in card  # validation has one
    evaluation.table["source"] = [f"clinic {i % 2}" for i in range(len(evaluation.table))]
    assert "`sensitivity>=0.95` (each source counting alike) on" in render.model_card(evaluation)
    assert all(as_text(estimate) in card for estimate in evaluation.metrics["test"].values())
    for text in ("They are not patients", "A high score proves little here.", "46 of 54 &lt;b>leak&lt;/b>.",
                 "**The heat maps fail the check**", "license_name: MIT AND CC-BY-4.0"):  # fmt: skip
        assert text in card
    assert "VGG16 convolutions vgg.safetensors (" in card
    assert "somebody" not in card
    assert "MUELLER" not in card
    assert "Not for clinical use" in card.split("## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", card, re.M)
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_names_of_columns_in_markdown_are_shown_as_they_are():
    part = Part("AUROC", [{"trained on": "a|b <c>", "a|b <c>": 0.5}], [])
    head = render._render("protocol.md.j2", made_up(protocol={"matrix": part})).splitlines()[2]
    assert head == "| trained on | a\\|b &lt;c> |"


def test_a_bundle_is_called_by_its_own_calibration_and_keeps_its_own_card(tmp_path):
    evaluation = made_up("subtype")
    evaluation.cfg.task, evaluation.about["bundle"] = "binary", "abc"
    evaluation.table["target"] = (evaluation.table["label"] == "cancer").astype(int)
    evaluation.table["probability_cancer"] = 1 - evaluation.table["probability_normal"]
    evaluation.about["task"] = "binary"
    render.write(evaluation, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Temperature scaling" in page
    assert "Platt" not in page
    assert "<h3>Training</h3>" not in page  # a bundle keeps no history
    assert "python evaluate.py bundle=FOLDER data=... data.root=... evaluation.phantoms=100" in page
    assert not (tmp_path / "MODEL_CARD.md").exists()
