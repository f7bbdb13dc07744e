import dataclasses

import pandas as pd
import pytest

from chestct.evaluation.evaluate import Row
from chestct.reporting.environment import as_text, display_name, literal
from chestct.reporting.text import answer, caveats, counts, headline, summary
from chestct.stats.metrics import Estimate
from tests.evaluation.evaluations import draw, made_up


def kinds(evaluation) -> dict[str, str]:
    return {caveat.kind: caveat.severity for caveat in caveats(evaluation)}


def with_margin(margin, **settings):
    evaluation = made_up(**settings)
    evaluation.rows[0] = dataclasses.replace(evaluation.rows[0], margin=margin)
    return evaluation


def test_serious_caveats_come_first_then_the_answer_then_numbers_with_interval_and_counts():
    evaluation = made_up()
    evaluation.about |= {"synthetic": True, "leaked": 3}
    evaluation.rows.append(Row("official", {}, {}, 0, 0, note="not available: no train folder"))
    text = summary(evaluation)
    assert [line.split(":")[0] for line in text.splitlines()[:2]] == ["SYNTHETIC", "LEAKY SPLIT"]
    assert text.splitlines()[2:4] == [answer(evaluation), headline(evaluation)]
    assert as_text(evaluation.metrics["test"]["auroc"]) in text
    assert "80 test slices in 80 groups" in text
    assert "+0.100 [+0.050, +0.150]" in text
    assert "not available: no train folder" in text
    assert not {"Synthetic", "Leaky split"} & set(kinds(made_up()))


@pytest.mark.parametrize(
    ("about", "facts", "source", "said"),
    [
        ({"synthetic": True}, {}, "phantom", ["Trained and tested"]),
        ({"synthetic": True, "bundle": "b"}, {"synthetic": False}, "phantom", ["Tested"]),
        ({"synthetic": False, "bundle": "b"}, {"synthetic": True}, "clinic", ["Trained"]),
        ({"synthetic": False, "bundle": "b"}, {}, "clinic", []),
    ],
)
def test_what_was_trained_and_what_was_tested_on_phantoms_is_said_apart(about, facts, source, said):
    evaluation = made_up()
    evaluation.about |= about
    evaluation.table["source"] = source
    evaluation.bundle.facts["data"] = facts
    told = [caveat.text for caveat in caveats(evaluation) if caveat.kind == "Synthetic"]
    assert [text.split(" on phantoms: ")[0] for text in told] == said


@pytest.mark.parametrize(("low", "high", "shown"), [(0.05, 0.15, True), (-0.01, 0.2, False), (None, None, False)])
def test_a_margin_that_is_not_shown_is_a_serious_caveat(low, high, shown):
    evaluation = with_margin(Estimate(0.1, low, high, 200, 200), n=200)
    assert ("Shortcut" not in kinds(evaluation)) is shown
    assert ("better than every rule" in answer(evaluation)) is shown


def test_what_cannot_be_told_is_said():
    assert "is open" in answer(with_margin(None))
    assert "margin over the best rule that sees no lesion: n/a" in headline(with_margin(None))
    _labels, logits = draw(10, "binary", 0)
    evaluation = made_up(test=(["squamous"] * 10, logits))
    assert "cannot show" in answer(evaluation)
    assert headline(evaluation).startswith("AUROC n/a (no normal slices in this split) on 10 test slices in 10 groups")
    assert kinds(evaluation)["Few normals"] == "error"


def test_few_groups_are_a_caveat_after_the_serious_ones():
    assert "Few normals" not in kinds(made_up(n=200))
    evaluation = with_margin(Estimate(0.0, -0.1, 0.1, 20, 20), n=20)
    assert list(kinds(evaluation).values()) == sorted(kinds(evaluation).values())
    assert f"specificity {as_text(evaluation.metrics['test']['specificity'])}" in summary(evaluation)


def test_novel_slices_and_a_coverage_that_test_rules_out_are_caveats_of_their_class():
    evaluation = made_up(test=(["squamous"] * 97 + ["normal"] * 3, draw(100, "binary", 0)[1]))
    evaluation.table = evaluation.table.assign(novelty=0.5, set="cancer or normal")
    assert not {"Novelty", "Coverage"} & set(kinds(evaluation))
    evaluation.table.loc[evaluation.table.index[-3:], "novelty"] = 2.0
    evaluation.table.loc[evaluation.table.index[-60:-3], "set"] = "normal"
    texts = {caveat.kind: caveat.text for caveat in caveats(evaluation)}
    assert "3 of 3 normal test slices" in texts["Novelty"]
    assert "in 40 of 97 cancer test slices where 90% was stated" in texts["Coverage"]


@pytest.mark.parametrize(("beyond", "flipped", "expected"), [(0.95, 0.05, False), (0.8, 0.3, True)])
def test_foreign_pictures_that_are_answered_and_decisions_that_flip_are_caveats(beyond, flipped, expected):
    change = {"perturbation": "noise", "strength": 0.02, "unit": "sd", "flipped": flipped}
    changes = pd.DataFrame([change, change | {"strength": 0.05}])  # the mildest at which they flip is named
    evaluation = made_up(novelty=[{"pictures": 40, "beyond": Estimate(beyond, None, None, 40, 40)}], robustness=changes)
    texts = {caveat.kind: caveat.text for caveat in caveats(evaluation)}
    assert ("20% of 40 pictures" in texts.get("Foreign pictures", "")) is expected
    assert ("through: noise 0.02 (sd) 30%." in texts.get("Robustness", "")) is expected


def test_decisions_count_every_slice_and_show_answers_that_none_got():
    evaluation = made_up()
    assert {int(table.sum(numeric_only=True).sum()) for table in counts(evaluation).values()} == {80}
    evaluation.table = evaluation.table.assign(flagged=True, decision="cancer")
    assert list(counts(evaluation)["called"]) == ["truth", "cancer", "normal"]
    assert list(counts(evaluation)["decided"]) == ["truth", "cancer", "normal", "uncertain"]


def test_values_and_names_are_written_for_people_and_cannot_become_markup():
    assert as_text(Estimate(-0.1, -0.2, 0.05, 1, 1), signed=True) == "−0.100 [−0.200, +0.050]"
    assert as_text(Estimate(0.5, None, None, 1, 1, "why")) == "0.500 (why)"
    assert [as_text(-0.05), as_text(9.9994), as_text(-258.25)] == ["−0.050", "9.999", "−258.2"]
    assert [as_text(Estimate(None, None, None, 1, 1, "why")), as_text(None)] == ["n/a (why)", "n/a"]
    assert display_name("auroc/large_cell") == "AUROC, large cell"
    assert display_name("cancer/sensitivity") == "Sensitivity, any cancer"
    assert literal("a|b\n# c_d <img> [x](y)") == "a\\|b # c\\_d &lt;img> [x]\\(y)"
