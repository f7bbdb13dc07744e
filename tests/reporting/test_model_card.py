import re

import pytest

from chestct.evaluation.evaluate import Row
from chestct.reporting.environment import interval
from chestct.reporting.render import model_card
from chestct.reporting.text import headline
from tests.evaluation.evaluations import made_up
from tests.reporting.test_render import AUDIT, EXPLANATION

HEADINGS = ["Intended use", "Not for clinical use", "Training data and its faults", "Evaluation", "Operating point"]
HEADINGS += ["Calibration", "Explanation", "Novelty and refusal", "Limits", "Ethical notes", "How it was made"]
HEADINGS += ["Licence"]


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_the_card_has_every_heading_and_says_what_the_report_says(task):
    evaluation = made_up(task)
    card = model_card(evaluation)
    assert re.findall(r"^## (.+)$", card, re.M) == HEADINGS
    assert headline(evaluation) in card
    for estimate in evaluation.metrics["test"].values():
        assert interval(estimate) in card
    assert "license_name: MIT AND CC-BY-4.0" in card
    assert "Not for clinical use" in card.split("## ")[0]


def test_every_table_has_as_many_cells_in_each_row():
    evaluation = made_up()
    evaluation.rows.append(Row("official", {}, {}, 0, 0, note="no <train> | folder"))
    tables = re.findall(r"(?:^\|.*\n)+", model_card(evaluation), re.M)
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_faults_of_the_data_and_of_the_heat_maps_are_named():
    card = model_card(made_up(audit=AUDIT, explanation=EXPLANATION))
    assert "A high score proves little here." in card
    assert "46 of 54 &lt;b>leak&lt;/b>." in card
    assert "**The heat maps fail the checks**" in card


def test_phantoms_are_said_not_to_be_patients():
    evaluation = made_up()
    evaluation.about["synthetic"] = True
    assert "They are not patients" in model_card(evaluation)
