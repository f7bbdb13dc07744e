import errno
import os
from pathlib import Path

import pytest

from chestct.imaging.slice_files import is_slice_name, walk, why_skipped

LEFTOVERS = (
    "Thumbs.db", "THUMBS.DB", "desktop.ini", ".DS_Store", "._a.png", "DICOMDIR", "__MACOSX", "@eaDir", ".AppleDouble",
    ".ipynb_checkpoints", ".thumbnails", "$RECYCLE.BIN", "~$list.xlsx", "Icon\r",
)  # fmt: skip


@pytest.mark.parametrize("name", LEFTOVERS)
def test_what_systems_leave_behind_is_skipped_with_a_reason(name: str) -> None:
    assert why_skipped(name)
    assert not is_slice_name(f"scan/{name}")
    assert not is_slice_name(f"{name}/a.png")
    assert not is_slice_name(f"scan\\{name}\\a.png")


@pytest.mark.parametrize("name", ["a.png", "IM0001", "a/b.dcm", "a\\b.png", "../../etc/passwd", "./a.png", "notes.txt"])
def test_any_other_name_may_be_a_slice(name: str) -> None:
    assert is_slice_name(name)


@pytest.mark.parametrize("name", ["", "a/", "a\\"])
def test_a_folder_entry_is_no_slice(name: str) -> None:
    assert not is_slice_name(name)


def test_every_file_is_listed_once_and_a_skipped_folder_stands_for_its_files(tmp_path: Path) -> None:
    for path in ("b.png", "a.png", "c/d.png", "c/Thumbs.db", ".git/x", ".git/y", "@eaDir/a.png/SYNOPHOTO.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    listed = {path.relative_to(tmp_path).as_posix(): reason for path, reason in walk(tmp_path, pytest.fail)}
    assert [path for path, reason in listed.items() if not reason] == ["a.png", "b.png", "c/d.png"]
    assert {path for path, reason in listed.items() if reason} == {".git", "@eaDir", "loop", "c/Thumbs.db"}
    assert "link" in listed["loop"]


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    listed = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    errors: list[OSError] = []
    assert list(walk(tmp_path, errors.append)) == []
    assert [Path(error.filename).name for error in errors] == ["locked"]
