from itertools import product

import numpy as np
import pytest
from PIL import Image

from chestct.config.schema import SUBTYPES, PhantomConfig, WindowConfig
from chestct.imaging.decode import decode
from chestct.imaging.preprocess import Preprocess, stretched
from chestct.phantom.thorax import draw
from tests.imaging.files import dicom
from tests.imaging.test_lungs import thorax


def wide_slice():
    gray = np.zeros((60, 120), np.float32)
    gray[10:50, 30:90] = 0.8  # a body in the middle
    return gray


@pytest.mark.parametrize(("fit", "width", "height"), [("pad", 60, 40), ("stretch", 60, 80), ("body", 119, 79)])
def test_every_fit_gives_a_square_of_bytes(fit, width, height):
    air = np.random.default_rng(0).uniform(0, 0.1, (60, 120)).astype(np.float32)  # not quite black, and no body
    out = Preprocess(120, fit)(np.maximum(wide_slice(), air))
    assert (out.shape, out.dtype) == ((120, 120), np.uint8)
    extent = [np.ptp(np.flatnonzero((out > 100).any(axis))) for axis in (0, 1)]
    assert extent == pytest.approx([width, height], abs=2)


def test_lungs_are_cropped_to_and_their_levels_fixed_whatever_the_window():
    seen = Preprocess(96, "lungs", "lungs")
    first, other = seen(thorax(40, 180)), seen(thorax(90, 240, outside=20))
    assert np.abs(first.astype(int) - other).mean() < 1
    assert (first < 100).mean() > 0.3  # lungs fill the square; in the whole slice they are a quarter
    np.testing.assert_array_equal(seen(wide_slice()), Preprocess(96, "body", "body")(wide_slice()))  # no lungs there


@pytest.mark.parametrize("fit", ["pad", "stretch", "body"])
def test_brightness_and_contrast_leave_no_trace(fit):
    rng = np.random.default_rng(0)
    gray = np.zeros((60, 120), np.float32)
    gray[10:50, 30:90] = rng.uniform(0.2, 0.8, (40, 60))  # air, and a body of many greys
    seen = Preprocess(48, fit, "body")
    assert np.abs(seen(gray).astype(int) - seen(0.1 + 0.6 * gray)).max() <= 4  # but for the rounding to 256 levels
    assert np.abs(Preprocess(48, fit)(gray).astype(int) - Preprocess(48, fit)(0.1 + 0.6 * gray)).max() > 20


def test_the_percentiles_around_the_body_become_black_and_white():
    histogram = np.zeros(256, int)
    histogram[50:150] = 1  # one pixel of each level
    level = np.array(stretched(histogram))
    assert level[51] == 0
    assert level[147] == 255
    assert abs(level[99] - 128) <= 1
    assert (np.diff(level) >= 0).all()


def test_grey_levels_are_kept_and_what_has_no_contrast_or_body_is_given_none():
    flat = np.full((40, 40), 0.5, np.float32)
    for seen in (Preprocess(32, "pad"), Preprocess(32, "body", "body")):
        assert set(np.unique(seen(flat))) == {128}
    assert Preprocess(32, "body")(np.zeros((40, 50), np.float32)).max() == 0


def test_the_network_sees_a_dicom_phantom_and_its_png_export_alike(tmp_path):
    for seed in range(12):
        hu = draw(np.random.default_rng(seed), SUBTYPES[seed % 4], PhantomConfig(size=96)).hu
        gray = decode(dicom((np.round(hu) + 1024).astype(np.int16)), WindowConfig()).gray
        Image.fromarray((gray * 255 + 0.5).astype(np.uint8)).save(tmp_path / "export.png")
        again = decode(tmp_path / "export.png", WindowConfig()).gray
        for fit, contrast in product(("pad", "stretch", "body", "lungs"), ("keep", "body", "lungs")):
            seen = Preprocess(224, fit, contrast)
            assert np.array_equal(seen(gray), seen(again))
