import dataclasses
from html import escape

import numpy as np
import pytest

from chestct.imaging.slice import Slice
from chestct.models.operating_point import OperatingPoint
from chestct.serving import sentences
from chestct.serving.predictor import Prediction
from chestct.stats.calibration import Calibration


def point(**counts: int) -> OperatingPoint:
    fields = {field.name for field in dataclasses.fields(Calibration)}
    calibration = Calibration(**dict.fromkeys(fields, 1.0))
    return OperatingPoint(calibration, 0.41, "sensitivity>=0.95", 0.9, (0.5, 0.5), counts)


def answer(score: float, decision: str, **changes) -> Prediction:
    gray = np.zeros((100, 100), np.uint8)
    probabilities = {"normal": 1 - score, "cancer": score}
    prediction = Prediction(
        score, decision, "", probabilities, ("cancer",), 0.4, False, gray, None, Slice(gray, "PNG", "L"), {}, {}, "abc"
    )
    return dataclasses.replace(prediction, **changes)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "under 1 %"), (0.004, "under 1 %"), (0.07, "7 %"), (0.5, "50 %"), (0.994, "over 99 %"), (1, "over 99 %")],
)
def test_no_probability_is_a_certainty(share: float, text: str) -> None:
    assert sentences.percent(share) == text


def test_the_threshold_is_told_in_real_counts() -> None:
    text = sentences.threshold_meaning(point(cancers=198, found=188, normals=110, flagged=9))
    assert "95 of 100 cancers in the validation set were found (188 of 198)" in text
    assert "8 of 100 normal slices were flagged by mistake (9 of 110)" in text


def test_without_counts_nothing_is_made_up() -> None:
    assert sentences.threshold_meaning(point()) == "From 41 % on, the model calls a slice cancer."


@pytest.mark.parametrize(("part", "text"), [(0, 0), (1, 1), (999, 99), (1000, 100), (500, 50)])
def test_all_and_none_are_text_only_where_they_are_true(part: int, text: int) -> None:
    assert sentences.per_hundred(part, 1000) == text


def test_the_verdict_names_score_and_threshold_or_the_reason() -> None:
    assert "**87 %**, at or above the threshold of 41 %" in sentences.verdict(answer(0.87, "cancer"), point())
    assert "**12 %**, below the threshold of 41 %" in sentences.verdict(answer(0.12, "normal"), point())
    assert sentences.verdict(answer(0.5, "refused", reason="It is a cat."), point()) == r"It is a cat\."


@pytest.mark.parametrize("decision", ["uncertain", "refused"])
def test_without_an_answer_nothing_is_promised_of_a_hundred_such_slices(decision: str) -> None:
    assert "of 100 slices with this probability about 92 show cancer" in sentences.calibration_meaning(
        answer(0.92, "cancer")
    )
    assert sentences.calibration_meaning(answer(0.92, decision, reason="It is far away.")) == ""


def test_heat_is_explained_only_where_it_is_shown() -> None:
    assert "Coloured areas" in sentences.heat_meaning(answer(0.9, "cancer"), shown=True)
    for decision in ("cancer", "normal"):
        assert "No area" in sentences.heat_meaning(answer(0.1, decision), shown=False)


@pytest.mark.parametrize("text", ["<img src=x>", "[a](http://b)", "*a_b*", "# a", "1. a", "![a](b)", "a & b"])
def test_what_files_say_is_no_markup(text: str) -> None:
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark").render(sentences.plain(text))
    assert html == f"<p>{escape(text)}</p>\n"


def test_the_caveats_come_from_the_card() -> None:
    card = "## Use\nfor fun\n## Limitations\n- one\n### Caveats\n- two\n## Licence\nnone\n## Out-of-scope use\nthree"
    assert sentences.card_caveats(card).split() == ["-", "one", "###", "Caveats", "-", "two", "three"]
    assert sentences.card_caveats("# Card\nnothing") == ""


def test_what_to_know_first_stands_above_the_cards_first_section() -> None:
    card = "---\nlicense: other\n---\n# Card\n**good**\n\n- **Few**: of them\n- odd\n## Use\n- not this\n"
    assert sentences.card_findings(card) == "- **Few**: of them\n- odd"
    assert sentences.card_body(card).startswith("**good**")
    assert "license" not in sentences.card_body(card)
    assert sentences.card_findings("# Card\n## Use\n- not this") == ""
