"""A written set: deterministic, stratified, whole or absent, and what its truth says."""

import hashlib
import json
from collections import Counter

import numpy as np
import pydicom
import pytest
from PIL import Image

from chestct.config.schema import SUBTYPES, PhantomConfig
from chestct.errors import ConfigError, DataError
from chestct.phantom import dataset
from chestct.phantom.thorax import PADDING

SMALL = {"slices": 14, "size": 64}


def hashes(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def test_layout_splits_and_truth_agree(tmp_path):
    cfg = PhantomConfig(slices=50, size=64, cancer=0.6)
    truth = dataset.write(tmp_path / "set", cfg)
    files = truth["files"]
    assert {f["path"] for f in files} | {f["mask"] for f in files if f["mask"]} | {"truth.json"} == set(
        hashes(tmp_path / "set")
    )
    assert Counter(f["subtype"] for f in files) == {name: 20 if name == "normal" else 10 for name in SUBTYPES}
    for subtype in SUBTYPES:
        count = Counter(f["split"] for f in files if f["subtype"] == subtype)
        total = sum(count.values())
        assert count["test"] == round(0.2 * total)
        assert count["valid"] == round(0.15 * total)
    for f in files:
        assert f["path"] == f"{f['split']}/{f['subtype']}/phantom_{f['index']:05d}.png"
        with Image.open(tmp_path / "set" / f["path"]) as image:
            assert (image.mode, image.size) == ("L", (f["width"], f["height"]))
        assert (f["mask"] is None) == (f["lesion"] is None) == (f["subtype"] == "normal")
    assert json.loads((tmp_path / "set" / "truth.json").read_text()) == truth


def test_masks_fit_their_slices_and_the_truth(tmp_path):
    for f in dataset.write(tmp_path / "set", PhantomConfig(**SMALL))["files"]:
        if f["mask"]:
            with Image.open(tmp_path / "set" / f["mask"]) as image:
                assert image.mode == "1"
                mask = np.asarray(image)
            assert mask.shape == (f["height"], f["width"])
            x0, y0, x1, y1 = f["lesion"]["box"]
            assert mask[y0:y1, x0:x1].sum() == mask.sum() == f["lesion"]["area"]
            assert mask[y0:y1, x0].any()
            assert mask[y1 - 1, x0:x1].any()


def test_a_slice_can_be_drawn_again_from_its_truth(tmp_path):
    cfg = PhantomConfig(**SMALL)
    entry = dataset.write(tmp_path / "set", cfg)["files"][5]
    drawn = dataset.thorax.draw(np.random.default_rng(entry["seed"]), entry["drawn"], cfg)
    with Image.open(tmp_path / "set" / entry["path"]) as image:
        assert np.array_equal(np.asarray(image), dataset.thorax.display(drawn.hu, entry["window"]))


@pytest.mark.slow
def test_the_same_settings_write_the_same_bytes(tmp_path):
    cfg = PhantomConfig(**SMALL, defects=["near", "odd_files"])
    dataset.write(tmp_path / "a", cfg)
    dataset.write(tmp_path / "b", cfg)
    dataset.write(tmp_path / "c", PhantomConfig(**SMALL, defects=["near", "odd_files"], seed=1))
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert hashes(tmp_path / "a") != hashes(tmp_path / "c")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["png", "dicom"])
def test_the_number_of_processes_changes_nothing(tmp_path, format):
    cfg = PhantomConfig(slices=70, size=64, defects=["exact", "near", "odd_files"], format=format)
    for processes in (1, 2):
        dataset.write(tmp_path / str(processes), cfg, processes=processes)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")


def test_dicom_gives_back_the_hounsfield_units(tmp_path):
    cfg = PhantomConfig(**SMALL, format="dicom")
    truth = dataset.write(tmp_path / "set", cfg)
    patients, instances = set(), set()
    for f in truth["files"]:
        ds = pydicom.dcmread(tmp_path / "set" / f["path"])  # without force: it must be a proper file
        drawn = dataset.thorax.draw(np.random.default_rng(f["seed"]), f["drawn"], cfg)
        hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        assert np.array_equal(hu, np.round(drawn.hu))
        assert hu.min() >= PADDING
        assert ds.SOPClassUID.name == "CT Image Storage"
        assert ds.SOPInstanceUID == ds.file_meta.MediaStorageSOPInstanceUID
        assert (ds.Rows, ds.Columns, ds.RescaleIntercept) == (f["height"], f["width"], -1024)
        assert ds.PixelSpacing == pytest.approx([f["spacing"]] * 2, abs=1e-4)
        assert [ds.WindowCenter, ds.WindowWidth] == pytest.approx(f["window"], abs=0.06)
        patients.add(ds.PatientID)
        instances.add(ds.SOPInstanceUID)
        assert all(len(uid) <= 64 for uid in (ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID))
    assert len(patients) == len(instances) == len(truth["files"])


def test_a_complete_set_is_reused_without_drawing(tmp_path, monkeypatch):
    cfg = PhantomConfig(**SMALL)
    first = dataset.write(tmp_path / "set", cfg)
    monkeypatch.setattr(dataset.thorax, "draw", lambda *_: pytest.fail("drawn again"))
    assert dataset.write(tmp_path / "set", cfg) == first


def test_other_settings_draw_anew(tmp_path):
    dataset.write(tmp_path / "set", PhantomConfig(**SMALL))
    before = hashes(tmp_path / "set")
    truth = dataset.write(tmp_path / "set", PhantomConfig(**SMALL, difficulty=0.9))
    assert truth["settings"]["difficulty"] == 0.9
    assert hashes(tmp_path / "set") != before
    assert {p.name for p in tmp_path.iterdir()} == {"set", ".set.lock"}


@pytest.mark.parametrize("truth", ["whole", "cut"])
def test_a_set_that_holds_somebodys_files_is_not_drawn_anew(tmp_path, truth):
    root = tmp_path / "set"
    dataset.write(root, PhantomConfig(**SMALL))
    mine = root / "train" / "normal" / "my notes.txt"
    mine.write_text("keep me", encoding="utf-8")
    (root / "train" / ".DS_Store").write_bytes(b"")
    if truth == "cut":
        (root / "truth.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"my notes\.txt"):
        dataset.write(root, PhantomConfig(**SMALL, difficulty=0.9))
    assert mine.read_text(encoding="utf-8") == "keep me"
    mine.unlink()
    dataset.write(root, PhantomConfig(**SMALL, difficulty=0.9))


@pytest.mark.parametrize("damage", ["slice", "mask", "truth_cut"])
def test_a_set_with_something_missing_is_not_reused(tmp_path, damage):
    cfg, root = PhantomConfig(**SMALL), tmp_path / "set"
    truth = dataset.write(root, cfg)
    whole = hashes(root)
    entry = next(f for f in truth["files"] if f["mask"])
    if damage == "truth_cut":
        (root / "truth.json").write_text('{"settings":')
    else:
        (root / entry["path" if damage == "slice" else "mask"]).unlink()
    dataset.write(root, cfg)
    assert hashes(root) == whole


def test_a_killed_run_leaves_nothing_that_looks_like_a_set(tmp_path, monkeypatch):
    cfg, root, drawn = PhantomConfig(**SMALL), tmp_path / "set", []
    draw = dataset.thorax.draw

    def killed(*args):
        drawn.append(1)
        if len(drawn) > 10:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(dataset.thorax, "draw", killed)
    # As after SIGKILL, when nothing is cleaned up either.
    monkeypatch.setattr(dataset.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        dataset.write(root, cfg)
    monkeypatch.undo()
    assert not root.exists()
    assert list(tmp_path.glob(".set-*"))
    assert len(dataset.write(root, cfg)["files"]) == cfg.slices
    assert {p.name for p in tmp_path.iterdir()} == {"set", ".set.lock"}  # the next run clears up


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "scan.png").write_bytes(b"precious")
    with pytest.raises(DataError, match="something other than phantoms"):
        dataset.write(tmp_path / "mine", PhantomConfig(**SMALL))
    assert (tmp_path / "mine" / "scan.png").read_bytes() == b"precious"


def test_a_misspelt_defect_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"exakt.*Known: exact"):
        dataset.write(tmp_path / "set", PhantomConfig(**SMALL, defects=["exakt"]))
    assert not (tmp_path / "set").exists()
