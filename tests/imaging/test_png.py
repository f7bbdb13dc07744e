"""A PNG whose image data is stored is the same picture; what is odd about a PNG stays Pillow's to judge."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from chestct.config.schema import WindowConfig
from chestct.errors import DecodeError
from chestct.imaging.decode import decode
from chestct.imaging.png import inflated
from tests.conftest import real

NOISE = np.random.default_rng(0).integers(0, 256, (300, 70, 4)).astype(np.uint8)  # two stored blocks as RGBA


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_image_data(data, *parts):
    """A PNG with other IDAT chunks."""
    start = data.index(b"IDAT") - 4
    end = data.rindex(b"IEND") - 4
    return data[:start] + b"".join(chunk(b"IDAT", part) for part in parts) + data[end:]


def image_data(data):
    at = data.index(b"IDAT")
    return data[at + 4 : at + 4 + struct.unpack_from(">I", data, at - 4)[0]]


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return image.mode, image.size, image.info.get("exif"), image.tobytes()


MODES = {
    "RGBA": Image.fromarray(NOISE, "RGBA"),
    "RGB": Image.fromarray(NOISE[..., :3].copy()),
    "L": Image.fromarray(NOISE[..., 0].copy()),
    "LA": Image.fromarray(NOISE[..., :2].copy(), "LA"),
    "1": Image.fromarray(NOISE[..., 0].copy()).convert("1"),
    "P": Image.fromarray(NOISE[..., :3].copy()).quantize(7),
    "I;16": Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_keeps_its_pixels_and_is_stored(mode):
    data = png(MODES[mode], exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")
    stored = inflated(data)
    assert stored is not data
    assert image_data(stored)[2] & 6 == 0  # the type of the first block: not compressed
    assert pixels(stored) == pixels(data)


def test_image_data_in_many_chunks_is_put_together():
    packed = image_data(png(MODES["L"]))
    data = with_image_data(png(MODES["L"]), *(packed[i : i + 999] for i in range(0, len(packed), 999)))
    assert data.count(b"IDAT") > 9
    assert pixels(data) == pixels(png(MODES["L"]))
    assert inflated(data).count(b"IDAT") == 1
    assert pixels(inflated(data)) == pixels(data)


PACKED = image_data(png(MODES["L"]))
ODD = {
    "a wrong checksum": [PACKED[:-4] + b"nope"],
    "truncated": [PACKED[:-40]],
    "too little": [zlib.compress(zlib.decompress(PACKED)[:-1])],
    "too much": [zlib.compress(zlib.decompress(PACKED) + b"more")],
    "no image data": [],
    "countless chunks": [*[b""] * 20_000, PACKED],
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_image_data_is_left_to_pillow(odd):
    data = with_image_data(png(MODES["L"]), *ODD[odd])
    assert inflated(data) is data


def test_interlaced_and_headless_files_are_left_to_pillow():
    interlaced = bytearray(png(MODES["L"]))
    interlaced[28] = 1
    for data in (bytes(interlaced), b"", png(MODES["L"])[:30], b"\x89PNG\r\n\x1a\n" + bytes(40)):
        assert inflated(data) is data


@pytest.mark.parametrize("room", [0, 1])
def test_what_is_larger_than_the_bound_is_left_to_pillow(monkeypatch, room):
    data = png(MODES["L"])
    monkeypatch.setattr("chestct.imaging.png.MAX_INFLATED", 300 * 71 - 1 + room)
    assert (inflated(data) is data) == (not room)


def test_a_truncated_file_is_an_error_as_before():
    data = png(MODES["RGBA"])
    with pytest.raises(DecodeError, match="damaged PNG"):
        decode(data[: len(data) // 2], WindowConfig())


def test_real_slices_keep_their_pixels():
    files = sorted(real("chest-ct").rglob("*.png"))[::40]
    stored = 0
    for file in files:
        data = file.read_bytes()
        stored += inflated(data) is not data
        assert pixels(inflated(data)) == pixels(data)
    assert stored > 0.9 * len(files)
