import re

import pytest

from chestct.evaluation.evaluate import Row
from chestct.reporting.model_card import literal, model_card
from chestct.reporting.text import headline, interval
from tests.evaluation.evaluations import made_up
from tests.reporting.test_render import AUDIT, EXPLANATION

HEADINGS = ["Intended use", "Not for clinical use", "Training data and its faults", "Evaluation", "Operating point"]
HEADINGS += ["Calibration", "Explanation", "Novelty and refusal", "Limits", "Ethical notes", "How it was made"]
HEADINGS += ["Licence"]


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_the_card_has_every_heading_and_says_what_the_report_says(task):
    found = made_up(task)
    card = model_card(found)
    assert re.findall(r"^## (.+)$", card, re.M) == HEADINGS
    assert headline(found) in card
    for estimate in found.metrics["test"].values():
        assert interval(estimate) in card
    assert "license_name: MIT AND CC-BY-4.0" in card
    assert "Not for clinical use" in card.split("## ")[0]


def test_every_table_has_as_many_cells_in_each_row():
    found = made_up()
    found.rows.append(Row("official", {}, {}, 0, 0, note="no <train> | folder"))
    tables = re.findall(r"(?:^\|.*\n)+", model_card(found), re.M)
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_faults_of_the_data_and_of_the_heat_maps_are_named():
    card = model_card(made_up(audit=AUDIT, explanation=EXPLANATION))
    assert "A high score proves little here." in card
    assert "46 of 54 &lt;b>leak&lt;/b>." in card
    assert "**The heat maps fail the checks**" in card


def test_phantoms_are_said_not_to_be_patients():
    found = made_up()
    found.about["synthetic"] = True
    assert "They are not patients" in model_card(found)


def test_names_cannot_become_markup():
    assert literal("a|b\n# c_d <img>") == "a\\|b # c\\_d &lt;img>"
