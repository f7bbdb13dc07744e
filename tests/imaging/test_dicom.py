"""DICOM gives the pixels that the standard says."""

import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.data import get_testdata_file

from chestct.config.schema import WindowConfig
from chestct.imaging.decode import decode, decode_frames
from tests.imaging.files import LUNG, SMALL, dicom, windowed

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
    assert (slice_.format, slice_.mode, slice_.unfit, slice_.frame) == ("DICOM", "DICOM", "", 0)
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
        ({"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": ""}, [[True, False, False], [False] * 3]),
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


def test_numbers_that_anonymising_set_to_zero_say_nothing() -> None:
    zeros = {"ImageOrientationPatient": [0] * 6, "ImagePositionPatient": [0] * 3, "PixelSpacing": [0, 0]}
    slice_ = decode(dicom(SMALL, InstanceNumber="7", **zeros), LUNG)
    assert (slice_.unfit, slice_.position, slice_.spacing) == ("", ("1.3", "number", 7.0), None)
    oriented = dicom(SMALL, InstanceNumber="7", **zeros | {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]})
    assert decode(oriented, LUNG).position == ("1.3", "mm", 0.0)  # the origin is a place, too
    text = dicom(SMALL, WindowCenter="40", WindowWidth="40", PixelPaddingValue=0x6161)
    text = text.replace(b"DS\2\x0040", b"DS\2\0ab").replace(b"\x20\1US", b"\x20\1LO")
    assert np.array_equal(decode(text, LUNG).gray, slice_.gray)


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
def test_compressed_files_of_other_makers_equal_their_plain_twins(compressed, plain, tolerance) -> None:
    one, other = (
        decode(Path(str(get_testdata_file(f"{name}.dcm", download=False))), LUNG) for name in (compressed, plain)
    )
    np.testing.assert_allclose(one.gray, other.gray, atol=tolerance)
