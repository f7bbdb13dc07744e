"""What is planted among phantoms, the audit finds, and on clean ones it finds nothing: through files and store."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from chestct.audit.findings import Audit
from chestct.audit.stage import audit_store
from chestct.config.schema import SUBTYPES, Config, DataConfig, PhantomConfig
from chestct.data.prepare import ingest
from chestct.phantom import dataset

pytestmark = pytest.mark.slow


def audited(folder: Path, split: str = "grouped") -> Audit:
    root, labels = str(folder / "phantoms"), {name: name for name in SUBTYPES}
    data = DataConfig(root=root, labels=labels, split=split, size=64, max_unreadable=9)
    return audit_store(Config(data=data), ingest(data, folder / "store"))


def test_a_thousand_clean_phantoms_have_no_shortcut(tmp_path: Path):
    dataset.write(tmp_path / "phantoms", PhantomConfig(slices=1000, size=128))
    audit_ = audited(tmp_path)
    assert not [row["name"] for row in audit_.shortcuts if row["flagged"]]
    # Of half a million pairs of clean phantoms, a few come as near as near-copies do; no more is made of them.
    assert not [finding for finding in audit_.findings if finding.severity == "error"]
    assert audit_.duplicates["contents"] == 1000
    assert audit_.duplicates["near_pairs"] <= 12


def test_a_shortcut_copies_across_splits_conflicts_and_broken_files_are_found(tmp_path: Path):
    root = tmp_path / "phantoms"
    dataset.write(root, PhantomConfig(slices=200, size=128))
    for path in root.glob("t*/normal/*.png"):
        Image.open(path).point(lambda level: level * 0.6).save(path)
    normal, squamous = (sorted(root.glob(f"train/{name}/*.png"))[:5] for name in ("normal", "squamous"))
    crossing = [shutil.copy(path, root / "test" / "normal" / f"copy_{path.name}") for path in normal]
    conflicting = [shutil.copy(path, root / "train" / "normal" / path.name) for path in squamous]
    (root / "train" / "normal" / "broken.png").write_bytes(normal[0].read_bytes()[:500])
    audit_ = audited(tmp_path, "official")
    assert "grey" in {row["family"] for row in audit_.shortcuts if row["flagged"]}
    assert {"leakage", "shortcut"} <= {finding.kind for finding in audit_.findings if finding.severity == "error"}

    def named(*paths: Path) -> set[str]:
        return {path.relative_to(root).as_posix() for path in paths}

    leaked = {row["path"]: row for row in audit_.leakage["official"]["list"]}
    assert named(*crossing) <= {path for path, row in leaked.items() if row["kind"] == "copy"}
    assert not audit_.leakage["grouped"]["list"]
    conflicts = {path for row in audit_.conflicts if row["kind"] == "copy" for path in row["paths"]}
    assert conflicts == named(*squamous, *conflicting)
    assert [row["path"] for row in audit_.unreadable] == ["train/normal/broken.png"]
