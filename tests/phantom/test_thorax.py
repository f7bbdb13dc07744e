"""One drawn slice: it repeats, it holds the tissues of a thorax, and its lesion is all that tells its class."""

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from chestct.config.schema import SUBTYPES, PhantomConfig
from chestct.phantom.thorax import PADDING, display, draw

CANCERS = SUBTYPES[1:]


def phantom(seed, subtype, **settings):
    return draw(np.random.default_rng([7, seed]), subtype, PhantomConfig(**({"size": 160} | settings)))


@pytest.mark.parametrize("size", [64, 160])
def test_a_mask_is_there_for_cancer_only_and_lies_in_the_lungs(size):
    for seed in range(4):
        assert not phantom(seed, "normal", size=size).mask.any()
        for subtype in CANCERS:
            drawn = phantom(seed, subtype, size=size)
            assert drawn.mask.shape == drawn.hu.shape == drawn.lung.shape
            assert drawn.mask.any()
            assert not (drawn.mask & ~drawn.lung).any()


def test_tissues_have_their_hounsfield_units():
    for seed in range(4):
        drawn = phantom(seed, "normal", size=256)
        assert drawn.hu.dtype == np.float32
        assert drawn.hu.min() >= PADDING
        assert -930 < np.median(drawn.hu[drawn.lung]) < -750
        body = drawn.hu[(drawn.hu > -300) & ~drawn.lung]
        assert -130 < np.median(body) < 150  # fat, muscle, organs
        assert np.quantile(body, 0.99) > 350  # bone
        assert 0.03 < drawn.lung.mean() < 0.5


def test_a_lesion_is_the_only_difference_between_the_classes_and_denser_than_lung():
    for seed in range(3):
        normal = phantom(seed, "normal")
        for subtype in CANCERS:
            drawn = phantom(seed, subtype)
            changed = np.abs(drawn.hu - normal.hu) > 1
            assert (drawn.window, drawn.spacing) == (normal.window, normal.spacing)
            assert changed[drawn.mask].mean() > 0.5
            assert not (changed & ~binary_dilation(drawn.lung, iterations=3)).any()  # but for the blur
        drawn = phantom(seed, "large_cell")
        assert drawn.hu[drawn.mask].mean() > normal.hu[drawn.lung].mean() + 300


@pytest.mark.slow
def test_difficulty_shrinks_lesions_and_subtypes_differ_in_size_and_place():
    def features(subtype, **settings):
        areas, offsets = [], []
        for d in (phantom(seed, subtype, **settings) for seed in range(14)):
            columns, lung_columns = np.nonzero(d.mask)[1], np.nonzero(d.lung)[1]
            areas.append(d.mask.sum() * d.spacing**2)
            offsets.append(abs(columns.mean() - lung_columns.mean()) / np.ptp(lung_columns))
        return np.median(areas), np.median(offsets)

    by_size = ("adenocarcinoma", "squamous", "large_cell")
    (adeno, adeno_place), (squamous, squamous_place), (large, large_place) = map(features, by_size)
    assert adeno < squamous < large
    assert squamous_place < min(adeno_place, large_place)
    assert features("large_cell", difficulty=0.0)[0] > 1.5 * features("large_cell", difficulty=1.0)[0]


def test_display_maps_the_window_to_the_grey_range():
    hu = np.array([[-2000.0, -1350.0, -600.0, 150.0, 3000.0]])
    assert display(hu, (-600, 1500)).tolist() == [[0, 0, 128, 255, 255]]
