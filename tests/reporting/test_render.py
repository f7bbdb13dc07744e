import json
import re

import numpy as np
import pandas as pd
import pytest

from chestct.evaluation.evaluate import Evaluation, Row
from chestct.models.operating_point import OperatingPoint
from chestct.reporting import figures, render
from chestct.reporting.environment import interval
from chestct.reporting.text import caveats, headline, summary
from chestct.stats.calibration import Calibration
from chestct.stats.drift import Difference
from chestct.stats.metrics import Estimate
from tests.evaluation.evaluations import draw, made_up

EXPLANATION = {
    "passes": False,
    "checks": {"pointing": False, "share": True, "randomisation": True, "deletion": True, "insertion": True},
    "failures": ["The hottest point is not in the lesion."],
    "slices": 20,
    "tolerance_px": 15,
    "pointing": {"chance": 0.1, "centre": 0.2, "average_lesion": 0.1, "heat": 0.25, "interval": [0.1, 0.5]},
    "share": {"chance": 0.02, "centre": 0.03, "average_lesion": 0.03, "heat": 0.4},
    "randomisation": {"head": 0.1, "last_block": 0.2},
    "deletion": {"heat": 0.3, "random": 0.6},
    "insertion": {"heat": 0.8, "random": 0.5},
    "curve_slices": 4,
}
AUDIT = {
    "verdict": {"severity": "error", "text": "A high score proves little here."},
    "findings": [{"kind": "leakage", "severity": "error", "text": "46 of 54 <b>leak</b>.", "action": "Split again."}],
}
ROBUSTNESS = pd.DataFrame(
    [
        {"perturbation": "none", "level": 0, "strength": 0.0, "unit": "", "auroc": 0.9, "auroc_change": 0.0,
         "score_change": 0.0, "flipped": 0.0, "slices": 20},
        {"perturbation": "noise", "level": 1, "strength": 0.02, "unit": "sd", "auroc": None, "auroc_change": None,
         "score_change": 0.1, "flipped": 0.2, "slices": 20},
    ]
)  # fmt: skip
SHARE = {"value": 0.75, "low": 0.5, "high": 0.9}
NOVELTY = [
    {"kind": kind, "pictures": 20, "median": 1.7, "auroc": 0.98, "beyond": SHARE, "refused": SHARE}
    for kind in ("no chest CT, all together", "noise")
]
FLAG = "sensitivity below the 0.9 of all slices"


@pytest.fixture(scope="module")
def full() -> Evaluation:
    """Everything that can be requested, with a file name that is HTML."""
    part = Estimate(0.7, 0.5, 0.8, 20, 20)
    row = {"by": "file", "name": "PNG <RGBA>", "normal": 5, "cancer": 15, "groups": 20, "flag": FLAG}
    evaluation = made_up(
        explanation=EXPLANATION,
        audit=AUDIT,
        robustness=ROBUSTNESS,
        novelty=NOVELTY,
        shift=[Difference("border_mean", 0.1, 0.2, 0.4, 0.3, 0.0004)],
        subgroups=[{**row, "sensitivity": part, "specificity": part, "auroc": Estimate(None, None, None, 0, 0, "why")}],
        made={"command": "evaluate.py ckpt='<x>'", "date": "today"},
    )
    evaluation.rows.append(Row("official", {}, {}, 0, 0, note="not available: no <train> folder"))
    evaluation.table.loc[evaluation.table.index[-1], "path"] = "test/<script>alert('x')</script>.png"
    return evaluation


@pytest.fixture(scope="module")
def page(full: Evaluation) -> str:
    return render.html(full)


@pytest.fixture(scope="module")
def bare() -> str:
    """The page of an evaluation for which nothing beyond was requested, and about which there is no caveat."""
    evaluation = made_up(n=200)
    evaluation.table["novelty"] = 0.5
    assert not caveats(evaluation)
    return render.html(evaluation)


def read(html: str) -> str:
    """What a person reads of the page."""
    text = re.sub(r"<(style|script).*?</\1>|base64,[^\"]*", " ", html, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))


@pytest.mark.slow
def test_everything_is_written_and_nothing_is_left_over(full, tmp_path):
    render.write(full, tmp_path)
    plots = {
        f"{name}.{end}" for name in ("roc", "precision_recall", "confusion", "reliability") for end in ("json", "svg")
    }
    assert {path.name for path in tmp_path.iterdir()} >= plots | {
        "metrics.json", "evaluation.json", "predictions.parquet", "report.html", "MODEL_CARD.md"
    }  # fmt: skip
    assert not list(tmp_path.glob(".*"))
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "predictions.parquet"), full.table)


def test_metrics_json_is_flat_and_holds_intervals_and_counts(full):
    test = render.flat(full)["test"]
    assert test["auroc_low"] < test["auroc"] < test["auroc_high"]
    assert (test["slices"], test["groups"]) == (80, 80)
    assert test["margin"] == 0.1
    assert all(value is None or isinstance(value, int | float) for value in test.values())


def test_the_page_stands_alone_and_escapes_names(page):
    assert "alert(" not in page
    assert "<x>" not in page
    assert {"46 of 54 &lt;b&gt;leak&lt;/b&gt;.", "PNG &lt;RGBA&gt;"} <= set(re.findall(r"46[^<]*\.|PNG [^<]*", page))
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\((?!#)|@import|https?://", page)
    assert "prefers-color-scheme: dark" in page
    assert page.count("<table") == page.count("</table>")


@pytest.mark.parametrize("name", ["page", "bare"])
def test_no_two_elements_share_an_id_and_every_link_has_its_place(name, request):
    html = request.getfixturevalue(name)
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', html)) | set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


def test_figures_stand_in_the_page_with_words_for_those_who_cannot_see_them(page):
    figures = re.findall(r'<img src="data:image/svg\+xml;base64,[^"]+" alt="([^"]+)"', page)
    assert len(figures) == 6
    assert figures[0].startswith("ROC curve, test: AUROC")


def test_the_first_screen_says_result_caveats_and_rows(page):
    first = read(page.split('id="discrimination"')[0])
    assert "AUROC" in first.split("Caveats")[0]
    assert "80 test slices in 80 groups" in first
    assert "margin over the best rule that sees no lesion: +0.100 [+0.050, +0.150]" in first
    assert "not available: no &lt;train&gt; folder" in first
    assert "heat maps" in first


@pytest.mark.parametrize(
    "setting", ["evaluation.phantoms=", "evaluation.novelty=", "evaluation.robustness=", "chestct audit"]
)
def test_what_was_not_requested_is_named_with_the_setting(bare, page, setting):
    assert setting in bare
    assert f"<code>{setting}" not in page


def test_failed_checks_flags_and_undefined_values_show_their_reason(page):
    assert "do not read them as the place of the lesion" in page
    assert EXPLANATION["failures"][0] in page
    assert FLAG in page
    assert page.count("0.700<small>0.500 to 0.800</small>") == 2
    assert re.search(r"n/a<small>why</small>", page)


def test_the_slider_holds_the_frozen_threshold_and_what_the_table_shows(full, page):
    points = json.loads(re.search(r'id="points">(.*?)</script>', page, re.S)[1])
    frozen = points["rows"][points["frozen"]]
    assert frozen[0] == f"{full.point.threshold:.3f}"
    sensitivity = full.metrics["test"]["sensitivity"]
    assert frozen[2][0] == f"{sensitivity.value:.3f} [{sensitivity.low:.3f}, {sensitivity.high:.3f}]"
    assert frozen[2][0] in page.split("<script")[0]
    thresholds = [float(row[0]) for row in points["rows"]]
    assert thresholds == sorted(thresholds)


def test_predictive_values_follow_from_bayes(full):
    operating = render.operating_points(full)
    at = dict(zip(operating["labels"], operating["rows"][operating["frozen"]][2], strict=True))
    rate = {name: full.metrics["test"][name].value for name in ("sensitivity", "specificity")}
    ppv = rate["sensitivity"] * 0.1 / (rate["sensitivity"] * 0.1 + (1 - rate["specificity"]) * 0.9)
    assert at["PPV at 10 % cancer"].startswith(f"{ppv:.3f}")


def test_the_table_with_uncertain_counts_every_slice_once(full):
    rows = render.decided_table(full)
    assert sum(row["normal"] + row["uncertain"] + row["cancer"] for row in rows) == 80


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "labels", "equal"),
    [
        ("binary", ["normal", "squamous"], False),
        ("subtype", ["normal", "squamous"], True),
        ("binary", ["normal"] * 6, False),
        ("subtype", ["large_cell"] * 6, False),
        ("binary", ["normal"] * 6 + ["squamous", "large_cell"], True),
    ],
)
def test_bad_data_gives_n_a_with_a_reason_and_never_nan(task, labels, equal):
    logits = np.zeros((len(labels), 1 if task == "binary" else 4))
    if not equal:
        logits += np.random.default_rng(0).normal(size=logits.shape)
    evaluation = made_up(task, test=(labels, logits))
    text = read(render.html(evaluation))
    assert not re.search(r"\b(nan|None|inf)\b", text + render.model_card(evaluation) + summary(evaluation))
    json.dumps(render.to_json(evaluation), allow_nan=False)
    if len(set(labels)) == 1:
        missing = "cancer" if labels[0] == "normal" else "normal"
        assert f"n/a: no {missing} slices in test" in text
        assert render.flat(evaluation)["test"]["auroc"] is None


def test_validation_scores_that_are_all_equal_are_no_crash():
    point = OperatingPoint(Calibration(), 0.5, "half", 0.9, (1.0, 1.0), {"cancers": 1, "normals": 1})
    labels, logits = draw(20, "binary", 0)
    assert "P(cancer) ≥ <b>0.500" in render.html(made_up(test=(labels, 0 * logits), point=point))


def test_an_evaluation_of_other_data_says_how_far_it_lies_from_training():
    evaluation = made_up(shift=[{"name": "mean", "psi": 0.4, "distance": 0.3, "p": 0.0, "before": 0.2, "now": 0.3}])
    evaluation.table = evaluation.test
    del evaluation.metrics["valid"]
    evaluation.about |= {"split": "external", "left_out": 3}
    text = read(render.html(evaluation))
    assert "How far is this data from the training data?" in text
    assert "3 slices that the model was trained on are left out" in text


@pytest.mark.slow
def test_the_same_evaluation_gives_the_same_page(full, page):
    assert render.html(full) == page


def test_a_file_name_that_is_no_utf_8_is_written(tmp_path, monkeypatch):
    undefined = ("scores", "roc", "precision_recall", "reliability", "decision_curve", "risk_coverage")
    monkeypatch.setattr(figures, "figures", lambda evaluation: dict.fromkeys(undefined, "n/a: not drawn"))
    evaluation = made_up(audit={**AUDIT, "findings": [{**AUDIT["findings"][0], "text": "test/\udcff.png"}]})
    render.write(evaluation, tmp_path)
    assert "\\udcff" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "\\udcff" in (tmp_path / "MODEL_CARD.md").read_text(encoding="utf-8")


HEADINGS = ["Intended use", "Not for clinical use", "Training data and its faults", "Evaluation", "Operating point"]
HEADINGS += ["Calibration", "Explanation", "Novelty and refusal", "Limits", "Ethical notes", "How it was made"]
HEADINGS += ["Licence"]


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_the_card_has_every_heading_and_says_what_the_report_says(task):
    evaluation = made_up(task)
    card = render.model_card(evaluation)
    assert re.findall(r"^## (.+)$", card, re.M) == HEADINGS
    assert headline(evaluation) in card
    for estimate in evaluation.metrics["test"].values():
        assert interval(estimate) in card
    assert "license_name: MIT AND CC-BY-4.0" in card
    assert "Not for clinical use" in card.split("## ")[0]


def test_every_table_has_as_many_cells_in_each_row():
    evaluation = made_up()
    evaluation.rows.append(Row("official", {}, {}, 0, 0, note="no <train> | folder"))
    tables = re.findall(r"(?:^\|.*\n)+", render.model_card(evaluation), re.M)
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_faults_of_the_data_and_of_the_heat_maps_are_named():
    card = render.model_card(made_up(audit=AUDIT, explanation=EXPLANATION))
    assert "A high score proves little here." in card
    assert "46 of 54 &lt;b>leak&lt;/b>." in card
    assert "**The heat maps fail the checks**" in card


def test_phantoms_are_said_not_to_be_patients():
    evaluation = made_up()
    evaluation.about["synthetic"] = True
    assert "They are not patients" in render.model_card(evaluation)
