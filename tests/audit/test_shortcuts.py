from typing import Any

import numpy as np
import pytest

from chestct.audit.shortcuts import BASELINES, shortcut_scores, shortcuts


def measure(data: Any, seed: int = 0) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in shortcuts(data.manifest, data.images, seed=seed)}


def flagged(rows: dict[str, dict[str, Any]]) -> set[str]:
    return {row["family"] for row in rows.values() if row["flagged"]}


@pytest.mark.parametrize(
    ("family", "column", "shift"), [("size", "width", 25), ("grey", "std", -0.12), ("border", "border_mean", 0.12)]
)
def test_a_planted_shortcut_is_flagged_in_its_family_whatever_its_direction(make_data, family, column, shift):
    data = make_data()
    data.manifest[column] += shift * (data.manifest["label"] == "cancer")
    rows = measure(data)
    assert family in flagged(rows)
    assert rows[column]["auroc"] > 0.75
    assert rows[column]["low"] < rows[column]["auroc"] < rows[column]["high"]
    if family != "size":  # the file's bytes per pixel follow its size
        assert flagged(rows) == {family}


def test_formats_and_pixels_tied_to_the_label_are_flagged(make_data):
    data = make_data()
    cancer = (data.manifest["label"] == "cancer").to_numpy()
    data.manifest["mode"] = np.where(cancer, "RGBA", "L")
    data.slices["image"][cancer] //= 2  # after preprocessing; the files' own levels differ as little as before
    data.slices["image"][cancer, :2] = 255
    rows = measure(data)
    assert [rows[name]["flagged"] for name in ("format_mode", "seen_mean", "border_ring", "std")] == [True] * 3 + [
        False
    ]


@pytest.mark.parametrize(
    ("slices", "by", "material", "significant"), [(1500, 0.025, 0.6, True), (40, 0.063, 0.5, False)]
)
def test_a_shortcut_is_both_material_and_significant_after_the_correction_for_many_rules(
    make_data, monkeypatch, slices, by, material, significant
):
    monkeypatch.setattr("chestct.audit.shortcuts.MATERIAL", material)
    data = make_data(slices)
    data.manifest["std"] += by * (data.manifest["label"] == "cancer")
    row = measure(data)["std"]
    assert row["low"] > 0.5
    assert row["significant"] is significant
    assert not row["flagged"]


def test_models_are_never_tested_on_a_group_they_were_trained_on(make_data):
    data = make_data(300)
    # Ten different slices of each patient; size gives the patient away, and labels are drawn by patient.
    patient = np.arange(300) // 10
    rng = np.random.default_rng(1)
    cancer = rng.permutation(np.arange(30) % 2).astype(bool)[patient]
    data.manifest = data.manifest.assign(
        group=patient, width=300 + rng.permutation(30)[patient], height=300 + rng.permutation(30)[patient],
        label=np.where(cancer, "cancer", "normal"), subtype=np.where(cancer, "cancer", "normal"),
    )  # fmt: skip
    row = measure(data)["size_forest"]
    assert row["auroc"] < 0.75
    assert not row["flagged"]


def test_slices_of_one_group_do_not_narrow_the_interval_and_copies_count_once(make_data):
    data = make_data(60)
    data.manifest["std"] += 0.05 * (data.manifest["label"] == "cancer")
    alone = measure(data)["std"]
    copies = data.manifest.loc[data.manifest.index.repeat(8)].reset_index(drop=True)
    data.manifest = copies
    assert measure(data)["std"] == alone
    data.manifest = copies.assign(content=[f"content {i}" for i in range(len(copies))])
    repeated = measure(data)["std"]
    assert repeated["auroc"] == pytest.approx(alone["auroc"])
    assert repeated["high"] - repeated["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.05)


def test_draws_without_a_normal_slice_leave_the_interval_whole(make_data, monkeypatch):
    monkeypatch.setattr("chestct.audit.shortcuts.MIN_GROUPS", 3)
    data = make_data(60)
    normal = data.manifest["label"] == "normal"  # of three patients, who have a cancer, too
    patients = data.manifest["group"][~normal].head(3).to_numpy()
    data.manifest.loc[normal, "group"] = patients[np.arange(normal.sum()) % 3]
    rows = measure(data)
    assert all(row["low"] <= row["auroc"] <= row["high"] for row in rows.values())


def test_undefined_figures_have_a_reason_instead_of_a_number(make_data):
    data = make_data(100)
    data.manifest["border_std"] = 0.0
    data.manifest.loc[5, "mean"] = np.nan
    rows = measure(data)
    assert (rows["border_std"]["auroc"], rows["border_std"]["reason"]) == (None, "the same for every slice")
    assert (rows["mean"]["auroc"], rows["mean"]["reason"]) == (None, "values are missing")
    one_class = make_data(50, cancer=1)
    assert {(row["auroc"], row["reason"]) for row in measure(one_class).values()} == {(None, "one class only")}
    few = measure(make_data(60, cancer=0.05))["std"]
    assert few["auroc"] is None
    assert "too few groups" in few["reason"]


def test_scores_for_a_test_set_use_the_direction_learned_on_train_and_all_repeats_exactly(make_data):
    data = make_data(400)
    cancer = data.manifest["label"] == "cancer"
    data.manifest["std"] += np.where(data.splits["grouped"] == "train", 0.3, -0.3) * cancer
    scores = shortcut_scores(data.manifest.assign(split=data.splits["grouped"]), data.images, seed=0)
    assert next(one.auroc for one in scores if one.title == "Standard deviation of grey levels") < 0.1
    rows = measure(data)
    assert list(rows) == [baseline.name for baseline in BASELINES]
    assert measure(data) == rows


def test_phantoms_beside_patients_neither_measure_nor_teach_a_shortcut(make_data):
    data = make_data(600)
    phantom, cancer = data.manifest.index >= 200, data.manifest["label"] == "cancer"
    data.manifest["source"] = np.where(phantom, "phantom", "clinic")
    data.manifest["std"] += np.where(phantom, -0.2, 0.2) * cancer
    both = measure(data)
    split = np.where(phantom, "train", data.splits["grouped"])
    learned = shortcut_scores(data.manifest.assign(split=split), data.images, seed=0)
    assert next(one.auroc for one in learned if one.title == "Standard deviation of grey levels") > 0.8
    data.manifest = data.manifest[~phantom]
    assert both == measure(data)
    assert both["std"]["flagged"]
