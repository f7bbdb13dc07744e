"""The figures of the public set, complete with its 1000 files, in the sentences of README and docs that quote them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from chestct.audit.findings import Audit, estimate, leaked
from chestct.audit.stage import audit_store, leaks
from chestct.config.schema import SUBTYPES, Config, DataConfig
from chestct.data.prepare import ingest
from chestct.data.public import SETS, published
from chestct.data.splits import make_splits
from chestct.data.store import Store

PROJECT = Path(__file__).parents[2]
ROOT = PROJECT.parent / "shared" / "data" / "chest-ct"
LABELS = {name.replace("_", "."): name for name in SUBTYPES}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sum(path.is_file() for path in ROOT.rglob("*")) != 1000,
        reason="the complete public set of 1000 files is not at ../shared/data/chest-ct",
    ),
]

CFG = DataConfig(name="chest_ct", root=str(ROOT), labels=LABELS)


@pytest.fixture(scope="module", autouse=True)
def quick(thorough_ingest: None) -> None:
    """Not here: these figures are quoted."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return ingest(CFG, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def splits(store: Store) -> dict[str, pd.Series]:
    policies = ("official", "official_clean", "grouped")
    return {name: make_splits(store.manifest, "binary", replace(CFG, split=name)) for name in policies}


@pytest.fixture(scope="module")
def result(store: Store) -> Audit:
    return audit_store(Config(data=replace(CFG, split="official")), store)


def baseline(result: Audit, name: str) -> dict[str, Any]:
    return next(row for row in result.shortcuts if row["name"] == name)


def assert_quoted(page: str, *sentences: str) -> None:
    """That the page says all of these, whatever its line breaks and bold type."""
    text = " ".join((PROJECT / page).read_text(encoding="utf-8").replace("**", "").split())
    assert [sentence for sentence in sentences if sentence not in text] == []


def test_it_is_known_as_what_was_published_whole_only(store: Store) -> None:
    assert published(CFG.name, store.manifest) is SETS[CFG.name]
    assert published(CFG.name, store.manifest[1:]) is None


def test_copies(result: Audit, store: Store) -> None:
    groups = store.manifest.groupby("group")
    assert groups.size().max() <= 54  # copies of one slice in two windows: no chain through different patients
    assert (groups["label"].nunique() == 1).all()
    keys = ("files", "contents", "redundant", "exact_groups")
    assert [result.duplicates[key] for key in keys] == [1000, 847, 153, 59]
    assert result.duplicates["by_class"]["normal"] == {"files": 215, "contents": 66}
    same, normal = "1000 files are 847 different images", "the 215 normal files are 66 images"
    assert_quoted("README.md", same, normal)
    assert_quoted("docs/data.md", same, "59 sets of exact copies hold 153 redundant files", normal)


def test_leakage_of_the_official_split_and_of_no_other(result, store, splits) -> None:
    official = result.leakage["official"]
    assert official["test"]["by_class"]["normal"]["copies"] == 46
    assert official["test"]["by_class"]["normal"]["slices"] == 54
    assert official["valid"]["by_class"]["normal"] == {"slices": 13, "copies": 10, "related": 0}
    assert official["test"]["copies"] == 46  # no cancer slice crosses exactly
    alone = splits["official"].where(splits["official"] != "valid", "")
    known, known_alone = leaked(official["test"]), leaked(leaks(store.manifest, alone, store.pairs)["test"])
    left = result.leakage["official_clean"]["test"]
    quoted = f"{known} of {official['test']['slices']} test slices are known from training or validation"
    counts = (
        f"({known_alone} from training alone); {left['slices']} are left, {left['by_class']['normal']['slices']} of"
    )
    assert_quoted("README.md", quoted, "46 of 54 normal test slices pixel for pixel from training")
    assert_quoted("docs/data.md", "46 of 54 normal test slices and 10 of 13 normal validation slices", quoted, counts)
    assert_quoted("RESULTS.md", quoted)
    assert not result.leakage["official_clean"]["list"]
    assert not result.leakage["grouped"]["list"]
    assert (result.findings[0].kind, result.findings[0].severity) == ("leakage", "error")


def test_there_are_hardly_any_normals(store: Store, splits: dict[str, pd.Series]) -> None:
    normal = store.manifest[store.manifest["label"] == "normal"]
    test = normal[splits["grouped"][normal.index] == "test"]
    images, groups, held_out = normal["content"].nunique(), normal["group"].nunique(), test["group"].nunique()
    assert_quoted(
        "README.md", f"{images} images in {groups} groups; {len(test)} of them, from {held_out} groups, are in"
    )
    assert_quoted("docs/data.md", f"The {images} normal images make {groups} groups;")
    assert_quoted("docs/data.md", f"{len(test)} of them, from {held_out} groups, are in test")


def test_the_image_with_two_labels(result: Audit) -> None:
    names = [{Path(path).name for path in row["paths"]} for row in result.conflicts if row["kind"] == "copy"]
    assert names == [{"l4.png", "sq2.png"}]
    near = [{Path(path).name for path in row["paths"]} for row in result.conflicts if row["kind"] == "near"]
    assert {"000115 (4).png", "000032.png"} in near  # as docs/data.md says


def test_shortcuts(result: Audit) -> None:
    std = baseline(result, "std")
    assert std["auroc"] == pytest.approx(0.980, abs=0.002)
    assert std["flagged"]
    for page in ("README.md", "docs/data.md"):
        assert_quoted(page, f"reaches AUROC {estimate(std)}.")
    assert_quoted(
        "docs/data.md",
        f"padded and as exported (`data.fit=pad data.contrast=keep`) {estimate(baseline(result, 'seen_std'))}.",
    )
    assert [round(baseline(result, name)["auroc"], 2) for name in ("height", "area", "width")] == [0.83, 0.82, 0.79]
    assert {f.kind for f in result.findings if f.severity == "error"} >= {"leakage", "shortcut"}
