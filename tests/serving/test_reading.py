"""Uploads as they come in: forms and archives."""

import errno
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from chestct.errors import ChestCTError, DataError
from chestct.serving.api import UploadError, files_in_form, keep
from chestct.serving.predictor import BusyError, Predictor
from chestct.serving.reading import expand, read, take, unzip
from tests.serving.conftest import zipped
from tests.serving.test_predictor import png, tiff

MANY, MUCH = 10, 1_000_000


@pytest.mark.parametrize(
    ("listed", "size", "message"),
    [("aa", 9, "listed twice"), ("abcdefghijk", 9, r"11 slices.*up to 10"), ("abc", 400_000, "1,000,000 bytes")],
)
def test_an_upload_is_read_once_and_only_what_one_request_may_send(
    tmp_path, monkeypatch: pytest.MonkeyPatch, listed: str, size: int, message: str
) -> None:
    for name in {*listed}:
        (tmp_path / name).write_bytes(b"x" * size)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("it was read"))
    with pytest.raises(UploadError, match=message):
        take([{"path": str(tmp_path / name)} for name in listed], tmp_path, MANY, MUCH)
    assert not list(tmp_path.iterdir())


def test_a_bomb_is_cut_off_whatever_it_announces() -> None:
    data = zipped({"bomb": b"\0" * 5_000_000})
    liar = data.replace(struct.pack("<L", 5_000_000), struct.pack("<L", 10))  # its directory says it is tiny
    together = zipped({str(i): np.random.default_rng(i).bytes(300_000) for i in range(4)})
    for bomb in (data, together):
        with pytest.raises(ChestCTError):
            unzip(bomb, MANY, MUCH)
    assert isinstance(unzip(liar, MANY, MUCH)[0][1], DataError)
    with pytest.raises(UploadError, match="more bytes"):
        expand([("plain", b"x" * MUCH), ("a.zip", data)], MANY, MUCH)


@pytest.mark.parametrize("broken", ["cut", "rubbish", "altered", "password"])
def test_an_archive_that_cannot_be_opened_is_one_sentence(broken: str) -> None:
    data = zipped({"a": np.random.default_rng(0).bytes(5000)}, zipfile.ZIP_STORED)
    locked = bytearray(data)
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.index(signature) + at] |= 1  # the flag for encryption
    bad = {
        "cut": data[:3000],
        "rubbish": b"PK\x03\x04" + b"?" * 100,
        "altered": data[:500] + b"!!!" + data[503:],
        "password": bytes(locked),
    }
    ((_, error),) = expand([("a.zip", bad[broken])], MANY, MUCH)
    assert ("password" if broken == "password" else "zip archive") in str(error)


def test_what_is_broken_in_an_archive_or_as_one_is_unreadable_and_the_rest_is_answered(small_bundle: Path) -> None:
    data = zipped({"1": png(1), "2": png(2), "3": png(3)}, zipfile.ZIP_STORED)
    altered = data.replace(png(2)[-20:], b"?" * 20)  # its checksum no longer fits
    predictor = Predictor(small_bundle)
    files = expand([("0.zip", data[:3000]), ("a.zip", altered)], MANY, MUCH)
    readings = [read(predictor, predictor.bundle, *file)[0] for file in files]
    assert [one.name for one in readings if one.decision == "unreadable"] == ["0.zip", "2"]
    assert "zip archive" in readings[0].verdict
    assert "CRC" in readings[2].verdict


def test_too_many_slices_are_refused_with_the_way_out() -> None:
    eleven = {str(i): b"x" for i in range(11)}
    for files in (list(eleven.items()), [("a.zip", zipped(eleven))], [("a.tiff", tiff(11))]):
        with pytest.raises(UploadError, match=r"11 slices.*up to 10.*chestct predict"):
            expand(files, MANY, MUCH)


FORM = "multipart/form-data; boundary=b"
NAMED = b"Content-Disposition: form-data; name=f; filename=a"


def part(headers: bytes, content: bytes = b"data") -> bytes:
    return b"--b\r\n" + headers + b"\r\n\r\n" + content + b"\r\n"


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (part(NAMED), FORM),  # cut off
        (b"rubbish", FORM),
        (part(NAMED) + b"--b--", "multipart/form-data"),
        (part(NAMED + b"\r\nX: " + b"x" * 8_000_000) + b"--b--", FORM),
        (part(NAMED + b"\r\nX: x" * 10_000) + b"--b--", FORM),
        (part(NAMED + (b"\r\nX: " + b"x" * 4000) * 3) + b"--b--", FORM),
        (b"--b\r\n" + NAMED + b"\r\n--b--", FORM),
    ],
)
def test_a_form_that_cannot_be_read_is_one_sentence(body: bytes, content_type: str) -> None:
    with pytest.raises(UploadError, match="The form cannot be read"):
        files_in_form(body, content_type, MANY)


def test_fields_are_left_out_of_forms_and_files_come_as_they_are_whatever_their_clients_call_them() -> None:
    data = np.random.default_rng(0).bytes(10_000) + b"\r\n--a\r\n\r\n--"
    body = part(b"Content-Disposition: form-data; name=filename") + part(NAMED, data) + part(NAMED, b"") + b"--b--\r\n"
    assert files_in_form(body, FORM, MANY) == [data, b""]
    for named in ('filename="läsion.png"', "filename*=UTF-8''l%C3%A4sion.png"):  # the second by RFC 5987
        own = part(f'Content-Disposition: form-data; name="file"; {named}'.encode(), data)
        assert files_in_form(own + b"--b--", FORM, MANY) == [data]


@pytest.mark.parametrize("body", [part(NAMED, b"") * (MANY + 1) + b"--b--", part(b"A: b", b"") * 20])  # not to its end
def test_a_form_has_no_more_parts_than_slices_may_be_sent(body: bytes) -> None:
    with pytest.raises(UploadError, match=r"More than 10 files.*chestct predict"):
        files_in_form(body, FORM, MANY)


def test_uploads_that_do_not_fit_on_the_disk_leave_nothing_behind(tmp_path, monkeypatch) -> None:
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> None:
        write(path, content[:3])
        if len(content) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BusyError, match="could not be stored"):
        keep([b"abc", b"abcd", b"abc"], tmp_path, MUCH)
    assert not list(tmp_path.iterdir())
