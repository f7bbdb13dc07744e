import pandas as pd
import pytest

from chestct.audit.stage import conflicts, duplicates, leaks


def table(rows: list[tuple[str, str, int]]) -> pd.DataFrame:
    """Rows of (subtype, content, group)."""
    manifest = pd.DataFrame(rows, columns=["subtype", "content", "group"])
    manifest["label"] = manifest["subtype"].where(manifest["subtype"] == "normal", "cancer")
    return manifest.assign(source="s", path=[f"{i}.png" for i in range(len(rows))])


def pairs_of(*rows: tuple[int, int, float, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["a", "b", "similarity", "kind"])


def test_copies_and_relatives_of_training_slices_are_counted_apart_and_by_class():
    manifest = table(
        [("normal", "x", 0), ("normal", "x", 0), ("squamous", "y", 1), ("squamous", "z", 1), ("normal", "n", 2)]
    )
    result = leaks(manifest, pd.Series(["train", "test", "train", "test", "test"]), pairs_of())
    assert result["test"] | {"by_class": None} == {"slices": 3, "copies": 1, "related": 1, "by_class": None}
    assert result["test"]["by_class"]["normal"] == {"slices": 2, "copies": 1, "related": 0}
    assert result["test"]["by_class"]["squamous"] == {"slices": 1, "copies": 0, "related": 1}
    assert [(row["path"], row["kind"], row["twin_path"]) for row in result["list"]] == [
        ("1.png", "copy", "0.png"),
        ("3.png", "related", "2.png"),
    ]


def test_validation_counts_as_known_for_test_alone_and_slices_left_out_neither_leak_nor_give_away():
    manifest = table([("normal", "x", 0), ("normal", "x", 0), ("normal", "y", 1), ("normal", "y", 1)])
    result = leaks(manifest, pd.Series(["test", "valid", "test", ""]), pairs_of())
    assert (result["test"]["copies"], result["valid"]["copies"], result["left_out"]) == (1, 0, 1)
    assert [(row["path"], row["twin_split"]) for row in result["list"]] == [("0.png", "valid")]


def test_the_twin_that_is_named_is_the_most_alike_of_the_earlier_ones():
    manifest = table([("normal", name, 0) for name in "vwxyz"])
    pairs = pairs_of((0, 3, 0.90, "near"), (3, 1, 0.95, "near"), (2, 3, 0.99, "near"))
    result = leaks(manifest, pd.Series(["train", "train", "test", "test", "test"]), pairs)
    assert [(row["path"], row["twin_path"]) for row in result["list"]] == [
        ("2.png", "0.png"),  # only its group is known
        ("3.png", "1.png"),  # 2.png is more alike, but a test slice itself
        ("4.png", "0.png"),
    ]


def test_duplicates_count_files_contents_and_near_pairs_of_different_contents_once():
    manifest = table([*[("normal", "x", 0)] * 3, ("normal", "y", 0), ("squamous", "z", 1)])
    pairs = pairs_of((0, 1, 1.0, "exact"), (0, 3, 0.99, "near"), (1, 3, 0.99, "near"), (3, 4, 0.0, "series"))
    result = duplicates(manifest, pairs)
    by_class = result.pop("by_class")
    assert list(result) == ["files", "contents", "redundant", "exact_groups", "near_pairs"]
    assert list(result.values()) == [5, 3, 2, 1, 1]
    assert by_class["normal"] == {"files": 4, "contents": 2}


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (("normal", "squamous"), [True]),
        (("normal", "cancer"), [True]),
        (("large_cell", "squamous"), [False]),
        (("cancer", "squamous"), []),  # cancer of unknown subtype may well be squamous
        (("squamous", "squamous"), []),
    ],
)
@pytest.mark.parametrize("kind", ["copy", "near"])
def test_conflicts_are_contradictions_only(classes: tuple[str, str], expected: list[bool], kind: str):
    manifest = table([(classes[0], "x", 0), (classes[1], "x" if kind == "copy" else "y", 0)])
    result = conflicts(manifest, pairs_of((0, 1, 0.99, "near")) if kind == "near" else pairs_of())
    assert [row["labels"] for row in result] == expected
    assert all(row["kind"] == kind and row["paths"] == ["0.png", "1.png"] for row in result)
    # Neighbours of one series may differ
    assert conflicts(table([("normal", "x", 0), ("squamous", "y", 0)]), pairs_of((0, 1, 0.99, "series"))) == []
