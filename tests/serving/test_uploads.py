import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from chestct.serving import uploads
from chestct.serving.uploads import (
    FormError,
    UploadError,
    expand,
    files_in_form,
    frame_count,
    natural,
    scan_position,
    unzip,
)

MANY, MUCH = 10, 1_000_000


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, data in entries.items():
            made.writestr(name, data)
    return file.getvalue()


def test_an_archive_gives_its_slices_and_nothing_else() -> None:
    data = archive({"a/1.png": b"1", "a/": b"", ".hidden": b"x", "__MACOSX/1.png": b"x", "DICOMDIR": b"x", "2": b"2"})
    assert unzip(data, MANY, MUCH) == [("a/1.png", b"1"), ("2", b"2")]


def test_names_that_lead_out_of_the_archive_are_only_names() -> None:
    assert unzip(archive({"../../etc/passwd": b"x"}), MANY, MUCH) == [("../../etc/passwd", b"x")]


def test_a_bomb_is_cut_off_whatever_it_announces() -> None:
    data = archive({"bomb": b"\0" * 5_000_000})
    with pytest.raises(UploadError, match="more than the 1,000,000 bytes"):
        unzip(data, MANY, MUCH)
    # the same, with a directory that says it is tiny
    liar = data.replace(struct.pack("<L", 5_000_000), struct.pack("<L", 10))
    with pytest.raises(UploadError):
        unzip(liar, MANY, MUCH)


def test_the_bytes_of_all_entries_count_together() -> None:
    data = archive({str(i): np.random.default_rng(i).bytes(300_000) for i in range(4)})
    with pytest.raises(UploadError, match="holds more"):
        unzip(data, MANY, MUCH)


@pytest.mark.parametrize("broken", ["cut", "rubbish", "altered"])
def test_a_damaged_archive_is_one_sentence(broken: str) -> None:
    data = archive({"a": np.random.default_rng(0).bytes(5000)}, zipfile.ZIP_STORED)
    bad = {"cut": data[:3000], "rubbish": b"PK\x03\x04" + b"?" * 100, "altered": data[:500] + b"!!!" + data[503:]}
    with pytest.raises(UploadError, match="damaged"):
        unzip(bad[broken], MANY, MUCH)


def test_a_password_is_one_sentence() -> None:
    data = bytearray(archive({"a": b"secret"}))
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + at] |= 1  # the flag for encryption
    with pytest.raises(UploadError, match="password"):
        unzip(bytes(data), MANY, MUCH)


def test_too_many_files_are_refused_with_the_way_out() -> None:
    with pytest.raises(UploadError, match=r"11 slices.*up to 10.*chestct predict"):
        expand([(str(i), b"x") for i in range(11)], MANY, MUCH)
    with pytest.raises(UploadError, match="11 slices"):  # before any of them is inflated
        unzip(archive({str(i): b"x" for i in range(11)}), MANY, MUCH)


@pytest.mark.parametrize("files", [[], [("a.zip", archive({}))], [("a.zip", archive({"DICOMDIR": b"x"}))]])
def test_nothing_in_it_is_said(files: list[tuple[str, bytes]]) -> None:
    with pytest.raises(UploadError, match="zip"):
        expand(files, MANY, MUCH)


def test_names_sort_as_people_count() -> None:
    names = ["slice10", "slice9", "Slice1", "a", "10", "9", "²"]
    assert sorted(names, key=natural)[-4:] == ["Slice1", "slice9", "slice10", "²"]


def moved(data: bytes, place: float | None, number: int) -> bytes:
    dataset = dcmread(io.BytesIO(data))
    if place is None:
        del dataset.ImagePositionPatient
    else:
        dataset.ImagePositionPatient = [0, 0, place]
    dataset.InstanceNumber = number
    file = io.BytesIO()
    dataset.save_as(file)
    return file.getvalue()


def test_a_scan_is_ordered_by_place_then_number_then_name(examples: dict[str, bytes]) -> None:
    data = examples["no-lesion.dcm"]
    placed = [(name, moved(data, place, 1)) for name, place in (("a", 5.0), ("b", -5.0), ("c", 0.0))]
    assert [upload.name for upload in expand(placed, MANY, 10_000_000)] == ["b", "c", "a"]
    numbered = [(name, moved(data, None, number)) for name, number in (("a", 3), ("b", 1), ("c", 2))]
    assert [upload.name for upload in expand(numbered, MANY, 10_000_000)] == ["b", "c", "a"]
    same = [(name, moved(data, 0.0, 1)) for name in ("c", "a", "b")]
    assert [upload.name for upload in expand(same, MANY, 10_000_000)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "data", [b"", b"DICM", b"\0" * 128 + b"DICM" + b"\xff" * 300, b"\x08\0" + zlib.compress(b"x" * 99)]
)
def test_damaged_headers_give_no_place_and_one_frame(data: bytes) -> None:
    assert scan_position(data) is None
    assert frame_count(data, 10) == 1


def test_frames_are_counted_without_decoding_any() -> None:
    pages = [Image.fromarray(np.full((64, 64), i, np.uint8)) for i in range(7)]
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    assert frame_count(file.getvalue(), 100) == 7
    assert frame_count(file.getvalue(), 4) == 5  # enough to know


FORM = "multipart/form-data; boundary=b"


def part(headers: bytes, content: bytes = b"data") -> bytes:
    return b"--b\r\n" + headers + b"\r\n\r\n" + content + b"\r\n"


NAMED = b"Content-Disposition: form-data; name=f; filename=a"


@pytest.mark.parametrize("header", [16_000, 16_380, 8_000_000])
def test_the_head_of_a_part_has_a_limit(header: int, monkeypatch: pytest.MonkeyPatch) -> None:
    body = part(NAMED + b"\r\nX: " + b"x" * (header - len(NAMED) - 5)) + b"--b--"
    if header < 16_380:
        assert files_in_form(body, FORM) == [b"data"]
        return
    monkeypatch.setattr(uploads, "message_from_bytes", lambda _: pytest.fail("parsed"))
    with pytest.raises(FormError, match="head of a part"):
        files_in_form(body, FORM)


def test_the_heads_of_all_parts_together_have_a_limit_too() -> None:
    many = part(NAMED + b"\r\nX: " + b"x" * 10_000)
    assert len(files_in_form(many * 90 + b"--b--", FORM)) == 90
    with pytest.raises(FormError, match="head of a part"):
        files_in_form(many * 110 + b"--b--", FORM)


def test_a_part_whose_head_has_no_end_is_refused() -> None:
    with pytest.raises(FormError, match="head of a part"):
        files_in_form(b"--b\r\n" + NAMED + b"\r\n--b--", FORM)


@pytest.mark.parametrize("name", ["filename*=a; filename*0=b", f"filename*{'9' * 5000}=a", "filename*=a; filename*1=b"])
def test_odd_parameters_of_a_part_are_a_form_that_cannot_be_read(name: str) -> None:
    with pytest.raises(FormError, match="parameters"):
        files_in_form(part(b"Content-Disposition: form-data; " + name.encode()) + b"--b--", FORM)


def test_odd_parameters_of_a_form_are_a_form_that_cannot_be_read() -> None:
    for odd in ("boundary*=a; boundary*1=b", "boundary=" + "b" * 20_000):
        with pytest.raises(FormError, match="cannot be read"):
            files_in_form(part(NAMED) + b"--b--", f"multipart/form-data; {odd}")
