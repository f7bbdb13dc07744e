import dataclasses
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from chestct.config.schema import DataConfig
from chestct.data import duplicates as groups
from chestct.data import ingest as ingest_module
from chestct.data import store as store_module
from chestct.data.ingest import ingest
from chestct.data.store import open_store, store_folder
from chestct.errors import DataError, DecodeError

LABELS = {"normal": "normal", "cancer": "cancer"}


@pytest.fixture
def cfg(tmp_path):
    """Settings of a source of twelve slices that have nothing in common."""
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "data" / ("normal" if i % 2 else "cancer")
        folder.mkdir(parents=True, exist_ok=True)
        draw(folder / f"{i}.png", rng)
    return DataConfig(name="s", root=str(tmp_path / "data"), labels=LABELS, size=64)


def draw(path, rng):
    coarse = Image.fromarray(rng.integers(0, 255, (9, 9), dtype=np.uint8))
    coarse.resize((90, 80), Image.Resampling.BICUBIC).save(path)


def count_decodes(monkeypatch):
    seen = []
    real = ingest_module.read
    monkeypatch.setattr(ingest_module, "read", lambda path, *rest: (seen.append(path), real(path, *rest))[1])
    return seen


def test_manifest_tells_what_the_files_are(cfg, tmp_path):
    store = ingest(cfg, tmp_path / "store")
    row = store.manifest.iloc[0]
    assert (row["path"], row["label"], row["width"], row["height"]) == ("cancer/0.png", "cancer", 90, 80)
    assert (row["format"], row["mode"]) == ("PNG", "L")
    gray = np.asarray(Image.open(tmp_path / "data" / row["path"])) / 255
    assert row["mean"] == pytest.approx(gray.mean(), abs=1e-4)
    border = np.concatenate([gray[:4].ravel(), gray[-4:].ravel(), gray[4:-4, :4].ravel(), gray[4:-4, -4:].ravel()])
    assert row["border_std"] == pytest.approx(border.std(), abs=1e-4)
    assert store.images.dtype == np.uint8
    assert store.manifest["group"].nunique() == 12


def test_second_run_decodes_nothing_and_changes_nothing(cfg, tmp_path, monkeypatch):
    first = ingest(cfg, tmp_path / "store")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").iterdir()}
    seen = count_decodes(monkeypatch)
    second = ingest(cfg, tmp_path / "store")
    assert seen == []
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "store").iterdir()}
    assert second.data_hash == first.data_hash


def test_new_files_alone_are_decoded(cfg, tmp_path, monkeypatch):
    ingest(cfg, tmp_path / "store")
    rng = np.random.default_rng(1)
    for i in range(3):
        draw(tmp_path / "data" / "normal" / f"new{i}.png", rng)
    seen = count_decodes(monkeypatch)
    store = ingest(cfg, tmp_path / "store")
    assert sorted(p.name for p in seen) == ["new0.png", "new1.png", "new2.png"]
    assert len(store.manifest) == 15
    fresh = ingest(cfg, tmp_path / "fresh")
    assert fresh.manifest.equals(store.manifest)
    assert np.array_equal(fresh.images[fresh.manifest["row"]], store.images[store.manifest["row"]])


def test_moved_and_removed_files_are_followed_without_decoding(cfg, tmp_path, monkeypatch):
    first = ingest(cfg, tmp_path / "store")
    (tmp_path / "data" / "cancer" / "0.png").rename(tmp_path / "data" / "normal" / "z.png")
    (tmp_path / "data" / "cancer" / "2.png").unlink()
    seen = count_decodes(monkeypatch)
    store = ingest(cfg, tmp_path / "store")
    assert seen == []
    assert len(store.manifest) == 11
    assert store.data_hash != first.data_hash
    moved = store.manifest.set_index("path").loc["normal/z.png"]
    original = first.manifest.set_index("path").loc["cancer/0.png"]
    assert np.array_equal(store.images[moved["row"]], first.images[original["row"]])


def test_copies_share_a_row_and_a_group_even_when_they_are_encoded_otherwise(cfg, tmp_path):
    source = tmp_path / "data" / "cancer" / "0.png"
    Image.open(source).convert("RGBA").save(tmp_path / "data" / "normal" / "copy.png")
    shutil.copy(source, tmp_path / "data" / "cancer" / "0 - Copy.png")
    table = ingest(cfg, tmp_path / "store").manifest.set_index("path")
    same = table.loc[["cancer/0.png", "cancer/0 - Copy.png", "normal/copy.png"]]
    assert same["row"].nunique() == same["group"].nunique() == same["content"].nunique() == 1
    assert same["file_hash"].nunique() == 2


def test_other_preprocessing_is_another_store(cfg, tmp_path):
    folders = {store_folder(cfg, tmp_path)}
    cfg.fit = "body"
    folders.add(store_folder(cfg, tmp_path))
    cfg.window.center = 40
    folders.add(store_folder(cfg, tmp_path))
    assert len(folders) == 3
    first = ingest(cfg, tmp_path / "store")
    cfg.fit = "stretch"
    assert not np.array_equal(ingest(cfg, tmp_path / "store").images, first.images)


def test_unreadable_files_are_listed_and_fail_beyond_the_limit(cfg, tmp_path):
    (tmp_path / "data" / "normal" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    (tmp_path / "data" / "normal" / "note.txt").write_text("hello")
    with pytest.raises(DataError, match=r"2 of 14 files cannot be read.*data\.max_unreadable"):
        ingest(cfg, tmp_path / "store")
    cfg.max_unreadable = 2
    store = ingest(cfg, tmp_path / "store")
    assert sorted(store.unreadable["path"]) == ["normal/broken.png", "normal/note.txt"]
    assert store.unreadable["reason"].str.len().min() > 5
    assert len(store.manifest) == 12


def test_a_file_that_needed_a_decoder_is_read_once_it_is_installed(cfg, tmp_path, monkeypatch):
    cfg.max_unreadable = 1
    real = ingest_module.decode

    def missing(data, window, limits, name):
        if name.endswith(victim):
            raise DecodeError(name, "needs a decoder: pip install 'chestct[dicom]'", lasting=False)
        return real(data, window, limits, name=name)

    victim = next((tmp_path / "data").rglob("*.png")).name
    monkeypatch.setattr(ingest_module, "decode", missing)
    assert len(ingest(cfg, tmp_path / "store").manifest) == 11
    monkeypatch.undo()
    store = ingest(cfg, tmp_path / "store")
    assert len(store.manifest) == 12
    assert store.unreadable.empty


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "data" / "normal").mkdir(parents=True)
    (tmp_path / "data" / "normal" / "a.png").write_text("hello")
    with pytest.raises(DataError, match="None of the 1 files"):
        ingest(DataConfig(name="s", root=str(tmp_path / "data"), labels=LABELS), tmp_path / "store")


def test_a_folder_without_a_store_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match="chestct ingest"):
        open_store(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Settings of two slices, and the folder of their store. Copied before it is changed."""
    root = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(4)
    for name in ("normal", "cancer"):
        (root / "data" / name).mkdir(parents=True)
        draw(root / "data" / name / "a.png", rng)
    cfg = DataConfig(name="s", root=str(root / "data"), labels=LABELS, size=64)
    ingest(cfg, root / "store")
    return cfg, root / "store"


@pytest.mark.parametrize("piece", ["images", "thumbs", "manifest", "pairs", "chestct-store"])
@pytest.mark.parametrize("damage", ["first bit", "header", "middle bit", "last bit", "cut", "empty", "gone"])
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
        data[{"first bit": 0, "header": 12, "middle bit": len(data) // 2, "last bit": -1}[damage]] ^= 1
        path.write_bytes(data)
    with pytest.raises(DataError, match=r"ingest"):
        open_store(folder)
    store = ingest(cfg, folder)
    assert store.manifest.equals(open_store(original).manifest)
    assert np.array_equal(store.images, open_store(original).images)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    if (piece, damage) != ("chestct-store", "gone"):
        assert err.count("\n") == 1
        assert "decoded again" in err


def test_a_piece_is_checked_once_in_a_process(made, monkeypatch):
    _, folder = made
    store_module._file_digest.cache_clear()
    read = []
    real = store_module.file_digest
    monkeypatch.setattr(store_module, "file_digest", lambda path: (read.append(path), real(path))[1])
    for _ in range(3):
        open_store(folder)
    assert len(read) == len(set(read)) == 4


def test_a_folder_with_other_files_is_refused_and_they_stay(cfg, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("images-of-holiday.txt", "manifesto.docx", "pairs.xlsx", "manifest.parquet"):
        (folder / name).write_text("mine")
    with pytest.raises(DataError, match=r"holds other files \(images-of-holiday\.txt, .*data\.store=FOLDER"):
        ingest(cfg, folder)
    assert {path.read_text() for path in folder.iterdir()} == {"mine"}
    assert len(list(folder.iterdir())) == 4


def test_files_that_come_to_lie_in_a_store_stay(cfg, tmp_path):
    ingest(cfg, tmp_path / "store")
    others = {"images-of-holiday.txt", "manifesto.docx", "pairs.xlsx", "thumbs.5.tmp.png", "images-0123.npy"}
    for name in others:
        (tmp_path / "store" / name).write_text("mine")
    draw(tmp_path / "data" / "normal" / "new.png", np.random.default_rng(3))
    assert len(ingest(cfg, tmp_path / "store").manifest) == 13
    assert {path.name for path in (tmp_path / "store").iterdir() if path.read_bytes() == b"mine"} == others


def test_a_store_of_an_earlier_version_is_replaced(cfg, tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    table = pa.table({"path": ["a"]}).replace_schema_metadata({"chestct": "{}"})
    pq.write_table(table, folder / "manifest.parquet")
    (folder / "images-0123456789abcdef.npy").write_bytes(b"old")
    assert len(ingest(cfg, folder).manifest) == 12
    assert len(list(folder.iterdir())) == 5


def test_what_is_skipped_is_kept_with_the_store_and_never_stops_it(cfg, tmp_path):
    assert ingest(cfg, tmp_path / "store").skipped.empty
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / "data" / "normal" / name).write_bytes(b"x")
    store = ingest(cfg, tmp_path / "store")
    assert len(store.manifest) == 12
    assert sorted(store.skipped["path"]) == ["normal/.DS_Store", "normal/Thumbs.db", "normal/desktop.ini"]
    (tmp_path / "data" / "normal" / "Thumbs.db").unlink()
    assert len(ingest(cfg, tmp_path / "store").skipped) == len(open_store(tmp_path / "store").skipped) == 2


def test_an_unwritable_folder_is_one_clear_error(cfg, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cache_dir=FOLDER"):
        ingest(cfg, tmp_path / "file" / "store")


@pytest.mark.parametrize("room", [0, 2_000, 50_000])  # for nothing, for headers, for some pixels
def test_a_full_disk_is_one_clear_error_and_the_old_state_stays(cfg, tmp_path, room):
    before = ingest(cfg, tmp_path / "store").manifest
    draw(tmp_path / "data" / "normal" / "new.png", np.random.default_rng(3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(DataError, match=r"File too large.*cache_dir=FOLDER"):
            ingest(cfg, tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert open_store(tmp_path / "store").manifest.equals(before)
    assert not list((tmp_path / "store").glob("*.tmp"))


def test_macos_needs_no_call_that_it_lacks(cfg, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os\nfor name in ('posix_fallocate', 'fdatasync'):\n    hasattr(os, name) and delattr(os, name)\n"
    )
    labels = "data.labels={normal: normal, cancer: cancer}"
    command = [
        sys.executable,
        "-m",
        "chestct",
        "ingest",
        f"data.root={cfg.root}",
        labels,
        "cache_dir=cache",
        "trainer.progress=false",
    ]
    path = os.pathsep.join([str(tmp_path / "site"), str(Path(__file__).parents[2])])
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("12 slices")


def _dying_ingest(cfg, folder, owner, name):
    setattr(owner, name, lambda *_, **__: os._exit(9))
    ingest(cfg, folder)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ingest_module, "_measure"),
        (groups, "find_pairs"),
        (pd.DataFrame, "to_parquet"),
        (Path, "replace"),
        (store_module, "write_atomic"),
    ],
)
def test_a_run_that_dies_leaves_the_old_state(cfg, tmp_path, owner, name):
    before = ingest(cfg, tmp_path / "store").manifest
    draw(tmp_path / "data" / "normal" / "new.png", np.random.default_rng(2))
    process = multiprocessing.get_context("fork").Process(
        target=_dying_ingest, args=(cfg, tmp_path / "store", owner, name)
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    assert open_store(tmp_path / "store").manifest.equals(before)
    assert len(ingest(cfg, tmp_path / "store").manifest) == 13
    assert len(list((tmp_path / "store").iterdir())) == 5


def test_files_with_the_same_bytes_are_decoded_once(cfg, tmp_path, monkeypatch):
    for i in range(3):
        shutil.copy(tmp_path / "data" / "cancer" / "0.png", tmp_path / "data" / "normal" / f"copy{i}.png")
        (tmp_path / "data" / "normal" / f"bad{i}.png").write_bytes(b"not an image")
    cfg.max_unreadable = 3
    seen = count_decodes(monkeypatch)
    store = ingest(cfg, tmp_path / "store")
    assert len(seen) == 13
    assert sorted(store.unreadable["path"]) == [f"normal/bad{i}.png" for i in range(3)]
    copies = store.manifest[store.manifest["path"].str.contains("copy")]
    assert len(copies) == 3
    original = store.manifest.set_index("path").loc["cancer/0.png"]
    for column in ("content", "row", "mean", "file_hash"):
        assert set(copies[column]) == {original[column]}
    assert store.manifest["file_hash"].nunique() == 12


def test_an_interrupted_run_does_not_wait_for_the_files_that_are_left(cfg, tmp_path, monkeypatch):
    seen = []

    def measure(file, *_):
        seen.append(file.path)
        time.sleep(0.2)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(ingest_module, "_measure", measure)
    with pytest.raises(KeyboardInterrupt):
        ingest(cfg, tmp_path / "store")
    assert len(seen) < 6


def test_colour_depth_and_kind_of_number_do_not_change_what_is_measured(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (40, 60)).astype(np.uint8)
    (tmp_path / "data" / "normal").mkdir(parents=True)
    Image.fromarray(levels).save(tmp_path / "data" / "normal" / "8.png")
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "data" / "normal" / "16.png")
    Image.fromarray(levels / np.float32(255)).save(tmp_path / "data" / "normal" / "32.tiff")
    cfg = DataConfig(name="s", root=str(tmp_path / "data"), labels=LABELS, size=64)
    table = ingest(cfg, tmp_path / "store").manifest
    assert table["content"].nunique() == 1
    assert table["file_hash"].nunique() == 3
    for column, value in (("mean", levels.mean() / 255), ("std", levels.std() / 255)):
        assert table[column].to_numpy() == pytest.approx(value, abs=1e-6)
    assert np.ptp(table["border_std"]) < 1e-6


def test_what_the_network_is_to_see_does_not_change_the_groups(cfg, tmp_path):
    image = Image.open(tmp_path / "data" / "cancer" / "0.png")
    image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC).save(
        tmp_path / "data" / "normal" / "larger.png"
    )
    stores = []
    for i, seen in enumerate(({}, {"size": 48, "fit": "body", "contrast": "body"})):
        stores.append(ingest(dataclasses.replace(cfg, **seen), tmp_path / f"store{i}"))
    first, other = stores
    assert first.images.shape != other.images.shape
    assert np.array_equal(first.thumbs, other.thumbs)
    assert first.pairs["kind"].tolist() == ["near"]
    assert first.manifest["group"].equals(other.manifest["group"])
