import dataclasses

import pandas as pd
import pytest

from chestct.evaluation.evaluate import Row
from chestct.reporting.text import called, caveats, doubts, headline, interval, known, summary
from chestct.stats.metrics import Estimate
from tests.evaluation.evaluations import draw, made_up


def kinds(found) -> dict[str, str]:
    return {doubt.kind: doubt.severity for doubt in doubts(found)}


def with_margin(low, high):
    found = made_up(n=200)
    found.rows[0] = dataclasses.replace(found.rows[0], margin=Estimate(0.1, low, high, 200, 200))
    return found


def test_caveats_come_first_in_the_summary():
    found = made_up()
    found.about |= {"synthetic": True, "leaked": 3}
    lines = summary(found).splitlines()
    assert lines[0].startswith("SYNTHETIC")
    assert lines[1].startswith("LEAKY SPLIT (grouped): 3 ")
    assert lines[2] == headline(found)
    assert not caveats(made_up().about)


def test_the_summary_has_each_metric_with_its_interval_and_counts():
    text = summary(made_up())
    assert "AUROC                " in text
    assert interval(made_up().metrics["test"]["auroc"]) in text
    assert "slices                                          60                      80" in text
    assert "+0.100 [+0.050, +0.150]" in text


def test_a_policy_that_could_not_be_trained_is_a_row_with_its_note():
    found = made_up()
    found.rows.append(Row("official", {}, {}, 0, 0, note="not available: no train folder"))
    assert "not available: no train folder" in summary(found)


def test_the_headline_says_that_a_margin_is_not_known():
    found = made_up()
    found.rows[0] = dataclasses.replace(found.rows[0], margin=None)
    assert "not known" in headline(found)


def test_one_class_gives_a_headline_with_the_reason():
    _labels, logits = draw(10, "binary", 0)
    found = made_up(test=(["squamous"] * 10, logits))
    assert headline(found).startswith("AUROC n/a on 10 test slices in 10 groups: no normal slices")
    assert kinds(found)["Few normals"] == "error"


@pytest.mark.parametrize(("low", "high", "doubted"), [(0.05, 0.15, False), (-0.01, 0.2, True), (None, None, True)])
def test_a_margin_that_is_not_shown_is_a_serious_doubt(low, high, doubted):
    assert ("Shortcut" in kinds(with_margin(low, high))) is doubted


def test_few_groups_of_a_class_are_doubted_by_their_interval():
    assert "Few normals" not in kinds(made_up(n=200))
    found = made_up(n=20)
    low = known(found.metrics["test"]["specificity"].low)
    assert any(f"from {low} to" in doubt.text for doubt in doubts(found))


def test_a_threshold_that_misses_its_aim_on_test_is_doubted():
    labels, logits = draw(200, "binary", 0)
    assert "Operating point" in kinds(made_up(test=(labels, logits - 3)))
    assert "Operating point" not in kinds(made_up(n=200))


def test_permuted_labels_that_teach_something_are_a_serious_doubt():
    auroc = made_up().metrics["test"] | {"auroc": Estimate(0.8, 0.7, 0.9, 80, 80)}
    row = Row("permuted labels", auroc, {"normal": 40, "cancer": 40}, 80, 0)
    found = made_up(permuted=row)
    assert kinds(found)["Control"] == "error"
    assert "permuted labels" in summary(found)
    in_rows = made_up()
    in_rows.rows.append(row)
    assert kinds(in_rows)["Control"] == "error"


def test_doubts_come_worst_first():
    found = made_up(n=20)  # few slices: a warning, and found first
    found.rows[0] = dataclasses.replace(found.rows[0], margin=Estimate(0.0, -0.1, 0.1, 20, 20))
    ranks = [("error", "warning", "info").index(doubt.severity) for doubt in doubts(found)]
    assert ranks == sorted(ranks)
    assert set(ranks) == {0, 1}


def test_numbers_have_three_decimals_and_undefined_ones_none():
    assert known(None) == "n/a"
    assert interval(Estimate(0.5, None, None, 1, 1, "why")) == "0.500 [n/a]"
    assert interval(Estimate(None, None, None, 1, 1, "why")) == "n/a"
    assert interval(Estimate(-0.1, -0.2, 0.05, 1, 1), signed=True) == "−0.100 [−0.200, +0.050]"


def test_metrics_have_names_for_people():
    assert called("auroc/large_cell") == "AUROC, large cell"
    assert called("cancer/sensitivity") == "Sensitivity, any cancer"


def test_a_class_that_would_be_refused_is_doubted_even_if_it_is_small():
    labels = ["squamous"] * 97 + ["normal"] * 3
    found = made_up(test=(labels, draw(100, "binary", 0)[1]))
    found.table["novelty"] = 0.5
    assert "Novelty" not in kinds(found)
    found.table.loc[found.table.index[-3:], "novelty"] = 2.0
    assert any("3 of 3 normal test slices" in doubt.text for doubt in doubts(found))


def test_foreign_pictures_that_are_answered_and_decisions_that_flip_are_doubted():
    def novelty(beyond):
        return [{"pictures": 40, "beyond": {"value": beyond, "low": 0.0, "high": 1.0}}]

    def changes(flipped, auroc):
        row = {"perturbation": "noise", "level": 1, "strength": 0.02, "unit": "sd", "flipped": flipped, "auroc": auroc}
        row |= {"auroc_change": auroc - 0.9}
        return pd.DataFrame([row, row | {"level": 2, "strength": 0.05, "flipped": 0.9, "auroc_change": -0.5}])

    found = made_up(novelty=novelty(0.95), robustness=changes(0.05, 0.85).head(1))
    assert not {"Foreign pictures", "Robustness"} & set(kinds(found))
    falls = [doubt for doubt in doubts(made_up(robustness=changes(0.05, 0.5))) if doubt.kind == "Robustness"]
    assert [doubt.severity for doubt in falls] == ["error", "warning"]
    assert "falls to 0.500 (\N{MINUS SIGN}0.400) under noise 0.02" in falls[0].text
    found = made_up(novelty=novelty(0.8), robustness=changes(0.3, 0.85))
    texts = {doubt.kind: doubt.text for doubt in doubts(found)}
    assert "20% of 40 pictures" in texts["Foreign pictures"]
    assert "noise 0.02 (sd) 30%" in texts["Robustness"]  # the mildest strength at which they do
    assert "90%" not in texts["Robustness"]


def test_a_stated_coverage_that_test_rules_out_is_doubted():
    found = made_up(n=200)
    assert "Coverage" not in kinds(found)
    cancer = found.table.index[(found.table["split"] == "test") & (found.table["label"] == "cancer")]
    found.table.loc[cancer[:40], "set"] = "normal"
    (doubt,) = (doubt for doubt in doubts(found) if doubt.kind == "Coverage")
    assert "of 100 cancer test slices where 90% was stated" in doubt.text
