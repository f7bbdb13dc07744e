from collections.abc import Iterator

import numpy as np
import pytest

from chestct.errors import DecodeError
from chestct.evaluation import novelty_check as novelty
from chestct.evaluation.evaluate import Evaluation
from chestct.evaluation.novelty_check import novelty_figures
from chestct.evaluation.sections import optional_sections
from chestct.imaging.preprocess import Preprocess


@pytest.fixture(scope="module")
def rows(evaluation: Evaluation) -> list[dict]:
    return figures(evaluation)


def figures(evaluation: Evaluation, synthetic: bool = False) -> list[dict]:
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64), np.uint8)
    return novelty_figures(
        evaluation.bundle, Preprocess(64), evaluation.test["novelty"].to_numpy(), images, 4, synthetic
    )


def test_what_is_no_chest_ct_lies_further_than_the_test_slices(rows: list[dict]) -> None:
    whole, *kinds = rows
    assert whole["auroc"] > 0.95
    assert whole["beyond"]["value"] > 0.9
    photographs = next(row for row in kinds if "photographs" in row["kind"])
    assert photographs["auroc"] > 0.95


def test_together_are_the_kinds_that_are_no_chest(rows: list[dict]) -> None:
    whole, *kinds = rows
    counted = sum(row["pictures"] for row in kinds if "chest" not in row["kind"] and "test" not in row["kind"])
    assert whole["pictures"] == counted
    assert len(kinds) == 8


def test_shares_have_intervals(rows: list[dict]) -> None:
    for row in rows:
        for share in (row["beyond"], row["refused"]):
            assert 0 <= share["low"] <= share["value"] <= share["high"] <= 1
            assert share["low"] < share["high"]
        assert row["refused"]["value"] <= row["beyond"]["value"]


def test_phantoms_are_nothing_foreign_to_a_model_of_phantoms(evaluation: Evaluation, rows: list[dict]) -> None:
    kinds = [row["kind"] for row in figures(evaluation, synthetic=True)]
    assert kinds == [row["kind"] for row in rows if "phantom" not in row["kind"]]


def test_the_same_pictures_every_time(evaluation: Evaluation, rows: list[dict]) -> None:
    assert figures(evaluation) == rows


def test_pictures_are_grey_and_differ() -> None:
    def three(draw) -> Iterator[np.ndarray]:
        return (draw(np.random.default_rng(i)) for i in range(3))

    draws = (novelty._noise, novelty._drawing, novelty._radiograph, lambda rng: novelty._photograph(rng, 0))
    for draw in draws:
        first, second, third = three(draw)
        assert first.ndim == 2
        assert first.dtype in (np.uint8, np.float32)
        assert first.min() >= 0
        assert first.max() <= (255 if first.dtype == np.uint8 else 1)
        assert not np.array_equal(first, second)
        assert not np.array_equal(second, third)


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
    assert not any("phantom" in row["kind"] for row in section)  # the small run is on phantoms
