"""The lungs in a slice: where they are, and their grey levels."""

import numpy as np
import pytest
from scipy import ndimage

from chestct.imaging import lungs as module
from chestct.imaging.lungs import AIR, TISSUE, find_lungs, levels_of
from tests.conftest import real


def ellipse(shape, y, x, ry, rx):
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return ((rows - y) / ry) ** 2 + ((columns - x) / rx) ** 2 <= 1


def thorax(air=40, tissue=180, outside=0, shape=(300, 400), filled=False):
    """A body with two lungs, uint8 [H, W]; filled: the right lung holds tissue, as a collapsed one does."""
    gray = np.full(shape, outside, np.uint8)
    gray[ellipse(shape, 150, 200, 130, 190)] = tissue
    gray[ellipse(shape, 150, 110, 90, 60)] = air
    if not filled:
        gray[ellipse(shape, 150, 290, 90, 60)] = air
    return gray


@pytest.mark.parametrize("outside", [0, 35])
@pytest.mark.parametrize(("air", "tissue"), [(40, 180), (10, 90), (100, 250), (0, 120)])
def test_lungs_are_where_they_are_whatever_the_window(air, tissue, outside):
    if outside >= air:
        outside = 0
    lungs = find_lungs(thorax(air, tissue, outside))
    truth = ellipse((300, 400), 150, 110, 90, 60) | ellipse((300, 400), 150, 290, 90, 60)
    overlap = (lungs.mask & truth).sum() / (lungs.mask | truth).sum()
    assert overlap > 0.9
    left, top, right, bottom = lungs.box
    assert 25 < left < 50
    assert 350 < right < 375
    assert 40 < top < 60
    assert 240 < bottom < 260


@pytest.mark.parametrize(("air", "tissue"), [(40, 180), (10, 90), (100, 250)])
def test_air_and_tissue_get_the_same_levels_whatever_the_window(air, tissue):
    gray = thorax(air, tissue)
    new = np.array(levels_of(find_lungs(gray)))
    assert new[air] / 255 == pytest.approx(AIR, abs=0.01)
    assert new[tissue] / 255 == pytest.approx(TISSUE, abs=0.01)
    assert (np.diff(new) >= 0).all()


def test_a_lung_that_holds_no_air_stays_in_the_box():
    left, _, right, _ = find_lungs(thorax(filled=True)).box
    assert left < 50
    assert right > 350


@pytest.mark.parametrize("gray", [np.zeros((64, 64), np.uint8), np.full((50, 80), 255, np.uint8), thorax(air=180)])
def test_what_shows_no_lungs_has_none(gray):
    assert find_lungs(gray) is None


def test_small_and_large_slices():
    gray = thorax()
    for small in (gray[::4, ::4], np.repeat(np.repeat(gray, 4, 0), 4, 1)):
        factor = small.shape[1] / gray.shape[1]
        box = np.array(find_lungs(small).box) / factor
        np.testing.assert_allclose(box, find_lungs(gray).box, atol=5)


@pytest.mark.parametrize("times", [1, 2, 6])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_masks_are_those_of_scipy(times: int, share: float) -> None:
    coarse = np.random.default_rng(times).random((23, 31)) < share
    mask = np.kron(coarse, np.ones((3, 3), bool)) & (np.random.default_rng(9).random((69, 93)) < 0.97)
    np.testing.assert_array_equal(module._opened(mask, times), ndimage.binary_opening(mask, iterations=times))
    closed = ndimage.binary_closing(np.pad(mask, 16), iterations=times)[16:-16, 16:-16]
    np.testing.assert_array_equal(module._closed(mask, times), closed)
    np.testing.assert_array_equal(module._filled(mask), ndimage.binary_fill_holes(mask))


def test_real_slices_have_lungs():
    from PIL import Image

    for folder in ("iq-oth-nccd/malignant", "lidc/normal", "lung-pet-ct-dx/cancer"):
        for path in sorted(real(folder).glob("*.jpg"))[::20]:
            assert find_lungs(np.asarray(Image.open(path).convert("L"))) is not None, path.name
