"""PNG, JPEG, TIFF, BMP and WebP give the pixels that they should."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin
from PIL.TiffImagePlugin import AppendingTiffWriter

from chestct.errors import DecodeError
from chestct.imaging.decode import declared_size, decode, decode_frames
from chestct.imaging.slice import Limits, pixel_hash
from tests.imaging.files import COLORS, LUNG, RAMP, dicom, encoded

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


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_a_tiff_in_which_0_is_white_is_no_negative(dtype: str) -> None:
    # Pillow inverts 8 bits as it writes them, and no others.
    stored = {"uint8": RAMP, "uint16": 65535 - RAMP * np.uint16(257), "float32": 1 - RAMP / np.float32(255)}[dtype]
    np.testing.assert_allclose(decode(encoded(stored, "TIFF", tiffinfo={262: 0}), LUNG).gray, RAMP / 255, atol=1e-6)


def test_a_tiff_of_12_bits_is_as_bright_as_one_of_8() -> None:
    samples = (RAMP.astype(np.uint32) * 4095 // 255).reshape(-1, 2)
    packed = np.stack([samples[:, 0] >> 4, (samples[:, 0] & 15) << 4 | samples[:, 1] >> 8, samples[:, 1] & 255], 1)
    strip = packed.astype(np.uint8).tobytes()
    height, width = RAMP.shape
    # Width, height, bits, no compression, 0 is black, where the strip lies, its rows and its bytes (TIFF 6.0).
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 278: height, 279: len(strip)}
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags.items())
    data = struct.pack("<4sL", b"II*\0", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)
    levels = decode(data, LUNG).levels
    assert levels.dtype == np.uint16
    assert (levels.min(), levels.max()) == (0, 65535)
    np.testing.assert_allclose(levels / 65535, RAMP / 255, atol=1 / 4095)


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


def test_tiff_pages_come_in_order_and_none_of_several_is_the_slice() -> None:
    pages = [Image.fromarray(RAMP + np.uint8(n)) for n in range(3)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    frames = list(decode_frames(data, LUNG))
    assert [frame.frame for frame in frames] == [0, 1, 2]
    for frame, page in zip(frames, pages, strict=True):
        np.testing.assert_allclose(frame.gray, np.asarray(page) / 255, atol=1e-7)
    with pytest.raises(DecodeError, match=r"several pages.*Save each as a file of its own.*`chestct predict`"):
        decode(data, LUNG)
    damaged = decode_frames(data[:-40], LUNG)  # the last page
    assert [next(damaged).frame, next(damaged).frame] == [0, 1]  # decoded only when they are asked for
    with pytest.raises(DecodeError):
        next(damaged)


def test_previews_and_masks_in_a_tiff_are_no_pages() -> None:
    file = io.BytesIO()
    with AppendingTiffWriter(file) as writer:
        for kind, levels in ((0, RAMP), (1, RAMP[::2, ::2]), (4, RAMP > 100)):  # NewSubfileType of TIFF 6.0
            Image.fromarray(levels).save(writer, "TIFF", tiffinfo={254: kind})
            writer.newFrame()
    assert declared_size(file.getvalue()).frames == len(list(decode_frames(file.getvalue(), LUNG))) == 1
    assert np.array_equal(decode(file.getvalue(), LUNG).levels, RAMP)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "MPO"])
def test_animations_and_jpegs_of_several_pictures_are_refused_and_never_their_first(format: str) -> None:
    pictures = [Image.fromarray(levels).convert("RGB") for levels in (RAMP, 255 - RAMP, RAMP.T.reshape(RAMP.shape))]
    data = encoded(pictures[0], format, save_all=True, append_images=pictures[1:])
    for read in (lambda: decode(data, LUNG), lambda: list(decode_frames(data, LUNG)), lambda: declared_size(data)):
        with pytest.raises(DecodeError, match=r"3 pictures where one slice is expected\. Save each as a PNG file"):
            read()
    one = encoded(pictures[0], format, save_all=True)
    np.testing.assert_allclose(decode(one, LUNG).gray, RAMP / 255, atol=0.1)


def test_tiff_pages_in_a_circle_come_to_an_end() -> None:
    data = encoded(RAMP, "TIFF")
    first = struct.unpack_from("<L", data, 4)[0]
    after = first + 2 + 12 * struct.unpack_from("<H", data, first)[0]
    assert len(list(decode_frames(data[:after] + data[4:8] + data[after + 4 :], LUNG))) == 1


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
        assert declared_size(data) == size
    with pytest.raises(DecodeError, match=r"upload: PNG: 40 x 24 pixels; data\.max_pixels allows 900"):
        declared_size(encoded(RAMP, "PNG"), Limits(max_pixels=900), name="upload")
