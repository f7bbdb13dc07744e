"""A written set: deterministic, stratified, whole or absent, and what its truth says, planted faults included."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from chestct.config.schema import COPIES, SUBTYPES, PhantomConfig
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
    drawn = dataset.thorax.draw(np.random.default_rng([cfg.seed, 2, 5]), files[5]["drawn"], cfg)
    shown = dataset.thorax.display(drawn.hu, drawn.window)
    np.testing.assert_allclose(grey(root / files[5]["path"]), shown / 255)


@pytest.mark.slow
def test_the_same_settings_write_the_same_bytes_in_any_number_of_processes(tmp_path):
    cfg = PhantomConfig(slices=70, size=64, defects=["near", "odd_files"])
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


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted") / "set"
    cfg = PhantomConfig(slices=200, size=96, defects=list(COPIES))
    return root, dataset.write(root, cfg, processes=1)["files"]


def copies(files, defect):
    originals = {f["path"]: f for f in files}
    pairs = [(f, originals[f["original"]]) for f in files if f["defect"] == defect]
    assert len(pairs) == 10
    return pairs


@pytest.mark.parametrize("defect", ["across_splits", "label_conflict"])
def test_exact_copies_are_the_same_bytes(planted, defect):
    root, files = planted
    for copy, original in copies(files, defect):
        assert (root / copy["path"]).read_bytes() == (root / original["path"]).read_bytes()
        assert (copy["split"] != original["split"]) == (defect == "across_splits")
        assert (copy["subtype"] != original["subtype"]) == (defect == "label_conflict")
        assert copy["path"].startswith(f"{copy['split']}/{copy['subtype']}/")


def test_near_copies_differ_in_bytes_but_not_in_what_they_show(planted):
    root, files = planted

    def thumbnail(f, margin=0.0):
        """Standardised 32 x 32 picture without a margin, a fraction of the side."""
        with Image.open(root / f["path"]) as image:
            box = (margin * image.width, margin * image.height, (1 - margin) * image.width, (1 - margin) * image.height)
            small = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX, box), float)
        return (small - small.mean()) / small.std()

    for copy, original in copies(files, "near"):
        assert (root / copy["path"]).read_bytes() != (root / original["path"]).read_bytes()
        same = np.mean(thumbnail(copy) * thumbnail(original, 0.03 if "left" in copy["change"] else 0.0))
        strangers = [f for f in files if f["defect"] is None and f["index"] != copy["index"]]
        assert same > max(0.75, *(np.mean(thumbnail(copy) * thumbnail(f)) for f in strangers))
        with Image.open(root / copy["path"]) as image:
            assert image.format == "JPEG"
