import numpy as np
import pytest

from chestct.data.preprocess import Preprocess


def wide_slice():
    gray = np.zeros((60, 120), np.float32)
    gray[10:50, 30:90] = 0.8  # a body in the middle
    return gray


@pytest.mark.parametrize("fit", ["pad", "stretch", "body"])
def test_every_fit_gives_a_square_of_bytes(fit):
    out = Preprocess(48, fit)(wide_slice())
    assert out.shape == (48, 48)
    assert out.dtype == np.uint8


def test_pad_keeps_the_aspect_ratio():
    body = Preprocess(120, "pad")(wide_slice()) > 100
    assert abs(np.ptp(np.flatnonzero(body.any(0))) - 60) <= 2
    assert abs(np.ptp(np.flatnonzero(body.any(1))) - 40) <= 2


def test_stretch_does_not():
    body = Preprocess(120, "stretch")(wide_slice()) > 100
    assert abs(np.ptp(np.flatnonzero(body.any(1))) - 80) <= 2


def test_body_fills_the_square():
    body = Preprocess(120, "body")(wide_slice()) > 100
    assert np.ptp(np.flatnonzero(body.any(0))) == 119


def test_a_black_slice_has_no_body_and_stays_black():
    assert Preprocess(32, "body")(np.zeros((40, 50), np.float32)).max() == 0


def test_grey_levels_are_kept():
    assert set(np.unique(Preprocess(32, "pad")(np.full((64, 64), 0.5, np.float32)))) == {128}
