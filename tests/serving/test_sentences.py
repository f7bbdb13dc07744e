import dataclasses
import functools
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

packaged_bundle = functools.cache(lambda: load_bundle(PACKAGED_BUNDLE))


def bundle(elsewhere: Sequence[dict[str, Any]] = (), **counts: int) -> Bundle:
    packaged = packaged_bundle()
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
    return Prediction(score, decision, reason, probabilities, ("cancer",), 0.4, False, None, shown, "abc")


def test_no_share_is_a_certainty() -> None:
    assert [sentences.percent(share) for share in (0, 0.07, 1)] == ["under 1 %", "7 %", "over 99 %"]


def test_the_verdict_names_score_and_threshold_and_what_is_known_of_them_and_no_probability() -> None:
    made = bundle(cancers=198, found=188, normals=110, flagged=9)
    text = sentences.verdict(answer(0.87, "cancer"), made)
    assert "The score is **87** of 100, at or above the threshold of 41." in text
    assert "188 of 198 cancers in the validation set were found, and 9 of 110 normal slices were flagged" in text
    assert "not known" in text
    for decision in ("cancer", "uncertain", "refused"):
        shown = sentences.verdict(answer(0.9, decision), made) + sentences.explanation(answer(0.9, decision), made)
        assert "robability" not in shown
    text = sentences.verdict(answer(0.12, "normal"), bundle())  # without counts nothing is made up
    assert text == "The score is **12** of 100, below the threshold of 41."
    assert "**99** of 100" in sentences.verdict(answer(0.9999, "cancer"), bundle())  # as the bar shows it
    close = sentences.verdict(answer(bundle().point.threshold - 0.001, "normal"), bundle())
    assert close == "The score is **40.90** of 100, below the threshold of 41.00."
    assert sentences.verdict(answer(0.5, "refused", "It is a cat."), made) == r"It is a cat\."
    known = dataclasses.replace(answer(0.9, "cancer"), known=True)
    assert "used to train" in sentences.verdict(known, bundle())


def test_what_the_recipe_did_in_collections_that_it_had_not_seen_stands_in_the_place_of_validation() -> None:
    away = [
        {"source": "a", "auroc": 0.9, "sensitivity": 0.95, "specificity": 0.4},
        {"source": "b", "auroc": 0.8, "sensitivity": 0.7, "specificity": 0.75},
    ]
    text = sentences.verdict(answer(0.87, "cancer"), bundle(elsewhere=away, cancers=198, found=188, normals=110))
    assert "In 2 collections" in text
    assert "called 70 to 95 % of the slices with cancer possible cancer, and 25 to 60 % of the normal ones" in text
    assert "validation" not in text


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
