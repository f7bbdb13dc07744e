import dataclasses
import re

import pandas as pd
import pytest

from chestct.evaluation.evaluate import Row
from chestct.reporting.environment import display_name, format_number, interval, literal
from chestct.reporting.text import caveats, headline, summary
from chestct.stats.metrics import Estimate
from tests.evaluation.evaluations import draw, made_up


def kinds(evaluation) -> dict[str, str]:
    return {caveat.kind: caveat.severity for caveat in caveats(evaluation)}


def with_margin(low, high):
    evaluation = made_up(n=200)
    evaluation.rows[0] = dataclasses.replace(evaluation.rows[0], margin=Estimate(0.1, low, high, 200, 200))
    return evaluation


def test_caveats_come_first_in_the_summary():
    evaluation = made_up()
    evaluation.about |= {"synthetic": True, "leaked": 3}
    lines = summary(evaluation).splitlines()
    assert lines[0].startswith("SYNTHETIC: ")
    assert lines[1].startswith("LEAKY SPLIT (grouped): 3 ")
    assert lines[2] == headline(evaluation)
    assert not {"Synthetic", "Leaky split (grouped)"} & set(kinds(made_up()))


def test_the_summary_has_each_metric_with_its_interval_and_counts():
    text = summary(made_up())
    assert "\nAUROC   " in text
    assert interval(made_up().metrics["test"]["auroc"]) in text
    assert re.search(r"\nslices +60 +80\n", text)
    assert "+0.100 [+0.050, +0.150]" in text


def test_a_policy_that_could_not_be_trained_is_a_row_with_its_note():
    evaluation = made_up()
    evaluation.rows.append(Row("official", {}, {}, 0, 0, note="not available: no train folder"))
    assert "not available: no train folder" in summary(evaluation)


def test_the_headline_says_that_a_margin_is_not_format_number():
    evaluation = made_up()
    evaluation.rows[0] = dataclasses.replace(evaluation.rows[0], margin=None)
    assert "not known" in headline(evaluation)


def test_one_class_gives_a_headline_with_the_reason():
    _labels, logits = draw(10, "binary", 0)
    evaluation = made_up(test=(["squamous"] * 10, logits))
    assert headline(evaluation).startswith("AUROC n/a on 10 test slices in 10 groups: no normal slices")
    assert kinds(evaluation)["Few normals"] == "error"


@pytest.mark.parametrize(("low", "high", "expected"), [(0.05, 0.15, False), (-0.01, 0.2, True), (None, None, True)])
def test_a_margin_that_is_not_shown_is_a_serious_caveat(low, high, expected):
    assert ("Shortcut" in kinds(with_margin(low, high))) is expected


def test_few_groups_of_a_class_are_caveats_by_their_interval():
    assert "Few normals" not in kinds(made_up(n=200))
    evaluation = made_up(n=20)
    low = format_number(evaluation.metrics["test"]["specificity"].low)
    assert any(f"from {low} to" in caveat.text for caveat in caveats(evaluation))


def test_a_threshold_that_misses_its_aim_on_test_is_a_caveat():
    labels, logits = draw(200, "binary", 0)
    assert "Operating point" in kinds(made_up(test=(labels, logits - 3)))
    assert "Operating point" not in kinds(made_up(n=200))


def test_permuted_labels_that_teach_something_are_a_serious_caveat():
    auroc = made_up().metrics["test"] | {"auroc": Estimate(0.8, 0.7, 0.9, 80, 80)}
    row = Row("permuted labels", auroc, {"normal": 40, "cancer": 40}, 80, 0)
    evaluation = made_up(permuted=row)
    assert kinds(evaluation)["Control"] == "error"
    assert "permuted labels" in summary(evaluation)
    in_rows = made_up()
    in_rows.rows.append(row)
    assert kinds(in_rows)["Control"] == "error"


def test_caveats_come_worst_first():
    evaluation = made_up(n=20)  # few slices: a warning, and raised first
    evaluation.rows[0] = dataclasses.replace(evaluation.rows[0], margin=Estimate(0.0, -0.1, 0.1, 20, 20))
    ranks = [("error", "warning", "info").index(caveat.severity) for caveat in caveats(evaluation)]
    assert ranks == sorted(ranks)
    assert set(ranks) == {0, 1}


def test_numbers_have_three_decimals_and_undefined_ones_none():
    assert format_number(None) == "n/a"
    assert interval(Estimate(0.5, None, None, 1, 1, "why")) == "0.500 [n/a]"
    assert interval(Estimate(None, None, None, 1, 1, "why")) == "n/a"
    assert interval(Estimate(-0.1, -0.2, 0.05, 1, 1), signed=True) == "−0.100 [−0.200, +0.050]"


def test_metrics_have_names_for_people():
    assert display_name("auroc/large_cell") == "AUROC, large cell"
    assert display_name("cancer/sensitivity") == "Sensitivity, any cancer"


def test_a_class_that_would_be_refused_is_a_caveat_even_if_it_is_small():
    labels = ["squamous"] * 97 + ["normal"] * 3
    evaluation = made_up(test=(labels, draw(100, "binary", 0)[1]))
    evaluation.table["novelty"] = 0.5
    assert "Novelty" not in kinds(evaluation)
    evaluation.table.loc[evaluation.table.index[-3:], "novelty"] = 2.0
    assert any("3 of 3 normal test slices" in caveat.text for caveat in caveats(evaluation))


def test_foreign_pictures_that_are_answered_and_decisions_that_flip_are_caveats():
    def novelty(beyond):
        return [{"pictures": 40, "beyond": {"value": beyond, "low": 0.0, "high": 1.0}}]

    def changes(flipped, auroc):
        row = {"perturbation": "noise", "level": 1, "strength": 0.02, "unit": "sd", "flipped": flipped, "auroc": auroc}
        row |= {"auroc_change": auroc - 0.9}
        return pd.DataFrame([row, row | {"level": 2, "strength": 0.05, "flipped": 0.9, "auroc_change": -0.5}])

    evaluation = made_up(novelty=novelty(0.95), robustness=changes(0.05, 0.85).head(1))
    assert not {"Foreign pictures", "Robustness"} & set(kinds(evaluation))
    falls = [caveat for caveat in caveats(made_up(robustness=changes(0.05, 0.5))) if caveat.kind == "Robustness"]
    assert [caveat.severity for caveat in falls] == ["error", "warning"]
    assert "falls to 0.500 (\N{MINUS SIGN}0.400) under noise 0.02" in falls[0].text
    evaluation = made_up(novelty=novelty(0.8), robustness=changes(0.3, 0.85))
    texts = {caveat.kind: caveat.text for caveat in caveats(evaluation)}
    assert "20% of 40 pictures" in texts["Foreign pictures"]
    assert "noise 0.02 (sd) 30%" in texts["Robustness"]  # the mildest strength at which they do
    assert "90%" not in texts["Robustness"]


def test_a_stated_coverage_that_test_rules_out_is_a_caveat():
    evaluation = made_up(n=200)
    assert "Coverage" not in kinds(evaluation)
    cancer = evaluation.table.index[(evaluation.table["split"] == "test") & (evaluation.table["label"] == "cancer")]
    evaluation.table.loc[cancer[:40], "set"] = "normal"
    (caveat,) = (caveat for caveat in caveats(evaluation) if caveat.kind == "Coverage")
    assert "of 100 cancer test slices where 90% was stated" in caveat.text


def test_names_cannot_become_markup():
    assert literal("a|b\n# c_d <img>") == "a\\|b # c\\_d &lt;img>"
