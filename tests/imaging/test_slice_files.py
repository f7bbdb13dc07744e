from chestct.imaging.slice_files import is_slice_name, why_skipped

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
