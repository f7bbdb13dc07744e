"""Every format gives the pixels it should, and everything that is wrong with a file gives a DecodeError."""

import io
import os
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image, ImageOps, PngImagePlugin
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate

from chestct.config.schema import WindowConfig
from chestct.errors import DecodeError
from chestct.imaging.decode import declared_size, decode, decode_frames
from chestct.imaging.raster import webp_size
from chestct.imaging.slice import Limits, Slice, pixel_hash

LUNG = WindowConfig()
RAMP = np.arange(24 * 40, dtype=np.uint8).reshape(24, 40)
SMALL = np.zeros((4, 4), np.int16)
COLORS = np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def dicom(stored: np.ndarray, syntax: str = uid.ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """A DICOM file of `stored`, [H, W] or [frames, H, W]; an element of None is left out, bytes are written raw."""
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3.4.5"
    dataset.Modality, dataset.PatientID, dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "CT", "P 1", "1.2", "1.3"
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    dataset.BitsAllocated = 8 * stored.itemsize
    dataset.BitsStored = elements.get("BitsStored", dataset.BitsAllocated)
    dataset.HighBit = max(0, (dataset.BitsStored or 0) - 1)
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    if stored.ndim == 3:
        dataset.NumberOfFrames = len(stored)
    little = syntax != uid.ExplicitVRBigEndian
    dataset.PixelData = stored.astype(stored.dtype.newbyteorder("<" if little else ">")).tobytes()
    dataset["PixelData"].VR = "OB" if stored.itemsize == 1 else "OW"
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    if syntax in (uid.RLELossless, uid.JPEG2000Lossless):
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.file_meta.TransferSyntaxUID = syntax
    for keyword, value in elements.items():
        if value is None:
            delattr(dataset, keyword)
        elif keyword.startswith("PixelPadding"):
            dataset.add_new(keyword, "US", value % 65536)  # as many writers do for negative values, too
        else:
            setattr(dataset, keyword, value)
        if keyword == "PixelData" and value is not None:
            dataset["PixelData"].VR = "OB"
            dataset["PixelData"].is_undefined_length = dataset.file_meta.TransferSyntaxUID.is_encapsulated
    file = io.BytesIO()
    dataset.save_as(
        file, enforce_file_format=True, implicit_vr=syntax == uid.ImplicitVRLittleEndian, little_endian=little
    )
    return file.getvalue()


def windowed(values: np.ndarray, center: float = -600, width: float = 1500) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1 as it is printed there, with y from 0 to 1."""
    x = values.astype(np.float64)
    y = (x - (center - 0.5)) / (width - 1) + 0.5
    y[x <= center - 0.5 - (width - 1) / 2] = 0
    y[x > center - 0.5 + (width - 1) / 2] = 1
    return y


# --- raster formats


COPIES = {
    "L": encoded(RAMP, "PNG"),
    "RGB": encoded(np.dstack([RAMP] * 3), "PNG"),
    **{mode: encoded(Image.fromarray(RAMP).convert(mode), "PNG") for mode in ("RGBA", "LA", "P")},
    "BMP": encoded(np.dstack([RAMP] * 3), "BMP"),
    "TIFF": encoded(RAMP, "TIFF"),
    "LZW": encoded(np.dstack([RAMP] * 3), "TIFF", compression="tiff_lzw"),
    "WEBP": encoded(np.dstack([RAMP] * 3), "WEBP", lossless=True),
    **{f"16 bit {format}": encoded(RAMP.astype(np.uint16) * 257, format) for format in ("PNG", "TIFF")},
    "16 bit, big-endian": encoded((RAMP.astype(np.uint16) * 257).astype(">u2"), "TIFF"),
    "float": encoded(RAMP.astype(np.float32) / 255, "TIFF"),
}


@pytest.mark.parametrize("copy", COPIES)
def test_lossless_copies_have_the_same_pixels_and_hash(copy: str) -> None:
    gray = decode(COPIES[copy], LUNG).gray
    assert gray.dtype == np.float32
    np.testing.assert_allclose(gray, RAMP / 255, rtol=0, atol=1e-7)
    assert pixel_hash(gray) == pixel_hash(RAMP)


def test_hash_depends_on_every_level_and_on_the_shape() -> None:
    changed, fine = RAMP.copy(), RAMP.astype(np.uint16) * 257
    changed[-1, -1] += 1
    fine[0, 1] += 1  # what eight bits cannot tell
    assert len({pixel_hash(gray) for gray in (RAMP, changed, RAMP.reshape(40, 24), RAMP.T, RAMP[:, ::-1], fine)}) == 6
    assert pixel_hash(fine) == pixel_hash(fine / np.float32(65535))


def test_one_bit_colour_and_ink_become_grey() -> None:
    for format in ("PNG", "BMP", "TIFF"):
        assert np.array_equal(decode(encoded(RAMP > 100, format), LUNG).gray, (RAMP > 100).astype(np.float32))
    gray = decode(encoded(COLORS, "PNG"), LUNG).gray
    np.testing.assert_allclose(gray, COLORS @ [0.299, 0.587, 0.114] / 255, atol=0.6 / 255)
    cmyk = np.zeros((8, 8, 4), np.uint8)
    cmyk[:4, :, 3] = 255
    gray = decode(encoded(Image.fromarray(cmyk, "CMYK"), "TIFF"), LUNG).gray
    assert np.array_equal(gray, np.repeat([[0.0], [1.0]], 4, axis=0) * np.ones((1, 8)))


def test_transparent_parts_are_put_on_black() -> None:
    alpha = np.full_like(RAMP, 255)
    alpha[:, :10], alpha[:, 10:20] = 0, 128
    expected = RAMP / 255 * (alpha / 255)
    rgba = np.dstack([RAMP, RAMP, RAMP, alpha])
    for image in (rgba, np.dstack([RAMP, alpha])):
        np.testing.assert_allclose(decode(encoded(image, "PNG"), LUNG).gray, expected, atol=1e-6)
    keyed = decode(encoded(RAMP, "PNG", transparency=200), LUNG).gray
    np.testing.assert_allclose(keyed, np.where(RAMP == 200, 0, RAMP) / 255, atol=1e-6)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_and_damaged_metadata_hurts_nothing(format: str) -> None:
    options = {"quality": 95} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        data = encoded(RAMP, format, exif=exif, **options)
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("L")) / 255
        np.testing.assert_allclose(decode(data, LUNG).gray, expected, atol=1e-6)
    for damaged in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense" * 9):
        if format != "TIFF":
            assert decode(encoded(RAMP, format, exif=damaged, **options), LUNG).gray.shape == RAMP.shape


def test_color_tells_photographs_from_marked_slices() -> None:
    gray = np.dstack([np.kron(RAMP, np.ones((8, 8), np.uint8))] * 3)
    marked, photo = gray.copy(), np.kron(COLORS[:4, :4], np.ones((50, 50, 1), np.uint8))
    marked[10:20, 10:20] = (255, 0, 0)
    files = [encoded(gray, "PNG"), encoded(marked, "PNG"), encoded(gray, "JPEG"), encoded(photo, "JPEG")]
    grey, mark, jpeg, other = (decode(data, LUNG).color for data in files)
    assert grey == 0 < mark
    assert max(mark, jpeg) < 0.02 < 0.05 < other


def test_tiff_pages_come_in_order_and_the_first_is_the_slice() -> None:
    pages = [Image.fromarray(RAMP + np.uint8(n)) for n in range(3)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    frames = list(decode_frames(data, LUNG))
    assert [frame.frame for frame in frames] == [0, 1, 2]
    for frame, page in zip(frames, pages, strict=True):
        np.testing.assert_allclose(frame.gray, np.asarray(page) / 255, atol=1e-7)
    assert pixel_hash(decode(data, LUNG).gray) == pixel_hash(frames[0].gray)
    damaged = decode_frames(data[:-40], LUNG)  # the last page
    assert [next(damaged).frame, next(damaged).frame] == [0, 1]  # decoded only when they are asked for
    with pytest.raises(DecodeError):
        next(damaged)


def test_tiff_pages_in_a_circle_come_to_an_end() -> None:
    data = encoded(RAMP, "TIFF")
    first = struct.unpack_from("<L", data, 4)[0]
    after = first + 2 + 12 * struct.unpack_from("<H", data, first)[0]
    assert len(list(decode_frames(data[:after] + data[4:8] + data[after + 4 :], LUNG))) == 1


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": Image.Exif()}, {"save_all": True}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_webp_headers_are_read_as_the_decoder_reads_them(mode: str, options: dict[str, Any]) -> None:
    image, other = (Image.fromarray(colors).convert(mode) for colors in (COLORS, 255 - COLORS))
    image.putpixel((0, 0), (1, 2, 3, 4)[: len(mode)])
    more = {"append_images": [other]} if "save_all" in options else {}
    assert webp_size(encoded(image, "WEBP", **options, **more)) == (40, 24)


XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def png_with_text(keyword: str, text: str, itxt: bool = False) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(keyword, text) if itxt else info.add_text(keyword, text, zip=True)
    return encoded(RAMP, "PNG", pnginfo=info)


def imagemagick_profile() -> str:
    exif = Image.Exif()
    exif[274] = 6
    data = exif.tobytes()
    lines = [data.hex()[at : at + 72] for at in range(0, 2 * len(data), 72)]
    return "\n".join(["", "exif", f"{len(data):8}", *lines, ""])


@pytest.mark.parametrize(
    "data",
    [
        png_with_text("Raw profile type exif", imagemagick_profile()),
        png_with_text("XML:com.adobe.xmp", XMP, itxt=True),
        encoded(RAMP, "TIFF", tiffinfo={700: XMP.encode()}),
        encoded(RAMP, "JPEG", xmp=XMP.encode(), quality=100),
        encoded(RAMP, "WEBP", xmp=XMP.encode(), lossless=True),
    ],
    ids=["ImageMagick", "PNG", "TIFF", "JPEG", "WEBP"],
)
def test_orientation_stated_elsewhere_than_in_exif_is_applied(data: bytes) -> None:
    np.testing.assert_allclose(decode(data, LUNG).gray, np.rot90(RAMP, -1) / 255, atol=2.01 / 255)


def test_what_a_file_will_cost_is_known_from_its_header() -> None:
    pages = [Image.fromarray(RAMP)] * 3
    for data, size in [
        (encoded(COLORS, "WEBP"), (40, 24, 1)),
        (encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]), (40, 24, 3)),
        (dicom(np.zeros((5, 24, 40), np.int16)), (40, 24, 5)),
        (dicom(RAMP)[:-900], (40, 24, 1)),  # no pixel is looked at
    ]:
        assert declared_size(data) == (*size, None)
    with pytest.raises(DecodeError, match=r"upload: PNG: 40 x 24 pixels; data\.max_pixels allows 900"):
        declared_size(encoded(RAMP, "PNG"), Limits(max_pixels=900), name="upload")


# --- DICOM


PLAIN = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)


@pytest.mark.parametrize("syntax", [*PLAIN, uid.DeflatedExplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000Lossless])
@pytest.mark.parametrize(("dtype", "bits"), [("i2", 16), ("u2", 12), ("u2", 16), ("i2", 13), ("i4", 32), ("u1", 8)])
def test_dicom_is_rescaled_and_windowed_as_the_standard_says(syntax: str, dtype: str, bits: int) -> None:
    if syntax in (uid.RLELossless, uid.JPEG2000Lossless) and bits == 32:
        pytest.skip("compressed CT has at most 16 bits (PS3.5 8.2)")
    low, high = (-2000, 2000) if dtype[0] == "i" else (0, min(4095, 2**bits - 1))
    stored = np.random.default_rng(0).integers(low, high, (40, 48), endpoint=True).astype(dtype)
    slice_ = decode(dicom(stored, syntax, BitsStored=bits, RescaleSlope="2", RescaleIntercept="-1024.5"), LUNG)
    np.testing.assert_allclose(slice_.gray, windowed(stored * 2.0 - 1024.5), atol=1e-5)
    assert (slice_.format, slice_.mode, slice_.modality, slice_.frame) == ("DICOM", "DICOM", "CT", 0)
    assert (slice_.patient, slice_.study, slice_.series) == ("P 1", "1.2", "1.3")


@pytest.mark.parametrize("syntax", PLAIN)
def test_dicom_without_preamble_and_file_meta_is_read(syntax: str) -> None:
    stored = np.arange(600, dtype=np.int16).reshape(20, 30)
    data = dicom(stored, syntax)
    start = data.index(b"\0\x08\0\x16" if syntax == uid.ExplicitVRBigEndian else b"\x08\0\x16\0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pydicom guesses, too, and warns of it
        for headless in (data[132:], data[start:]):
            np.testing.assert_allclose(decode(headless, LUNG).gray, windowed(stored - 1024), atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 40), (3, 5), (3, 3, 5)], ids=["even", "odd", "odd frames"])
def test_eight_bits_in_big_endian_words_are_put_in_order(shape: tuple[int, ...]) -> None:
    stored = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    padded = np.append(stored.ravel(), np.zeros(stored.size % 2, np.uint8))
    swapped = padded.view("<u2").byteswap().tobytes()
    plain = dicom(stored, uid.ExplicitVRBigEndian, RescaleSlope="8", RescaleIntercept="-1000")
    data = plain.replace(b"\x7f\xe0\0\x10OB", b"\x7f\xe0\0\x10OW")[: -len(swapped)] + swapped
    frames = [frame.gray for frame in decode_frames(data, LUNG)]
    np.testing.assert_allclose(np.squeeze(frames), windowed(stored * 8.0 - 1000), atol=1e-5)


def test_bits_beyond_bits_stored_are_ignored_and_monochrome1_is_inverted() -> None:
    stored = np.array([[5, 4095], [5 | 0xF000, 0x8000]], np.uint16)
    gray = decode(dicom(stored, BitsStored=12), LUNG).gray
    np.testing.assert_allclose(gray, windowed((stored & 0xFFF) - 1024.0), atol=1e-5)
    inverted = decode(dicom(stored, BitsStored=12, PhotometricInterpretation="MONOCHROME1"), LUNG).gray
    np.testing.assert_allclose(inverted, 1 - gray)


@pytest.mark.parametrize(("photometric", "white"), [("MONOCHROME1", 0), ("MONOCHROME2", 1)])
def test_padding_is_black_also_where_its_sign_is_lost(photometric: str, white: int) -> None:
    stored = np.array([[-2000, 1400, 1500], [1501, 1600, 1601]], np.int16)
    for padding, black in (
        ({"PixelPaddingValue": -2000}, [[True, False, False], [False] * 3]),
        ({"PixelPaddingValue": 1600, "PixelPaddingRangeLimit": 1500}, [[False, False, True], [True, True, False]]),
    ):
        gray = decode(dicom(stored, **padding, PhotometricInterpretation=photometric), LUNG).gray
        assert np.array_equal(gray[:, 1:], np.where(black, 0, white)[:, 1:])
        assert gray[0, 0] == (0 if black[0][0] else 1 - white)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000Lossless])
def test_multi_frame_gives_the_middle_frame_or_all_in_order(syntax: str) -> None:
    stored = np.random.default_rng(0).integers(-1000, 1000, (5, 40, 48)).astype(np.int16)
    data = dicom(stored, syntax)
    frames = list(decode_frames(data, LUNG))
    assert [frame.frame for frame in frames] == list(range(5))
    np.testing.assert_allclose([frame.gray for frame in frames], windowed(stored - 1024), atol=1e-5)
    assert decode(data, LUNG).frame == 2


def test_enhanced_ct_has_its_rescale_in_functional_groups() -> None:
    def group(intercept: int) -> pydicom.Dataset:
        transformation, item = pydicom.Dataset(), pydicom.Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept = "1", str(intercept)
        item.PixelValueTransformationSequence = [transformation]
        return item

    stored = np.zeros((2, 4, 4), np.uint16)
    for elements, expected in [
        ({"PerFrameFunctionalGroupsSequence": [group(-500), group(-700)]}, [-500, -700]),
        ({"SharedFunctionalGroupsSequence": [group(-800)]}, [-800, -800]),
    ]:
        frames = decode_frames(dicom(stored, RescaleSlope=None, RescaleIntercept=None, **elements), LUNG)
        levels = [frame.gray[0, 0] for frame in frames]
        np.testing.assert_allclose(levels, windowed(np.array(expected)), atol=1e-5)


def test_the_files_own_window_is_used_when_asked_for() -> None:
    stored = np.arange(0, 2000, dtype=np.int16).reshape(40, 50)
    own = WindowConfig(from_file=True)
    for elements, asked, expected in [
        ({"WindowCenter": ["40", "-600"], "WindowWidth": ["400", "1500"]}, own, (40, 400)),
        ({"WindowCenter": ["40", "-600"], "WindowWidth": ["400", "1500"]}, LUNG, (-600, 1500)),
        ({"WindowCenter": "40", "WindowWidth": "0"}, own, (-600, 1500)),
        ({"WindowCenter": "", "WindowWidth": "400"}, own, (-600, 1500)),
    ]:
        gray = decode(dicom(stored, **elements), asked).gray
        np.testing.assert_allclose(gray, windowed(stored - 1024, *expected), atol=1e-5)
    step = decode(dicom(stored), WindowConfig(center=100, width=1)).gray
    assert np.array_equal(step, (stored - 1024 > 99).astype(np.float32))


def test_values_that_are_no_hounsfield_units_use_the_files_window_or_the_whole_range() -> None:
    stored = np.arange(0, 4000, 2, dtype=np.uint16).reshape(40, 50)
    for elements in ({"RescaleSlope": None, "RescaleIntercept": None}, {"Modality": "MR", "RescaleIntercept": "0"}):
        whole = decode(dicom(stored, BitsStored=12, **elements), LUNG).gray
        np.testing.assert_allclose(whole, stored / 4095, atol=1e-5)
        own = decode(dicom(stored, BitsStored=12, WindowCenter="500", WindowWidth="100", **elements), LUNG).gray
        np.testing.assert_allclose(own, windowed(stored, 500, 100), atol=1e-5)
    signed = decode(dicom(stored.astype(np.int16), RescaleSlope=None, RescaleIntercept=None), LUNG).gray
    np.testing.assert_allclose(signed, windowed(stored), atol=1e-5)


@pytest.mark.parametrize(
    ("compressed", "plain", "tolerance"),
    [
        ("MR_small_jpeg_ls_lossless", "MR_small", 0),
        ("MR_small_jp2klossless", "MR_small", 0),
        ("SC_rgb_jpeg_gdcm", "SC_rgb_rle", 0),  # JPEG lossless
        ("SC_rgb_jls_lossy_line", "SC_rgb_rle", 0.03),
        ("SC_ybr_full_422_uncompressed", "SC_rgb_rle", 0.03),
    ],
)
def test_compressed_files_of_other_makers_equal_their_plain_twins(
    compressed: str, plain: str, tolerance: float
) -> None:
    one, other = (
        decode(Path(str(get_testdata_file(f"{name}.dcm", download=False))), LUNG) for name in (compressed, plain)
    )
    np.testing.assert_allclose(one.gray, other.gray, atol=tolerance)


# --- what is wrong with files


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes, width: int = 4, height: int = 4) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(5 * 4)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def tiff(*entries: tuple[int, int, int, int]) -> bytes:
    ifd = b"".join(struct.pack("<HHLL", *entry) for entry in sorted(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + ifd + bytes(4)


def webp_header(width: int, height: int) -> bytes:
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + canvas


def exif_bomb() -> bytes:
    """A JPEG whose Exif directory names the same 50 kB in each of 5,000 entries."""
    entries = 5_000
    body = b"II*\0\x08\0\0\0" + struct.pack("<H", entries)
    body += b"".join(struct.pack("<HHLL", tag, 7, 50_000, 8) for tag in range(1000, 1000 + entries)) + bytes(4)
    pieces = [body[at : at + 65_000] for at in range(0, len(body), 65_000)]
    jpeg = encoded(RAMP, "JPEG")
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(piece) + 8) + b"Exif\0\0" + piece for piece in pieces)
    return jpeg[:2] + segments + jpeg[2:]


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
    "webp size": lambda: webp_header(16_000, 16_000),
    "jpeg size": lambda: encoded(RAMP, "JPEG").replace(struct.pack(">HH", 24, 40), b"\xea\x60\xea\x60"),
    "jpeg exif": exif_bomb,
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
        (b"<!DOCTYPE html><html><body>Sign in", "<!DOCTYPE html>"),
        (b"\x89PNG\r\n\x1a\n", "damaged PNG"),
        (bytes(128) + b"DICM", "no integer pixel data"),
        (dicom(SMALL, PixelData=None), r"no integer pixel data \(modality CT\)"),
        *((encoded(samples, "TIFF"), "save with 8 or 16 bits") for samples in (RAMP * 1.5, SMALL * np.nan, SMALL - 9)),
        (dicom(SMALL, Rows=5), "32 vs 40 bytes"),
        (dicom(SMALL, NumberOfFrames="-1"), "NumberOfFrames is -1"),
        (dicom(SMALL, BitsStored=12, HighBit=15), "HighBit"),
        (dicom(SMALL, Rows=0), "4 x 0 pixels"),
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
    for name, data in {"a": says_implicit, "b": odd, "c": exif, "d": damaged}.items():
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


# --- real files
