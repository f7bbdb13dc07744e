import numpy as np
import pytest

from chestct.errors import DecodeError
from chestct.evaluation import novelty_check as novelty
from chestct.evaluation.evaluate import Evaluation
from chestct.evaluation.novelty_check import novelty_figures
from chestct.evaluation.sections import optional_sections
from chestct.imaging.preprocess import Preprocess


def figures(evaluation: Evaluation) -> list[dict]:
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64), np.uint8)
    return novelty_figures(evaluation.bundle, Preprocess(64), evaluation.test["novelty"].to_numpy(), images, 4)


def test_what_is_no_chest_ct_lies_further_than_the_test_slices_every_time(evaluation: Evaluation) -> None:
    whole, *kinds = figures(evaluation)
    assert whole["auroc"] > 0.95
    assert whole["beyond"]["value"] > 0.9
    assert whole["pictures"] == sum(row["pictures"] for row in kinds if "test" not in row["kind"])
    assert len(kinds) == 6
    assert next(row for row in kinds if "photographs" in row["kind"])["auroc"] > 0.95
    for row in kinds:
        for share in (row["beyond"], row["refused"]):
            assert 0 <= share["low"] <= share["value"] <= share["high"] <= 1
        assert row["refused"]["value"] <= row["beyond"]["value"]
    assert figures(evaluation) == [whole, *kinds]


def test_pictures_are_grey_and_differ() -> None:
    for draw in (novelty._noise, novelty._drawing, novelty._radiograph, novelty._photograph):
        first, second = (draw(np.random.default_rng(i)) for i in range(2))
        assert first.ndim == 2
        assert 0 <= first.min() < first.max() <= (255 if first.dtype == np.uint8 else 1)
        assert not np.array_equal(first, second)


def test_a_file_that_nothing_here_can_decode_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = len(list(novelty._medical(99)))

    def decode(path, window):
        raise DecodeError(path, "no decoder")

    monkeypatch.setattr(novelty, "decode", decode)
    assert 1 == len(list(novelty._medical(99))) < whole


def test_it_is_a_section_where_it_is_asked_for(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    assert optional_sections(evaluation) == {}
    monkeypatch.setattr(evaluation.cfg.evaluation, "novelty", 3)
    (section,) = optional_sections(evaluation).values()
    assert {row["pictures"] for row in section} >= {3}
