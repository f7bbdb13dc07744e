import dataclasses
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import pytest

from chestct.imaging.slice import Slice
from chestct.models.bundle import PACKAGED_BUNDLE, Bundle, load_bundle
from chestct.models.operating_point import OperatingPoint
from chestct.serving import sentences
from chestct.serving.prediction import NOT_MEDICAL, Prediction
from chestct.stats.calibration import Calibration


def bundle(elsewhere: Sequence[dict[str, Any]] = (), **counts: int) -> Bundle:
    packaged = load_bundle(PACKAGED_BUNDLE)
    facts = packaged.facts | {"elsewhere": list(elsewhere)}
    return dataclasses.replace(packaged, point=point(**counts), facts=facts)


def point(**counts: int) -> OperatingPoint:
    fields = {field.name for field in dataclasses.fields(Calibration)}
    calibration = Calibration(**dict.fromkeys(fields, 1.0))
    return OperatingPoint(calibration, 0.41, "sensitivity>=0.95", 0.9, (0.5, 0.5), counts)


def answer(score: float, decision: str, reason: str = "") -> Prediction:
    gray = np.zeros((100, 100), np.uint8)
    probabilities = {"normal": 1 - score, "cancer": score}
    shown = Slice(gray, "PNG", "L")
    return Prediction(score, decision, reason, probabilities, ("cancer",), 0.4, False, gray, None, shown, "abc")


def test_no_probability_is_a_certainty() -> None:
    assert [sentences.percent(share) for share in (0, 0.07, 1)] == ["under 1 %", "7 %", "over 99 %"]


def test_the_verdict_names_the_score_and_what_the_threshold_does_in_real_counts_or_the_reason() -> None:
    text = sentences.verdict(answer(0.87, "cancer"), bundle(cancers=198, found=188, normals=110, flagged=9))
    assert "**87 %**, at or above the threshold" in text
    assert "From 41 % on" in text
    assert "188 of 198 cancers in the validation set were found, and 9 of 110 normal slices were flagged" in text
    text = sentences.verdict(answer(0.12, "normal"), bundle())
    assert text == "The probability of cancer is **12 %**, below the threshold.\n\n" + (
        "From 41 % on, the model calls a slice cancer."  # without counts nothing is made up
    )
    assert sentences.verdict(answer(0.5, "refused", "It is a cat."), bundle()) == r"It is a cat\."
    known = dataclasses.replace(answer(0.9, "cancer"), known=True)
    assert "used to train" in sentences.verdict(known, bundle())


def test_without_an_answer_nothing_is_promised_of_a_hundred_such_slices() -> None:
    promise = "of 100 slices with this probability about 92 show cancer"
    assert promise in sentences.explanation(answer(0.92, "cancer"), bundle())
    for decision in ("uncertain", "refused"):
        assert "of 100 slices" not in sentences.explanation(answer(0.92, decision), bundle())


def test_where_thresholds_do_not_travel_the_page_says_what_is_known_and_no_probability() -> None:
    away = [
        {"source": "a", "auroc": 0.9, "sensitivity": 0.95, "specificity": 0.4},
        {"source": "b", "auroc": 0.8, "sensitivity": 0.7, "specificity": 0.75},
    ]
    known = bundle(elsewhere=away, cancers=198, found=188, normals=110, flagged=9)
    assert sentences.headline("cancer", known) == "Possible cancer"
    assert sentences.headline("uncertain", known) == sentences.headline("uncertain", bundle())
    text = sentences.verdict(answer(0.87, "cancer"), known)
    assert "The score is **87** of 100, at or above the threshold of 41." in text
    assert "In 2 collections" in text
    assert "called 70 to 95 % of the slices with cancer possible cancer, and 25 to 60 % of the normal ones" in text
    shown = text + sentences.explanation(answer(0.87, "cancer"), known) + sentences.score_name(known)
    assert "robability" not in shown
    assert "of 100 slices" not in shown


@pytest.mark.parametrize("text", ["<img src=x>", "[a](http://b)", "*a_b*", "# a", "1. a", "![a](b)", "a & b"])
def test_what_files_say_is_no_markup(text: str) -> None:
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark").render(sentences.plain(text))
    assert html == f"<p>{escape(text)}</p>\n"


def test_the_caveats_come_from_the_card() -> None:
    card = (
        "---\nlicense: other\n---\n# Card\n**good**\n\n- **Few**: odd\n## Use\n- fun\n## Limits\none\n### b\n## End\nx"
    )
    assert sentences.caveats(card) == f"- **Few**: odd\n\none\n### b\n\n{NOT_MEDICAL}"
    assert sentences.card_body(card).startswith("**good**")
    assert sentences.caveats("# Card\nnothing") == NOT_MEDICAL
