"""A written set: deterministic, stratified, whole or absent, and what its truth says."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from chestct.config.schema import SUBTYPES, PhantomConfig
from chestct.errors import DataError
from chestct.phantom import dataset

SMALL = {"slices": 14, "size": 64}


def hashes(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def grey(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L"), float) / 255


def test_layout_splits_masks_and_truth_agree(tmp_path):
    cfg, root = PhantomConfig(slices=50, size=64, cancer=0.6), tmp_path / "set"
    truth = dataset.write(root, cfg)
    files = truth["files"]
    assert {f["path"] for f in files} | {f["mask"] for f in files if f["mask"]} | {"truth.json"} == set(hashes(root))
    assert Counter(f["subtype"] for f in files) == {name: 20 if name == "normal" else 10 for name in SUBTYPES}
    for subtype in SUBTYPES:
        count = Counter(f["split"] for f in files if f["subtype"] == subtype)
        assert (count["test"], count["valid"]) == (round(0.2 * count.total()), round(0.15 * count.total()))
    for f in files:
        assert f["path"] == f"{f['split']}/{f['subtype']}/phantom_{f['index']:05d}.png"
        assert (f["mask"] is None) == (f["subtype"] == "normal")
        if f["mask"]:
            with Image.open(root / f["path"]) as image, Image.open(root / f["mask"]) as mask:
                assert (image.mode, mask.mode, mask.size) == ("L", "1", image.size)
    assert json.loads((root / "truth.json").read_text()) == truth
    drawn = dataset.thorax.draw(np.random.default_rng([cfg.seed, 2, 5]), files[5]["subtype"], cfg)
    shown = dataset.thorax.display(drawn.hu, drawn.window)
    np.testing.assert_allclose(grey(root / files[5]["path"]), shown / 255)


@pytest.mark.slow
def test_the_same_settings_write_the_same_bytes_in_any_number_of_processes(tmp_path):
    cfg = PhantomConfig(slices=70, size=64)
    for processes in (1, 2):
        dataset.write(tmp_path / str(processes), cfg, processes=processes)
    dataset.write(tmp_path / "other", PhantomConfig(slices=70, size=64, seed=1))
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
    assert not set(hashes(tmp_path / "1").values()) & set(hashes(tmp_path / "other").values())


def test_a_whole_set_is_reused_and_anything_else_is_left_alone(tmp_path, monkeypatch):
    cfg, root = PhantomConfig(**SMALL), tmp_path / "set"
    first = dataset.write(root, cfg)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "scan.png").write_bytes(b"precious")
    (tmp_path / "file").write_bytes(b"precious")
    before = hashes(tmp_path)
    monkeypatch.setattr(dataset.thorax, "draw", lambda *_: pytest.fail("drawn again"))
    assert dataset.write(root, cfg) == first
    for path, settings in ((root, {"difficulty": 0.9}), (tmp_path / "mine", {}), (tmp_path / "file", {})):
        with pytest.raises(DataError, match="other than these phantoms"):
            dataset.write(path, PhantomConfig(**SMALL, **settings))
    assert before.items() <= hashes(tmp_path).items()
    (root / first["files"][0]["path"]).unlink()
    with pytest.raises(DataError, match="other than these phantoms"):
        dataset.write(root, cfg)


def test_a_killed_run_leaves_nothing_that_looks_like_a_set(tmp_path, monkeypatch):
    cfg, root, write_file = PhantomConfig(**SMALL), tmp_path / "set", dataset._write_file

    def killed(folder, cfg, file):
        if file.index == 10:
            raise KeyboardInterrupt
        return write_file(folder, cfg, file)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_write_file", killed)
        with pytest.raises(KeyboardInterrupt):
            dataset.write(root, cfg)
    assert not root.exists()
    assert len(dataset.write(root, cfg)["files"]) == cfg.slices
    assert {p.name for p in tmp_path.iterdir()} == {"set", ".set.lock"}  # the next run clears up
