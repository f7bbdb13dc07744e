import errno
import os
from pathlib import Path

import pytest

from chestct.config.schema import DataConfig, SourceConfig
from chestct.data.sources import list_slices
from chestct.errors import DataError

LABELS = {
    "normal": "normal",
    "adenocarcinoma": "adenocarcinoma",
    "large.cell.carcinoma": "large_cell",
    "cancer": "cancer",
}


def fill(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return DataConfig(name="s", root=str(root), labels=LABELS)


def test_split_folders_and_suffixed_class_names_are_read(tmp_path):
    cfg = fill(
        tmp_path, "train/adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib/a.png", "test/normal/b.png", "valid/Normal/c.png"
    )
    found = {f.path: (f.folder_split, f.subtype) for f in list_slices(cfg)}
    assert found == {
        "train/adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib/a.png": ("train", "adenocarcinoma"),
        "test/normal/b.png": ("test", "normal"),
        "valid/Normal/c.png": ("valid", "normal"),
    }


def test_class_folders_without_splits_are_read_with_everything_below_them(tmp_path):
    cfg = fill(tmp_path, "normal/patient1/a.png", "cancer/b.png")
    assert [(f.folder_split, f.subtype) for f in list_slices(cfg)] == [("", "cancer"), ("", "normal")]


def test_a_folder_that_maps_to_nothing_is_an_error_that_names_it_and_the_key(tmp_path):
    cfg = fill(tmp_path, "normal/a.png", "sarcoma/b.png")
    with pytest.raises(DataError, match=r"sarcoma.*data\.labels"):
        list_slices(cfg)


def test_a_name_that_only_continues_a_label_is_not_that_label(tmp_path):
    cfg = fill(tmp_path, "normalised/a.png")
    with pytest.raises(DataError, match="normalised"):
        list_slices(cfg)


def test_a_folder_can_be_ignored_explicitly(tmp_path):
    cfg = fill(tmp_path, "normal/a.png", "sarcoma/b.png")
    cfg.labels = LABELS | {"sarcoma": "ignore"}
    assert [f.path for f in list_slices(cfg)] == ["normal/a.png"]


@pytest.mark.parametrize("what", ["missing", "empty", "no class folders"])
def test_a_root_without_slices_is_an_error_with_a_way_out(tmp_path, what):
    root = tmp_path / "data"
    if what != "missing":
        root.mkdir()
    if what == "no class folders":
        (root / "foo.txt").write_text("x")
    with pytest.raises(DataError, match=r"data=phantom") as error:
        list_slices(DataConfig(name="s", root=str(root), labels=LABELS))
    if what == "no class folders":
        assert "foo.txt" in str(error.value)


def test_several_sources_keep_their_own_mapping(tmp_path):
    fill(tmp_path / "a", "healthy/a.png")
    fill(tmp_path / "b", "normal/b.png")
    sources = {"a": SourceConfig(str(tmp_path / "a"), {"healthy": "normal"}), "b": SourceConfig(str(tmp_path / "b"))}
    found = list_slices(DataConfig(sources=sources, labels=LABELS))
    assert [(f.source, f.path, f.subtype) for f in found] == [
        ("a", "healthy/a.png", "normal"),
        ("b", "normal/b.png", "normal"),
    ]


def test_links_that_loop_are_not_followed(tmp_path):
    cfg = fill(tmp_path, "normal/a.png")
    (tmp_path / "normal" / "loop").symlink_to(tmp_path / "normal")
    assert [f.path for f in list_slices(cfg)] == ["normal/a.png"]


def test_order_does_not_depend_on_the_file_system(tmp_path):
    cfg = fill(tmp_path, "normal/b.png", "normal/a/z.png", "normal/a.png", "cancer/q.png")
    paths = [f.path for f in list_slices(cfg)]
    assert paths == ["cancer/q.png", "normal/a.png", "normal/b.png", "normal/a/z.png"]


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_left_out(tmp_path, monkeypatch):
    cfg = fill(tmp_path, "normal/a.png", "normal/locked/b.png")
    listed = os.scandir

    def scandir(path):
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"Cannot list .*locked: Permission denied"):
        list_slices(cfg)


def test_a_name_that_is_no_text_is_an_error_that_shows_it(tmp_path):
    cfg = fill(tmp_path, "normal/a.png")
    (tmp_path / "normal" / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    with pytest.raises(DataError, match=r"normal/\\udcff\.png is not UTF-8"):
        list_slices(cfg)


def test_names_in_any_script_and_as_long_as_can_be_are_read(tmp_path):
    names = ["胸部 CT – ü.png", "x" * 251 + ".png", "a b'\"\n.png"]
    cfg = fill(tmp_path, *(f"normal/{name}" for name in names))
    assert sorted(f.path for f in list_slices(cfg)) == sorted(f"normal/{name}" for name in names)


def test_links_to_nowhere_and_to_themselves_are_listed_for_ingest_to_refuse(tmp_path):
    cfg = fill(tmp_path, "normal/a.png")
    (tmp_path / "normal" / "nowhere.png").symlink_to("missing")
    (tmp_path / "normal" / "self.png").symlink_to("self.png")
    (tmp_path / "loop").symlink_to("loop")
    assert [f.path for f in list_slices(cfg)] == ["normal/a.png", "normal/nowhere.png", "normal/self.png"]
