"""What the phantoms plant, the audit finds, and on clean ones it finds nothing: through files, decoding and store."""

from dataclasses import replace
from pathlib import Path

import pytest

from chestct.audit import Audit, audit
from chestct.config.schema import SUBTYPES, DataConfig, PhantomConfig
from chestct.data.prepare import ingest
from chestct.data.splits import make_splits
from chestct.phantom import dataset

pytestmark = pytest.mark.slow


def audited(folder: Path, slices: int, *defects: str, split: str = "grouped") -> Audit:
    cfg = PhantomConfig(slices=slices, size=128, defects=list(defects))
    dataset.write(folder / "phantoms", cfg)
    root, labels = str(folder / "phantoms"), {name: name for name in SUBTYPES}
    data = DataConfig(root=root, labels=labels, split=split, size=64, max_unreadable=9)
    store = ingest(data, folder / "store")
    policies = ("official", "grouped")
    splits = {name: make_splits(store.manifest, "binary", replace(data, split=name)) for name in policies}
    return audit(store, splits, name="phantom", split=split)


def test_a_thousand_clean_phantoms_have_no_shortcut(tmp_path: Path):
    audit_ = audited(tmp_path, 1000)
    assert not [row["name"] for row in audit_.shortcuts if row["flagged"]]
    # Of half a million pairs of clean phantoms, a few come as near as near-copies do; no more is made of them.
    assert not [finding for finding in audit_.findings if finding.severity == "error"]
    assert audit_.duplicates["contents"] == 1000
    assert audit_.duplicates["near_pairs"] <= 12


def test_a_planted_shortcut_is_flagged(tmp_path: Path):
    audit_ = audited(tmp_path, 200, "shortcut_window")
    assert "grey" in {row["family"] for row in audit_.shortcuts if row["flagged"]}
    assert "shortcut" in {finding.kind for finding in audit_.findings if finding.severity == "error"}


def test_copies_across_splits_conflicts_and_broken_files_are_found(tmp_path: Path):
    audit_ = audited(tmp_path, 200, "across_splits", "label_conflict", "odd_files", split="official")
    truth = dataset.read_truth(tmp_path / "phantoms")
    assert truth is not None
    planted = [file for file in truth["files"] if file["defect"] == "across_splits"]
    crossing = {row[side] for row in audit_.leakage["official"]["list"] for side in ("path", "twin_path")}
    assert {file["path"] for file in planted} <= crossing
    conflicts = {path for row in audit_.conflicts for path in row["paths"]}
    assert {file["path"] for file in truth["files"] if file["defect"] == "label_conflict"} <= conflicts
    assert {row["path"] for row in audit_.unreadable} == {
        f["path"] for f in truth["files"] if f["defect"] == "odd_files"
    }
    assert not audit_.leakage["grouped"]["list"]
