import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chestct.config.schema import SUBTYPES, Config, DataConfig, SourceConfig
from chestct.data.splits import (
    balanced_weights,
    check_own,
    identity,
    leaked,
    load_splits,
    make_splits,
    of_patients_first,
    stratified_group_split,
)
from chestct.errors import DataError


def make_manifest(groups, subtypes, folder_split=None, content=None):
    n = len(groups)
    subtypes = list(subtypes)
    return pd.DataFrame(
        {
            "path": [f"{i}.png" for i in range(n)],
            "source": "s",
            "group": groups,
            "content": content or [f"c{i}" for i in range(n)],
            "subtype": subtypes,
            "label": ["normal" if s == "normal" else "cancer" for s in subtypes],
            "folder_split": folder_split if folder_split is not None else "",
        }
    )


@given(st.lists(st.integers(0, 40), min_size=60, max_size=200), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_no_group_lands_in_two_splits(groups, seed):
    manifest = make_manifest(groups, np.random.default_rng(seed).choice(SUBTYPES, len(groups)))
    try:
        splits = make_splits(manifest, "binary", DataConfig(split_seed=seed))
    except DataError:
        return  # a class that sits in one or two groups cannot be in three splits
    assert not leaked(manifest, splits).any()
    assert (splits.groupby(manifest["group"]).nunique() == 1).all()


def test_classes_are_shared_out_as_asked_by_the_seed():
    manifest = make_manifest(range(1000), ["normal"] * 200 + ["squamous"] * 800)
    one, again, two = (make_splits(manifest, "binary", DataConfig(split_seed=seed)) for seed in (1, 1, 2))
    table = pd.crosstab(manifest["label"], one, normalize="index")
    assert np.allclose(table[["train", "valid", "test"]], [0.65, 0.15, 0.2], atol=0.01)
    assert one.equals(again)
    assert not one.equals(two)


def test_folds_test_every_slice_exactly_once():
    manifest = make_manifest(
        np.arange(300) // 3, ["normal", "normal", "normal", "squamous", "squamous", "squamous"] * 50
    )
    tested = [make_splits(manifest, "binary", DataConfig(folds=5, fold=f)) == "test" for f in range(5)]
    assert (np.sum(tested, axis=0) == 1).all()


def test_exact_copies_are_used_once_and_conflicting_labels_not_at_all():
    content = [f"c{i}" for i in range(100)]
    content[1] = content[0]  # a copy
    content[3] = content[2]  # the same image under two subtypes
    subtypes = ["normal", "normal", "large_cell", "squamous", *SUBTYPES * 24]
    groups = [0, 0, 2, 2, *range(4, 100)]
    manifest = make_manifest(groups, subtypes, content=content)
    splits = make_splits(manifest, "subtype", DataConfig())
    assert (splits[0], splits[1]).count("") == 1
    assert splits[2] == splits[3] == ""
    assert make_splits(manifest, "binary", DataConfig())[2] != ""  # both are cancer: no conflict there
    with pytest.raises(DataError, match="only known as cancer"):
        make_splits(manifest.assign(subtype="cancer"), "subtype", DataConfig())


OFFICIAL = ["train"] * 6 + ["valid"] * 4 + ["test"] * 4
CLASSES = ["normal", "squamous"] * 7


def test_a_held_out_source_is_test_alone_and_nothing_of_it_is_trained_on():
    manifest = make_manifest([*range(20), *range(18, 38)], ["normal", "squamous"] * 20)
    manifest["source"] = ["here"] * 20 + ["elsewhere"] * 20  # groups 18 and 19 are in both
    manifest.loc[21, ["content", "subtype", "label"]] = manifest.loc[19, ["content", "subtype", "label"]]  # a copy
    splits = make_splits(manifest, "binary", DataConfig(holdout=["elsewhere"], valid_fraction=0.2))
    assert (splits[20:] == "test").all()
    assert splits[:18].isin(["train", "valid"]).all()
    assert (splits[18:20] == "").all()
    assert (splits == "valid").sum() == pytest.approx(4, abs=1)


def test_a_class_that_only_held_out_sources_have_is_said_with_what_is_left():
    manifest = make_manifest(range(20), ["normal"] * 12 + ["normal", "squamous"] * 4)
    manifest["source"] = ["here"] * 12 + ["elsewhere"] * 8
    says = (
        r"no cancer slices in train and .* without what is held out \(elsewhere\), 12 normal slices make 12 groups, 0 "
    )
    with pytest.raises(DataError, match=rf"{says}cancer slices make 0 groups\. Hold out other sources, "):
        make_splits(manifest, "binary", DataConfig(holdout=["elsewhere"]))


@pytest.mark.parametrize("split", ["grouped", "official", "official_clean"])
def test_next_to_patients_phantoms_are_never_tested(split):
    manifest = make_manifest(range(200), ["normal", "squamous"] * 100, ["train", "valid", "test", "train", "test"] * 40)
    manifest["source"] = ["clinic", "clinic", "phantom", "phantom"] * 50
    both = {"clinic": SourceConfig("x"), "phantom": SourceConfig()}
    splits = make_splits(manifest, "binary", DataConfig(sources=both, split=split))
    phantom = manifest["source"] == "phantom"
    assert set(splits[phantom]) == {"train", "valid"}
    assert set(splits[~phantom]) == {"train", "valid", "test"}
    held = make_splits(manifest, "binary", DataConfig(sources=both, holdout=["phantom"]))
    assert (held[phantom] == "test").all()


def test_official_clean_drops_what_crosses_and_copies_in_train():
    groups = [0, 1, 2, 3, 0, 5, 0, 7, 8, 9, 8, 0, 12, 13]
    content = [f"c{i}" for i in range(14)]
    content[4] = content[0]
    manifest = make_manifest(groups, CLASSES, OFFICIAL, content)
    splits = make_splits(manifest, "binary", DataConfig(split="official_clean"))
    # A copy within train; valid with its group in train; test with its group in valid, and in train
    assert np.flatnonzero(splits == "").tolist() == [4, 6, 10, 11]


def test_official_clean_keeps_one_of_each_copy_whatever_the_order_of_the_folders():
    # test folders come first in a listing: [copy across, two copies within, two labels] + enough of everything else
    folders = ["test", "test", "test", "test", "test", "train"] + ["train", "valid", "test"] * 4
    subtypes = ["normal", "normal", "normal", "normal", "squamous", "normal"] + ["normal"] * 6 + ["squamous"] * 6
    content = ["across", "twice", "twice", "both", "both", "across", *(f"c{i}" for i in range(12))]
    groups = [0, 1, 1, 2, 2, 0, *range(3, 15)]
    splits = make_splits(
        make_manifest(groups, subtypes, folders, content), "binary", DataConfig(split="official_clean")
    )
    assert splits[:6].tolist() == ["", "test", "", "", "", "train"]
    assert (splits[6:] != "").all()


def test_official_takes_the_folders_word_where_there_is_one():
    manifest = make_manifest(range(14), CLASSES, OFFICIAL)
    assert make_splits(manifest, "binary", DataConfig(split="official")).tolist() == OFFICIAL
    assert load_splits(manifest, Config(data=DataConfig(split="official")))["target"].tolist() == [0, 1] * 7
    with pytest.raises(DataError, match=r"data\.split=grouped"):
        make_splits(make_manifest(range(14), CLASSES), "binary", DataConfig(split="official"))


@pytest.mark.parametrize("split", ["official", "official_clean"])
def test_a_source_without_a_split_of_its_own_is_named_not_dropped(split):
    manifest = make_manifest(range(28), [*CLASSES, *CLASSES], [*OFFICIAL, *[""] * 14])
    manifest.loc[14:, "source"] = "clinic"
    with pytest.raises(DataError, match=r"folders in: clinic\. Use data\.split=grouped"):
        make_splits(manifest, "binary", DataConfig(split=split))


def test_a_source_without_a_valid_folder_gives_some_of_its_training_slices():
    manifest = make_manifest(
        range(74), [*CLASSES, *["normal", "squamous"] * 30], [*OFFICIAL, *["train"] * 40, *["test"] * 20]
    )
    manifest.loc[14:, "source"] = "clinic"
    splits = make_splits(manifest, "binary", DataConfig(split="official"))
    assert splits[:14].tolist() == OFFICIAL
    assert (splits[14:] == "valid").sum() == 6


@pytest.mark.parametrize(
    ("drop", "says"), [("normal", "Only one class"), ("valid normal", "no normal slices in valid")]
)
def test_a_missing_class_is_said(drop, says):
    classes = ["squamous"] * 14 if drop == "normal" else [*["normal", "squamous"] * 3, *["squamous"] * 4, *CLASSES[:4]]
    with pytest.raises(DataError, match=says):
        make_splits(make_manifest(range(14), classes, OFFICIAL), "binary", DataConfig(split="official"))


def test_leakage_stops_the_run_unless_it_is_allowed_and_is_then_marked():
    manifest = make_manifest([0, *range(1, 10), 0, *range(11, 14)], CLASSES, OFFICIAL)
    with pytest.raises(DataError, match=r"1 of 4 test and 0 of 4 valid slices.*data\.allow_leakage=true"):
        load_splits(manifest, Config(data=DataConfig(split="official")))
    table = load_splits(manifest, Config(data=DataConfig(split="official", allow_leakage=True)))
    assert table["leaked"].sum() == 1


def test_who_trains_and_validates_and_what_leaks_is_as_it_was_or_an_error():
    manifest = load_splits(make_manifest(range(14), CLASSES, OFFICIAL), Config(data=DataConfig(split="official")))
    then = identity(manifest, "h" * 64)
    check_own(then, identity(manifest.sample(frac=1, random_state=0), "h" * 64), "best.ckpt", "train anew.")
    with pytest.raises(DataError, match=r"data changed since best\.ckpt .*, or train anew\."):
        check_own(then, identity(manifest, "i" * 64), "best.ckpt", "train anew.")
    swapped = manifest.replace({"split": {"train": "valid", "valid": "train"}})
    taken = manifest.assign(split=manifest["split"].where(manifest.index != 0, "test"))
    for other in (swapped, taken, manifest.assign(leaked=manifest["split"] == "test")):
        with pytest.raises(DataError, match=r"divided otherwise than when best\.ckpt .*, or train anew\."):
            check_own(then, identity(other, "h" * 64), "best.ckpt", "train anew.")
    with pytest.raises(DataError, match="earlier version wrote it"):
        check_own({"hash": "h" * 64, "leaks": 0}, then, "best.ckpt", "train anew.")


def test_validation_and_test_do_not_hang_on_one_large_group():
    counts = pd.DataFrame({"normal": [16, 8, 5, 5, 4, 4, 3, 3, 3, 2, 2, 2, *[1] * 9]})
    for seed in range(5):
        part = stratified_group_split(counts, [0.65, 0.15, 0.2], seed)
        assert counts["normal"].groupby(part).sum().tolist() == [43, 10, 13]
        assert (counts["normal"].groupby(part).max()[[1, 2]] <= 13 / 3).all()


def test_another_class_that_is_full_does_not_send_a_large_group_elsewhere():
    counts = pd.DataFrame({"cancer": [70, *[0] * 13], "normal": [0, 9, 6, *[1] * 11]})
    part = stratified_group_split(counts, [0.65, 0.15, 0.2], seed=0)  # 70 are more than all cancers of train
    assert part[1] == part[2] == 0


def test_classes_of_a_source_count_alike_and_sources_and_groups_by_roots():
    sizes = {("a", 1): [81, 9], ("a", 0): [10], ("b", 1): [5] + [1] * 5, ("b", 0): [30] * 3}  # slices of each group
    rows = [(s, y, f"{s}{y}{g}") for (s, y), groups in sizes.items() for g, n in enumerate(groups) for _ in range(n)]
    table = pd.DataFrame(rows, columns=["source", "target", "group"]).sample(frac=1, random_state=0)
    table["w"] = balanced_weights(table, table["target"].to_numpy())
    assert table["w"].mean() == pytest.approx(1)
    sums = table.groupby(["source", "target"])["w"].sum().unstack()
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-5)
    assert sums[0]["b"] / sums[0]["a"] == pytest.approx(3**0.25)  # three groups of normal slices to one
    share = table.groupby("group")["w"].sum()
    assert share["a10"] / share["a11"] == pytest.approx(3)  # 81 slices to 9
    assert share["b00"] == pytest.approx(share["b01"])
    third = table["w"].where(table["target"] == 0, balanced_weights(table, table["target"].to_numpy(), 1 / 3))
    cancer, normal = (third[table["target"] == k].groupby(table["source"]).sum() for k in (1, 0))
    np.testing.assert_allclose(cancer + normal / 3, normal * 2 / 3, rtol=1e-5)
    tenth = balanced_weights(table, table["target"].to_numpy(), sources={"a": 0.1})
    assert tenth.mean() == pytest.approx(1)  # whatever sources count, a step is as long
    ratio = tenth / table["w"]
    np.testing.assert_allclose(ratio / ratio.max(), np.where(table["source"] == "a", 0.1, 1), rtol=1e-5)


@pytest.mark.parametrize(
    ("sources", "labels", "kept"),
    [
        (["a", "phantom", "b", "phantom"], ["normal", "cancer", "cancer", "normal"], [True, False, True, False]),
        (["phantom", "phantom"], ["cancer", "normal"], [True, True]),
        (["a", "phantom"], ["cancer", "normal"], [True, True]),  # there are no other normals
    ],
)
def test_phantoms_do_not_count_where_there_are_patients(sources, labels, kept):
    assert of_patients_first(pd.DataFrame({"source": sources, "label": labels})).tolist() == kept
