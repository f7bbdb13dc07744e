"""From files to a store: what is decoded, what is kept, what is believed, and what survives damage and kills."""

import dataclasses
import gzip
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from chestct.config.schema import DataConfig
from chestct.data import duplicates, prepare, store
from chestct.data.prepare import ingest
from chestct.data.store import open_store, store_folder
from chestct.errors import DataError, DecodeError
from tests.conftest import limited
from tests.imaging.files import dicom

ROOT = Path(__file__).parents[2]
LABELS = {"normal": "normal", "cancer": "cancer"}


@pytest.fixture
def cfg(tmp_path):
    """Settings of a source of twelve slices that have nothing in common."""
    rng = np.random.default_rng(0)
    for i in range(12):
        draw(tmp_path / "data" / ("normal" if i % 2 else "cancer") / f"{i}.png", rng)
    return DataConfig(name="s", root=str(tmp_path / "data"), labels=LABELS, size=64)


def draw(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(rng.integers(0, 255, (9, 9), dtype=np.uint8))
    coarse.resize((90, 80), Image.Resampling.BICUBIC).save(path)


def test_manifest_tells_what_the_files_are(cfg, tmp_path):
    made = ingest(cfg, tmp_path / "store")
    row = made.manifest.iloc[0]
    assert (row["path"], row["source"], row["label"]) == ("cancer/0.png", "s", "cancer")
    assert (row["width"], row["height"], row["format"], row["mode"]) == (90, 80, "PNG", "L")
    gray = np.asarray(Image.open(tmp_path / "data" / row["path"])) / 255
    assert row["mean"] == pytest.approx(gray.mean(), abs=1e-4)
    edge = np.ones(gray.shape, bool)
    edge[4:-4, 4:-4] = False
    assert row["border_std"] == pytest.approx(gray[edge].std(), abs=1e-4)
    assert (made.images.dtype, made.images.shape) == (np.uint8, (12, 64, 64))
    assert made.manifest["group"].nunique() == 12


def test_an_unchanged_store_is_not_touched_and_any_change_makes_it_anew(cfg, tmp_path):
    folder, data = tmp_path / "store", tmp_path / "data"
    first = ingest(cfg, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert ingest(cfg, folder).data_hash == first.data_hash
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (data / "cancer" / "0.png").rename(data / "normal" / "z.png")
    draw(data / "normal" / "new.png", np.random.default_rng(1))
    changed = ingest(cfg, folder)
    assert changed.data_hash != first.data_hash
    assert len(changed.manifest) == 13
    assert ingest(dataclasses.replace(cfg, fit="stretch"), folder).settings["fit"] == "stretch"


def test_copies_share_a_row_and_a_group_and_equal_bytes_are_decoded_once(cfg, tmp_path, monkeypatch):
    seen, real = [], prepare.decode
    monkeypatch.setattr(prepare, "decode", lambda *args, name: (seen.append(name), real(*args, name=name))[1])
    source = tmp_path / "data" / "cancer" / "0.png"
    Image.open(source).convert("RGBA").save(tmp_path / "data" / "normal" / "other.png")
    for i in range(3):
        shutil.copy(source, tmp_path / "data" / "normal" / f"copy{i}.png")
    made = ingest(cfg, tmp_path / "store")
    assert len(seen) == 13
    same = made.manifest[made.manifest["path"].str.contains(r"/0\.png|copy|other")]
    assert len(same) == 5
    assert same[["row", "group", "content", "mean"]].nunique().tolist() == [1, 1, 1, 1]
    assert same["file_hash"].nunique() == 2


def test_other_preprocessing_is_another_store_with_the_same_groups(cfg, tmp_path):
    image = Image.open(tmp_path / "data" / "cancer" / "0.png")
    image.resize((180, 160), Image.Resampling.BICUBIC).save(tmp_path / "data" / "normal" / "larger.png")
    other = dataclasses.replace(cfg, size=48, fit="body", contrast="body")
    assert store_folder(cfg, tmp_path) != store_folder(other, tmp_path)
    one, two = ingest(cfg, tmp_path / "store"), ingest(other, tmp_path / "other")
    assert one.images.shape != two.images.shape
    assert one.pairs["kind"].tolist() == ["near"]
    assert one.manifest["group"].equals(two.manifest["group"])


def test_a_volume_in_a_class_folder_is_not_read_as_its_middle_slice(cfg, tmp_path):
    volume = np.random.default_rng(0).integers(-1000, 0, (80, 90, 9)).astype(np.int16)
    path = tmp_path / "data" / "cancer" / "v.nii.gz"
    path.write_bytes(gzip.compress(nibabel.Nifti1Image(volume, np.eye(4)).to_bytes()))
    made = ingest(dataclasses.replace(cfg, max_unreadable=1), tmp_path / "store")
    assert [row["reason"] for row in made.unreadable] == ["NIFTI: it is a volume; export its slices, one a file"]
    assert len(made.manifest) == 12


def test_unreadable_and_skipped_files_are_listed_and_the_first_fail_beyond_the_limit(cfg, tmp_path):
    folder = tmp_path / "data" / "normal"
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    (folder / "note.txt").write_text("hello")
    (folder / "nowhere.png").symlink_to("missing")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"3 of 15 files cannot be read.*data\.max_unreadable"):
        ingest(cfg, tmp_path / "store")
    made = ingest(dataclasses.replace(cfg, max_unreadable=3), tmp_path / "store")
    assert [row["path"] for row in made.unreadable] == ["normal/broken.png", "normal/note.txt", "normal/nowhere.png"]
    assert min(len(row["reason"]) for row in made.unreadable) > 5
    assert len(made.manifest) == 12
    assert [row["path"] for row in made.skipped] == ["normal/.DS_Store", "normal/Thumbs.db", "normal/desktop.ini"]
    assert "3 skipped: normal/.DS_Store (hidden)" in prepare.describe(made)
    for path in tmp_path.glob("data/*/[0-9]*.png"):
        path.unlink()
    with pytest.raises(DataError, match="None of the 3 files can be read"):
        ingest(cfg, tmp_path / "store")


def test_files_that_are_no_axial_ct_slices_are_left_out_and_named(cfg, tmp_path):
    stored = np.random.default_rng(0).integers(0, 1500, (64, 64)).astype(np.int16)
    others = {
        "scout": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        "mr": {"Modality": "MR"},
        "coronal": {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]},
        "slice": {},
    }
    for name, elements in others.items():
        (tmp_path / "data" / "cancer" / f"{name}.dcm").write_bytes(dicom(stored, **elements))
    made = ingest(cfg, tmp_path / "store")
    assert made.manifest["path"].str.endswith(".dcm").sum() == 1
    assert [row["path"] for row in made.skipped] == ["cancer/coronal.dcm", "cancer/mr.dcm", "cancer/scout.dcm"]
    assert not made.unreadable
    assert not made.notes
    assert "3 skipped: cancer/coronal.dcm (This slice is not axial" in prepare.describe(made)
    for path in tmp_path.glob("data/*/*"):
        if path.name != "scout.dcm":
            path.unlink()
    with pytest.raises(DataError, match=r"None of the 1 files can be read as a slice; .*This is a scout"):
        ingest(cfg, tmp_path / "store")


def test_a_file_that_needed_a_decoder_is_read_once_it_is_installed(cfg, tmp_path, monkeypatch):
    cfg.max_unreadable = 1
    real = prepare.decode

    def missing(data, window, limits, name):
        if name == "cancer/0.png":
            raise DecodeError(name, "needs a decoder: pip install 'chestct[dicom]'", lasting=False)
        return real(data, window, limits, name=name)

    monkeypatch.setattr(prepare, "decode", missing)
    assert len(ingest(cfg, tmp_path / "store").manifest) == 11
    monkeypatch.undo()
    made = ingest(cfg, tmp_path / "store")
    assert len(made.manifest) == 12
    assert not made.unreadable


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Settings of two slices, and the folder of their store. Copied before it is changed."""
    root = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(4)
    for name in LABELS:
        draw(root / "data" / name / "a.png", rng)
    cfg = DataConfig(name="s", root=str(root / "data"), labels=LABELS, size=64)
    ingest(cfg, root / "store")
    return cfg, root / "store"


@pytest.mark.parametrize("piece", ["slices", "manifest", "pairs", "chestct-store"])
@pytest.mark.parametrize("damage", ["first bit", "last bit", "cut", "empty", "gone"])
def test_a_damaged_store_is_never_believed_and_made_anew_with_one_line(made, tmp_path, capsys, piece, damage):
    cfg, original = made
    folder = shutil.copytree(original, tmp_path / "store")
    (path,) = folder.glob(f"{piece}*")
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage in ("cut", "empty"):
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    else:
        data[0 if damage == "first bit" else -1] ^= 1
        path.write_bytes(data)
    with pytest.raises(DataError, match=r"chestct ingest"):
        open_store(folder)
    again = ingest(cfg, folder)
    assert again.manifest.equals(open_store(original).manifest)
    assert np.array_equal(again.slices, open_store(original).slices)
    if (piece, damage) != ("chestct-store", "gone"):
        (line,) = capsys.readouterr().err.splitlines()
        assert "decoded again" in line


def test_files_that_are_not_its_own_stay(cfg, tmp_path, monkeypatch):
    others = {"images-of-holiday.txt", "manifesto.docx", "pairs.xlsx", "manifest.parquet", "images-0123.npy"}
    for folder in (tmp_path / "mine", tmp_path / "store"):
        if folder.name == "store":
            ingest(cfg, folder)
        folder.mkdir(exist_ok=True)
        for name in others:
            (folder / name).write_text("mine")
    monkeypatch.chdir(tmp_path / "mine")
    for folder in (tmp_path / "mine", Path()):
        with pytest.raises(DataError, match=r"holds other files \(images-0123\.npy, .*data\.store=FOLDER"):
            ingest(cfg, folder)
    draw(tmp_path / "data" / "normal" / "new.png", np.random.default_rng(3))
    assert len(ingest(cfg, tmp_path / "store").manifest) == 13
    for folder in (tmp_path / "mine", tmp_path / "store"):
        assert {path.name for path in folder.iterdir() if path.read_bytes() == b"mine"} == others


def test_a_store_of_another_version_is_made_anew(made, tmp_path, monkeypatch):
    cfg, original = made
    folder = shutil.copytree(original, tmp_path / "store")
    (folder / "thumbs-0123456789abcdef.npy").write_bytes(b"old")
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    with pytest.raises(DataError, match="another version"):
        open_store(folder)
    assert len(ingest(cfg, folder).manifest) == 2
    assert len(list(folder.iterdir())) == 4


def test_an_unwritable_folder_is_one_clear_error(cfg, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cache_dir=FOLDER"):
        ingest(cfg, tmp_path / "file" / "store")


@pytest.mark.parametrize("room", [0, 2_000, 50_000])  # for nothing, for no slice, for some slices
def test_a_full_disk_is_one_clear_error_and_the_old_state_stays(cfg, tmp_path, room):
    before = ingest(cfg, tmp_path / "store").manifest
    draw(tmp_path / "data" / "normal" / "new.png", np.random.default_rng(3))
    with limited(resource.RLIMIT_FSIZE, room), pytest.raises(DataError, match=r"File too large.*cache_dir=FOLDER"):
        ingest(cfg, tmp_path / "store")
    assert open_store(tmp_path / "store").manifest.equals(before)
    assert not list((tmp_path / "store").glob("*partial"))


def test_macos_needs_no_call_that_it_lacks(cfg, tmp_path, monkeypatch):
    for name in ("posix_fallocate", "fdatasync"):
        monkeypatch.delattr(os, name, raising=False)
    assert len(ingest(cfg, tmp_path / "store").manifest) == 12


@pytest.mark.parametrize("step", ["prepare._measure", "prepare.find_pairs", "Path.replace", "store.write_atomic"])
def test_a_run_that_dies_leaves_the_old_state(cfg, tmp_path, step):
    before = ingest(cfg, tmp_path / "store").manifest
    draw(tmp_path / "data" / "normal" / "new.png", np.random.default_rng(2))
    code = f"""
import os
from pathlib import Path
from chestct.config.schema import *
from chestct.data import duplicates, prepare, store
duplicates.CHANGES = {duplicates.CHANGES}
{step} = lambda *_, **__: os._exit(9)
prepare.ingest({cfg}, Path({str(tmp_path / "store")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert open_store(tmp_path / "store").manifest.equals(before)
    assert len(ingest(cfg, tmp_path / "store").manifest) == 13
    assert len(list((tmp_path / "store").iterdir())) == 4
