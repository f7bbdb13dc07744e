"""The figures of the public set, complete with its 1000 files, that README quotes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chestct.audit.findings import Audit
from chestct.audit.stage import audit
from chestct.config.schema import SUBTYPES, DataConfig
from chestct.data.prepare import ingest
from chestct.data.splits import make_splits
from chestct.data.store import Store

ROOT = Path(__file__).parents[2].parent / "shared" / "data" / "chest-ct"
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
def quick() -> None:
    """Not here: these figures are quoted."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return ingest(CFG, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def result(store: Store) -> Audit:
    policies = ("official", "official_clean", "grouped")
    splits = {name: make_splits(store.manifest, "binary", replace(CFG, split=name)) for name in policies}
    return audit(store, splits, name=CFG.name, split="official", seed=0)


def baseline(result: Audit, name: str) -> dict[str, Any]:
    return next(row for row in result.shortcuts if row["name"] == name)


def test_copies(result: Audit, store: Store) -> None:
    groups = store.manifest.groupby("group")
    assert groups.size().max() <= 54  # copies of one slice in two windows: no chain through different patients
    assert (groups["label"].nunique() == 1).all()
    keys = ("files", "contents", "redundant", "exact_groups")
    assert [result.duplicates[key] for key in keys] == [1000, 847, 153, 59]
    assert result.duplicates["by_class"]["normal"] == {"files": 215, "contents": 66}


def test_leakage_of_the_official_split_and_of_no_other(result: Audit) -> None:
    official = result.leakage["official"]
    assert official["test"]["by_class"]["normal"]["copies"] == 46
    assert official["test"]["by_class"]["normal"]["slices"] == 54
    assert official["valid"]["by_class"]["normal"] == {"slices": 13, "copies": 10, "related": 0}
    assert official["test"]["copies"] == 46  # no cancer slice crosses exactly
    assert official["test"]["related"] == pytest.approx(181, abs=4)  # one pair at the threshold can tie several
    assert not result.leakage["official_clean"]["list"]
    assert not result.leakage["grouped"]["list"]
    assert (result.findings[0].kind, result.findings[0].severity) == ("leakage", "error")


def test_the_image_with_two_labels(result: Audit) -> None:
    names = [{Path(path).name for path in row["paths"]} for row in result.conflicts if row["kind"] == "copy"]
    assert names == [{"l4.png", "sq2.png"}]


def test_shortcuts(result: Audit) -> None:
    std = baseline(result, "std")
    assert std["auroc"] == pytest.approx(0.980, abs=0.002)
    assert std["flagged"]
    assert [round(baseline(result, name)["auroc"], 2) for name in ("height", "area", "width")] == [0.83, 0.82, 0.79]
    assert {f.kind for f in result.findings if f.severity == "error"} >= {"leakage", "shortcut"}
