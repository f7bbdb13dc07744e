"""Features as a table: what is in it, and how they were made."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from chestct.files import digest
from chestct.imaging.decode import decode
from chestct.imaging.slice import pixel_hash
from chestct.models.bundle import load_bundle
from tests.conftest import command


@pytest.fixture
def embed(bundle_folder: Path):
    return lambda *given: command("embed", *given, "--bundle", bundle_folder)


def test_each_file_has_the_pooled_maps_of_its_square_and_its_hashes(embed, phantoms, bundle_folder, tmp_path) -> None:
    out = tmp_path / "features.parquet"
    assert embed(phantoms / "test", "--out", out) == 0
    table = parquet.read_table(out)
    rows, bundle = table.to_pylist(), load_bundle(bundle_folder)
    assert [row["path"] for row in rows] == sorted(map(str, (phantoms / "test").rglob("*.png")))
    for row in rows[:3]:
        data = Path(row["path"]).read_bytes()
        decoded = decode(data, bundle.window)
        assert (row["file_hash"], row["content"]) == (digest(data), pixel_hash(decoded.levels))
        (x,) = bundle.net.batches(bundle.preprocess(decoded.gray)[None])
        with torch.no_grad():
            expected = bundle.net.maps(x).mean((2, 3))[0].numpy()
        np.testing.assert_allclose(row["features"], expected, atol=1e-4)
    about = json.loads(table.schema.metadata[b"chestct"])
    assert (about["block"], about["pool"], about["bundle"]) == ("5", "mean", bundle.id)


def test_blocks_and_pools_are_of_choice_and_mistakes_end_in_a_sentence(embed, phantoms, tmp_path, capsys) -> None:
    out, one = tmp_path / "f.parquet", next((phantoms / "test").rglob("*.png"))
    (tmp_path / "notes.txt").write_text("no slice")
    for block, pool, width in (("3", "mean", 256), ("4", "max", 512), ("3+4", "mean+max", 2 * 768)):
        assert embed(one, tmp_path / "notes.txt", "--block", block, "--pool", pool, "--out", out) == 1
        (row,) = parquet.read_table(out).to_pylist()
        assert len(row["features"]) == width
    assert "notes.txt" in capsys.readouterr().err
    before = out.read_bytes()
    assert embed(tmp_path / "notes.txt", "--out", out) == 2
    assert out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"f.parquet", "notes.txt"}
    captured = capsys.readouterr()
    assert ("Features of" in captured.out, "notes.txt: neither" in captured.err) == (False, True)
    assert embed(one, "--out", ".") == 2
    assert "--out ." in capsys.readouterr().err
    assert embed(one, "--block", "7", "--out", out) == 2
    assert "--block 7" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS makes no file whose name is not UTF-8")
def test_a_name_that_is_no_text_is_escaped_as_chestct_predict_does(embed, phantoms, tmp_path) -> None:
    shutil.copy(next((phantoms / "test").rglob("*.png")), tmp_path / "\udcff.png")
    assert embed(tmp_path / "\udcff.png", "--out", tmp_path / "f.parquet") == 0
    assert parquet.read_table(tmp_path / "f.parquet")["path"].to_pylist() == [f"{tmp_path}/\\udcff.png"]
