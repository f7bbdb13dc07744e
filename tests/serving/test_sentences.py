import dataclasses

import numpy as np
import pytest

from chestct.imaging.slice import Slice
from chestct.models.operating_point import OperatingPoint
from chestct.serving import sentences as text
from chestct.serving.predictor import Prediction
from chestct.stats.calibration import Calibration


def point(**counts: int) -> OperatingPoint:
    fields = {field.name for field in dataclasses.fields(Calibration)}
    calibration = Calibration(**dict.fromkeys(fields, 1.0))
    return OperatingPoint(calibration, 0.41, "sensitivity>=0.95", 0.9, (0.5, 0.5), counts)


def answer(score: float, decision: str, **changes) -> Prediction:
    gray = np.zeros((100, 100), np.uint8)
    probabilities = {"normal": 1 - score, "cancer": score}
    found = Prediction(
        score, decision, "", probabilities, ("cancer",), 0.4, False, gray, None, Slice(gray, "PNG", "L"), {}, {}, "abc"
    )
    return dataclasses.replace(found, **changes)


@pytest.mark.parametrize(
    ("share", "said"),
    [(0, "under 1 %"), (0.004, "under 1 %"), (0.07, "7 %"), (0.5, "50 %"), (0.994, "over 99 %"), (1, "over 99 %")],
)
def test_no_probability_is_a_certainty(share: float, said: str) -> None:
    assert text.percent(share) == said


def test_the_threshold_is_told_in_real_counts() -> None:
    said = text.threshold_meaning(point(cancers=198, found=188, normals=110, flagged=9))
    assert "95 of 100 cancers in the validation set were found (188 of 198)" in said
    assert "8 of 100 normal slices were flagged by mistake (9 of 110)" in said


def test_without_counts_nothing_is_made_up() -> None:
    assert text.threshold_meaning(point()) == "From 41 % on, the model calls a slice cancer."


@pytest.mark.parametrize(("part", "said"), [(0, 0), (1, 1), (999, 99), (1000, 100), (500, 50)])
def test_all_and_none_are_said_only_where_they_are_true(part: int, said: int) -> None:
    assert text.per_hundred(part, 1000) == said


def test_the_verdict_names_score_and_threshold_or_the_reason() -> None:
    assert "87 %, at or above the threshold of 41 %" in text.verdict(answer(0.87, "cancer"), point())
    assert "12 %, below the threshold of 41 %" in text.verdict(answer(0.12, "normal"), point())
    assert text.verdict(answer(0.5, "refused", reason="It is a cat."), point()) == "It is a cat."


def test_an_empty_heat_is_not_called_coloured() -> None:
    assert "No area" in text.heat_meaning(answer(0.1, "normal", heat=np.zeros((5, 5), np.float32)))
    assert "Coloured areas" in text.heat_meaning(answer(0.9, "cancer", heat=np.ones((5, 5), np.float32)))


def test_the_doubts_come_from_the_card() -> None:
    card = "## Use\nfor fun\n## Limitations\n- one\n### Caveats\n- two\n## Licence\nnone\n## Out-of-scope use\nthree"
    assert text.card_section(card).split() == ["-", "one", "###", "Caveats", "-", "two", "three"]
    assert text.card_section("# Card\nnothing") == ""


def test_what_to_know_first_stands_above_the_cards_first_section() -> None:
    card = "---\nlicense: other\n---\n# Card\n**good**\n\n- **Few**: of them\n- odd\n## Use\n- not this\n"
    assert text.findings(card) == "- **Few**: of them\n- odd"
    assert text.body(card).startswith("**good**")
    assert "license" not in text.body(card)
    assert text.findings("# Card\n## Use\n- not this") == ""
