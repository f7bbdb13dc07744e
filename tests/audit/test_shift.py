from collections.abc import Callable
from typing import Any

import numpy as np

from chestct.audit.shift import shift


def test_splits_drawn_at_random_show_no_shift(make_data: Callable[..., Any]) -> None:
    data = make_data(600)
    assert not any(row["flagged"] for row in shift(data.manifest, data.splits["grouped"]))


def test_a_test_set_from_elsewhere_is_flagged_by_the_number_that_differs(make_data: Callable[..., Any]) -> None:
    data = make_data(300)
    data.manifest["border_mean"] += 0.1 * (data.splits["grouped"] == "test")
    assert [row["name"] for row in shift(data.manifest, data.splits["grouped"]) if row["flagged"]] == ["border_mean"]


def test_a_significant_difference_that_is_small_is_not_flagged(make_data: Callable[..., Any]) -> None:
    data = make_data(6000)
    data.manifest["mean"] += 0.02 * (data.splits["grouped"] == "test")
    row = next(row for row in shift(data.manifest, data.splits["grouped"]) if row["name"] == "mean")
    assert row["p"] < 0.001
    assert not row["flagged"]


def test_copies_of_one_slice_do_not_make_a_shift(make_data: Callable[..., Any]) -> None:
    data = make_data(100)
    test = np.flatnonzero(data.splits["grouped"] == "test")
    repeated = np.concatenate([np.arange(100), np.repeat(test[:2], 200)])
    manifest = data.manifest.iloc[repeated].reset_index(drop=True)
    assert not any(
        row["flagged"] for row in shift(manifest, data.splits["grouped"].iloc[repeated].reset_index(drop=True))
    )


def test_too_few_groups_give_a_reason(make_data: Callable[..., Any]) -> None:
    data = make_data(20)
    row = shift(data.manifest, data.splits["grouped"])[0]
    assert row["distance"] is None
    assert "too few groups" in row["reason"]
