"""Everything that is wrong with a file gives a DecodeError."""

import gzip
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.encaps import encapsulate

from chestct.errors import DecodeError
from chestct.imaging.decode import decode
from chestct.imaging.slice import Limits, Slice
from tests.imaging.files import COLORS, LUNG, RAMP, SMALL, dicom, encoded


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes, width: int = 4, height: int = 4) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(5 * 4)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def tiff(*entries: tuple[int, int, int, int]) -> bytes:
    ifd = b"".join(struct.pack("<HHLL", *entry) for entry in sorted(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + ifd + bytes(4)


def webp(width: int, height: int) -> bytes:
    """One colour: the same few bytes whatever the size, which stands in 14 bits each (RFC 9649, 3.4)."""
    data = encoded(np.zeros((1, 1), np.uint8), "WEBP", lossless=True)
    size = int.from_bytes(data[21:25], "little") | (width - 1) | (height - 1) << 14
    return data[:21] + size.to_bytes(4, "little") + data[25:]


def exif_bomb() -> bytes:
    """A JPEG whose Exif directory names the same 50 kB in each of 5,000 entries."""
    entries = 5_000
    body = b"II*\0\x08\0\0\0" + struct.pack("<H", entries)
    body += b"".join(struct.pack("<HHLL", tag, 7, 50_000, 8) for tag in range(1000, 1000 + entries)) + bytes(4)
    pieces = [body[at : at + 65_000] for at in range(0, len(body), 65_000)]
    jpeg = encoded(RAMP, "JPEG")
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(piece) + 8) + b"Exif\0\0" + piece for piece in pieces)
    return jpeg[:2] + segments + jpeg[2:]


def index_bomb() -> bytes:
    """A JPEG whose index of pictures names the same 20 kB in each of 3,000 entries."""
    index = tiff(*[(tag, 7, 20_000, 8) for tag in range(1000, 4000)])
    jpeg = encoded(RAMP, "JPEG")
    return jpeg[:2] + b"\xff\xe2" + struct.pack(">H", len(index) + 6) + b"MPF\0" + index + jpeg[2:]


def tiff_bomb() -> bytes:
    """A TIFF of 60 kB whose directory claims 250 MB, all of it the same bytes."""
    entries = [(256, 4, 1, 4), (257, 4, 1, 4)] + [(tag, 7, 50_000, 8) for tag in range(1000, 6_000)]
    return tiff(*entries)


def tiff_exif_bomb() -> bytes:
    """A good 4 x 4 TIFF whose Exif directory claims 250 MB."""
    image = [(256, 4, 1, 4), (257, 4, 1, 4), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    image += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, 4), (279, 4, 1, 16)]
    start = len(tiff(*image)) + 12
    return tiff(*image, (34665, 4, 1, start)) + tiff_bomb()[8:]


def deflate_bomb() -> bytes:
    data = dicom(SMALL, uid.DeflatedExplicitVRLittleEndian)
    meta_end = 144 + struct.unpack_from("<I", data, 140)[0]
    return data[:meta_end] + zlib.compress(bytes(80_000_000), 9, -zlib.MAX_WBITS)


def rle_bomb() -> bytes:
    segment = b"\x81\0" * 1_200_000  # 154 MB of zeros
    stream = struct.pack("<16L", 2, 64, 64, *[0] * 13) + segment
    return dicom(np.zeros((8, 8), np.int16), uid.RLELossless, PixelData=encapsulate([stream]))


def lying_jpeg2000(field: int, value: int) -> bytes:
    data = dicom(np.zeros((96, 96), np.int16), uid.JPEG2000Lossless)
    at = data.index(b"\xff\x4f\xff\x51") + field
    return data[:at] + struct.pack(">LL", value, value) + data[at + 8 :]


def scan_bomb() -> bytes:
    jpeg = encoded(RAMP, "JPEG", progressive=True)
    start = jpeg.rindex(b"\xff\xda")
    return jpeg[:start] + jpeg[start:-2] * 5_000 + jpeg[-2:]


OPEN_SEQUENCE = b"\x40\0\x75\xa0SQ\0\0\xff\xff\xff\xff"
OPEN_ITEM = b"\xfe\xff\0\xe0\xff\xff\xff\xff"


def dicom_of(dataset: bytes) -> bytes:
    data = dicom(SMALL)
    return data[: data.index(b"\x08\0\x16\0")] + dataset


BOMBS: dict[str, Callable[[], bytes]] = {
    "png size": lambda: png(width=50_000, height=50_000),
    "png text": lambda: png(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))),
    "png many texts": lambda: png(*[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))] * 200),
    "bmp size": lambda: b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, 50_000, 50_000, 1, 8, 0, 0, 0, 0, 0, 0),
    "tiff size": lambda: tiff(
        *[(256, 4, 1, 50_000), (257, 4, 1, 50_000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)],
        *[(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, 50_000), (279, 4, 1, 2_500_000_000)],
    ),
    "tiff directory": tiff_bomb,
    "tiff exif": tiff_exif_bomb,
    "tiff strips": lambda: tiff((256, 4, 1, 4), (257, 4, 1, 4), (273, 4, 3_000_000, 8)) + bytes(12_000_000),
    "webp size": lambda: webp(16_000, 16_000),
    "jpeg size": lambda: encoded(RAMP, "JPEG").replace(struct.pack(">HH", 24, 40), b"\xea\x60\xea\x60"),
    "jpeg exif": exif_bomb,
    "jpeg index": index_bomb,
    "jpeg scans": scan_bomb,
    "dicom size": lambda: dicom(SMALL, Rows=50_000, Columns=50_000),
    "dicom deflate": deflate_bomb,
    "dicom rle": rle_bomb,
    "dicom jpeg2000": lambda: lying_jpeg2000(8, 100),
    "dicom jpeg2000 tiles": lambda: lying_jpeg2000(24, 1),
}


REASONS = {
    **{bomb: "data.max_pixels" for bomb in BOMBS if bomb.endswith("size")},
    "dicom deflate": "data.max_bytes",
    "dicom jpeg2000": "[100, 100, 1]",
    "dicom jpeg2000 tiles": "9,216 JPEG 2000 tiles",
    "tiff strips": "too much metadata",
    "jpeg exif": "too much metadata",
    "jpeg index": "too much metadata",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_before_they_grow(bomb: str) -> None:
    data = BOMBS[bomb]()
    limits = Limits(max_bytes=20_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError) as caught:
            decode(data, LUNG, limits)
        assert not isinstance(caught.value.__cause__, MemoryError)
        assert REASONS.get(bomb, "") in caught.value.reason
        assert tracemalloc.get_traced_memory()[1] < 70_000_000
    finally:
        tracemalloc.stop()


FLOODS: dict[str, Callable[[], bytes]] = {
    "dicom nesting": lambda: dicom_of((OPEN_SEQUENCE + OPEN_ITEM) * 50_000),
    "dicom elements": lambda: dicom_of(b"\x11\0\x10\0SH\0\0" * 1_000_000),
    "dicom items": lambda: dicom_of(OPEN_SEQUENCE + (OPEN_ITEM + b"\xfe\xff\x0d\xe0\0\0\0\0") * 500_000),
    "dicom fragments": lambda: dicom(
        np.zeros((4, 4), np.int16), uid.RLELossless, PixelData=b"\xfe\xff\0\xe0\0\0\0\0" * 1_000_000
    ),
    "png chunks": lambda: png(chunk(b"teSt", b"") * 1_000_000),
    "jpeg segments": lambda: b"\xff\xd8" + b"\xff\xd0" * 30_000_000,
}


@pytest.mark.parametrize("flood", FLOODS)
def test_files_of_countless_pieces_are_not_walked_to_their_end(flood: str) -> None:
    with pytest.raises(DecodeError, match=r"too many pieces|recursion"):
        decode(FLOODS[flood](), LUNG)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"\0" * 4096, "neither PNG"),
        (encoded(RAMP, "GIF"), "neither PNG.*GIF8.*Save it as one of these"),
        (b"<!DOCTYPE html><html><body>Sign in", "<!DOCTYPE html>"),
        (b"\x89PNG\r\n\x1a\n", "damaged PNG"),
        (bytes(128) + b"DICM", "no integer pixel data"),
        (dicom(SMALL, PixelData=None), r"no integer pixel data \(modality CT\)"),
        *((encoded(samples, "TIFF"), "save with 8 or 16 bits") for samples in (RAMP * 1.5, SMALL * np.nan, SMALL - 9)),
        (dicom(SMALL, Rows=5), "32 vs 40 bytes"),
        (dicom(SMALL, NumberOfFrames="-1"), "NumberOfFrames is -1"),
        (dicom(SMALL, BitsStored=12, HighBit=15), "HighBit"),
        (dicom(SMALL, Rows=0), "4 x 0 pixels"),
        *(
            (gzip.compress(data, mtime=0), "packed file. Unpack it")
            for data in (dicom(SMALL), encoded(RAMP, "PNG"), b"tar")
        ),
        (b"PK\3\4 a zip archive", "packed file. Unpack it"),
        (dicom(SMALL, PixelData=None, FloatPixelData=bytes(64)), "floating-point numbers; export"),
        (dicom(SMALL, RescaleSlope="0"), "RescaleSlope is 0"),
        (dicom(SMALL, RescaleSlope="1e300"), r"RescaleSlope is 1e\+?300"),
        (dicom(SMALL, ModalityLUTSequence=[pydicom.Dataset()]), "lookup tables are not read"),
        (dicom(np.zeros((4, 4), np.uint8), PhotometricInterpretation="PALETTE COLOR"), "PALETTE COLOR"),
        (dicom(SMALL, uid.MPEG2MPML, PixelData=encapsulate([b"video"])), "MPEG2"),
        (dicom(np.zeros((48, 64), np.int16), uid.JPEG2000Lossless, Rows=47), r"\[48, 64, 1\]"),
        (dicom(SMALL.astype("u1"), uid.JPEGBaseline8Bit, PixelData=encapsulate([encoded(RAMP, "JPEG")])), "24, 40, 1"),
    ],
)
def test_errors_name_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason) as caught:
        decode(data, LUNG, name="upload.png")
    assert str(caught.value).startswith("upload.png: ")


def test_more_bytes_or_pixels_than_allowed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "long.dcm").touch()
    os.truncate(tmp_path / "long.dcm", 300_000_000)  # takes no space on disk
    with pytest.raises(DecodeError, match=r"300,000,000 bytes.*data\.max_bytes"):
        decode(tmp_path / "long.dcm", LUNG)
    data = encoded(RAMP, "PNG")
    assert decode(data, LUNG, Limits(max_bytes=len(data), max_pixels=RAMP.size)).gray.shape == RAMP.shape
    with pytest.raises(DecodeError, match=r"data\.max_bytes allows"):
        decode(data, LUNG, Limits(max_bytes=len(data) - 1))
    with pytest.raises(DecodeError, match=r"40 x 24 pixels; data\.max_pixels allows 959"):
        decode(data, LUNG, Limits(max_pixels=RAMP.size - 1))


WHOLE = {
    **{format: encoded(COLORS, format) for format in ("PNG", "JPEG", "BMP", "WEBP", "TIFF")},
    "progressive": encoded(COLORS, "JPEG", progressive=True),
    "LZW": encoded(COLORS, "TIFF", compression="tiff_lzw"),
    **{
        syntax.name: dicom(COLORS[..., 0].astype(np.int16), syntax)
        for syntax in (uid.ExplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian, uid.RLELossless)
    },
}


@pytest.mark.parametrize("whole", WHOLE)
def test_truncated_files_are_refused(whole: str) -> None:
    data = WHOLE[whole]
    assert isinstance(decode(data, LUNG), Slice)
    for eighth in range(8):
        with pytest.raises(DecodeError):
            decode(data[: len(data) * eighth // 8], LUNG)


@pytest.mark.parametrize(
    ("error", "says"), [(MemoryError(), "memory ran out"), (KeyError(), r"damaged .*\(KeyError\)")]
)
def test_a_file_is_not_called_damaged_because_memory_ran_out(error, says, monkeypatch) -> None:
    monkeypatch.setattr("chestct.imaging.raster.slices", Mock(side_effect=error))
    with pytest.raises(DecodeError, match=says) as caught:
        decode(encoded(RAMP, "PNG"), LUNG)
    assert caught.value.lasting == isinstance(error, KeyError)  # else it is tried again


def test_paths_that_are_no_readable_file_are_refused_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for path, reason in [
        (tmp_path / "missing.png", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "loop", "symbolic links"),
        (tmp_path / "nul\0byte", "null"),
    ]:
        with pytest.raises(DecodeError, match=reason) as caught:
            decode(path, LUNG)
        assert caught.value.path == str(path)


def test_odd_files_put_nothing_on_the_terminal(tmp_path: Path) -> None:
    says_implicit = dicom(SMALL).replace(uid.ExplicitVRLittleEndian.encode(), b"1.2.840.10008.1.2\0\0")
    odd = dicom(SMALL, WindowWidth="0").replace(b"UI\4\x001.2\0", b"UI\4\0no!\0")
    exif = encoded(RAMP, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    damaged = dicom(np.zeros((48, 64), np.int16), uid.JPEG2000Lossless).replace(b"\xff\x52", b"\xff\x00")
    volume = nibabel.Nifti1Image(np.full((70, 64, 5), -800, np.int16), np.eye(4)).to_bytes()
    volume = volume[:80] + bytes(12) + volume[92:]  # voxels without a size
    for name, data in {"a": says_implicit, "b": odd, "c": exif, "d": damaged, "e": volume}.items():
        (tmp_path / name).write_bytes(data)
    code = (
        "import logging, sys; from pathlib import Path; from chestct.config.schema import WindowConfig\n"
        "from chestct.errors import DecodeError; from chestct.imaging.decode import decode\n"
        "logging.basicConfig(level=logging.INFO)\n"  # as Hydra does
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    try: decode(path, WindowConfig())\n"
        "    except DecodeError: print(path.name)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (printed.stdout.split(), printed.stderr) == (["d"], "")
