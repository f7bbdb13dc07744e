from pathlib import Path

import pytest

from chestct.imaging.slice_files import is_slice_name, walk, why_skipped

LEFTOVERS = ("Thumbs.db", "THUMBS.DB", "desktop.ini", ".DS_Store", "._a.png", "DICOMDIR", "__MACOSX", "@eaDir")
LEFTOVERS += (".AppleDouble", ".ipynb_checkpoints", ".thumbnails", "$RECYCLE.BIN", "~$list.xlsx", "Icon\r")
LEFTOVERS += ("a-0123abcd-overlay.dcm", "a-0123abcd-report.dcm")
LEFTOVERS += ("Thumbs.db:encryptable", "a.png:Zone.Identifier", "a.png\uf03aZone.Identifier", "ehthumbs_vista.db")


def test_what_systems_leave_behind_is_skipped_with_a_reason_and_nothing_else() -> None:
    for name in LEFTOVERS:
        assert why_skipped(name)
        assert not any(is_slice_name(path) for path in (f"scan/{name}", f"{name}/a.png", f"scan\\{name}\\a.png"))
    names = ("a.png", "IM0001", "a-report.dcm", "a/b.dcm", "a\\b.png", "../../etc/passwd", "./a.png", "notes.txt")
    for name in (*names, "12:30.png"):
        assert is_slice_name(name)
    assert not any(is_slice_name(folder) for folder in ("", "a/", "a\\"))


def test_every_file_is_listed_once_and_a_skipped_folder_stands_for_its_files(tmp_path: Path) -> None:
    for path in ("b.png", "a.png", "c/d.png", "c/Thumbs.db", ".git/x", ".git/y", "@eaDir/a.png/SYNOPHOTO.jpg", "own/x"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    own = {str(tmp_path / "own")}
    listed = {path.relative_to(tmp_path).as_posix(): reason for path, reason in walk(tmp_path, pytest.fail, own)}
    assert [path for path, reason in listed.items() if not reason] == ["a.png", "b.png", "c/d.png"]
    assert {path for path, reason in listed.items() if reason} == {".git", "@eaDir", "loop", "c/Thumbs.db"}
    assert "link" in listed["loop"]
