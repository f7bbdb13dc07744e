from unittest.mock import Mock

import pytest

from chestct.errors import DecodeError
from chestct.evaluation import novelty_check
from chestct.evaluation.sections import optional_sections


def test_what_is_no_chest_ct_lies_further_than_the_test_slices(evaluation, monkeypatch) -> None:
    assert optional_sections(evaluation) == {}
    monkeypatch.setattr(evaluation.cfg.evaluation, "novelty", 4)
    whole, *kinds = optional_sections(evaluation)["novelty"]
    assert whole["auroc"] > 0.95
    assert whole["beyond"].value > 0.9
    assert whole["pictures"] == sum(row["pictures"] for row in kinds if "test" not in row["kind"])
    assert len(kinds) == 6
    for row in kinds:
        for share in (row["beyond"], row["refused"]):
            assert 0 <= share.low <= share.value <= share.high <= 1
        assert row["refused"].value <= row["beyond"].value
    assert optional_sections(evaluation)["novelty"] == [whole, *kinds]


def test_a_file_that_nothing_here_can_decode_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(novelty_check._medical(99))
    monkeypatch.setattr(novelty_check, "decode", Mock(side_effect=DecodeError("a.dcm", "no decoder")))
    assert not list(novelty_check._medical(99))
