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

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("thorough_ingest")]


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


def test_a_shortcut_copies_across_splits_and_a_broken_file_are_found(tmp_path: Path):
    root = tmp_path / "phantoms"
    dataset.write(root, PhantomConfig(slices=200, size=128))
    for path in root.glob("t*/normal/*.png"):
        Image.open(path).point(lambda level: level * 0.6).save(path)
    normal = sorted(root.glob("train/normal/*.png"))[:5]
    copies = [shutil.copy(path, root / "test" / "normal" / f"copy_{path.name}") for path in normal]
    (root / "train" / "normal" / "broken.png").write_bytes(normal[0].read_bytes()[:500])
    audit_ = audited(tmp_path, "official")
    assert "grey" in {row["family"] for row in audit_.shortcuts if row["flagged"]}
    assert {"leakage", "shortcut"} <= {finding.kind for finding in audit_.findings if finding.severity == "error"}
    leaked = {row["path"] for row in audit_.leakage["official"]["list"] if row["kind"] == "copy"}
    assert {path.relative_to(root).as_posix() for path in copies} <= leaked
    assert not audit_.leakage["grouped"]["list"]
    assert [row["path"] for row in audit_.unreadable] == ["train/normal/broken.png"]
