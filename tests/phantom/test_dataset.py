"""A written set: deterministic, stratified, whole or absent."""

import hashlib
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


def test_layout_splits_and_masks_agree(tmp_path):
    cfg, root = PhantomConfig(slices=50, size=64, cancer=0.6), tmp_path / "set"
    dataset.write(root, cfg)
    files = dataset.plan(cfg)
    masks = {f"masks/{f.path}" for f in files if f.subtype != "normal"}
    assert {f.path for f in files} | masks == set(hashes(root))
    assert Counter(f.subtype for f in files) == {name: 20 if name == "normal" else 10 for name in SUBTYPES}
    for subtype in SUBTYPES:
        count = Counter(f.path.split("/")[0] for f in files if f.subtype == subtype)
        assert count.keys() == {"train", "valid", "test"}
        assert (count["test"], count["valid"]) == (round(0.2 * count.total()), round(0.15 * count.total()))
    for f in files:
        assert f.path.partition("/")[2] == f"{f.subtype}/phantom_{f.number:05d}.png"
        if f.subtype != "normal":
            with Image.open(root / f.path) as image, Image.open(root / "masks" / f.path) as mask:
                assert (image.mode, mask.mode, mask.size) == ("L", "1", image.size)
    drawn = dataset.thorax.draw(np.random.default_rng([cfg.seed, 2, 5]), files[5].subtype, cfg)
    with Image.open(root / files[5].path) as image:
        assert np.array_equal(image, dataset.thorax.display(drawn.hu, drawn.window))


@pytest.mark.slow
def test_the_same_settings_write_the_same_bytes_in_any_number_of_processes(tmp_path):
    cfg = PhantomConfig(slices=70, size=64)
    for processes in (1, 2):
        dataset.write(tmp_path / str(processes), cfg, processes=processes)
    dataset.write(tmp_path / "other", PhantomConfig(slices=70, size=64, seed=1))
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
    assert not set(hashes(tmp_path / "1").values()) & set(hashes(tmp_path / "other").values())


def test_what_is_there_already_is_left_as_it_is(tmp_path, monkeypatch):
    cfg = PhantomConfig(**SMALL)
    dataset.write(tmp_path / "set", cfg)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "scan.png").write_bytes(b"precious")
    (tmp_path / "file").write_bytes(b"precious")
    before = hashes(tmp_path)
    monkeypatch.setattr(dataset.thorax, "draw", lambda *_: pytest.fail("drawn again"))
    dataset.write(tmp_path / "set", cfg)
    for name in ("mine", "file"):
        with pytest.raises(DataError, match=f"missing from .*{name}. Remove that"):
            dataset.write(tmp_path / name, cfg)
    assert before.items() <= hashes(tmp_path).items()


def test_a_killed_run_leaves_nothing_that_looks_like_a_set(tmp_path, monkeypatch):
    cfg, root, write_file = PhantomConfig(**SMALL), tmp_path / "set", dataset._write_file

    def killed(folder, cfg, file):
        if file.number == 10:
            raise KeyboardInterrupt
        return write_file(folder, cfg, file)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_write_file", killed)
        with pytest.raises(KeyboardInterrupt):
            dataset.write(root, cfg)
    assert not root.exists()
    dataset.write(root, cfg)
    assert len(list(root.glob("[tv]*/*/*.png"))) == cfg.slices
    assert {p.name for p in tmp_path.iterdir()} == {"set", ".set.lock"}  # the next run clears up
