"""Lesions and controls drawn into slices without one."""

import numpy as np
import pytest

from chestct.phantom.insertion import RADIUS, SMALLEST, insert
from tests.imaging.test_lungs import ellipse

SIDE = 160


@pytest.fixture(scope="module")
def normal():
    """(square float32 [S, S], lungs bool [S, S], what lies far off bool [S, S]) of a slice with a little noise."""
    lungs = ellipse((SIDE, SIDE), 80, 45, 60, 32) | ellipse((SIDE, SIDE), 80, 115, 60, 32)
    square = np.where(lungs, 0.15, 0.75) + np.random.default_rng(0).normal(0, 0.01, (SIDE, SIDE))
    far = ~ellipse((SIDE, SIDE), 80, 45, 72, 44) & ~ellipse((SIDE, SIDE), 80, 115, 72, 44)
    return square.clip(0, 1).astype(np.float32), lungs, far


def test_a_lesion_changes_the_slice_where_its_mask_says_and_nothing_far_from_the_lungs(normal):
    square, lungs, far = normal
    sizes, shares = [], []
    for seed in range(20):
        changed, mask = insert(square, lungs, "lesion", np.random.default_rng(seed))
        assert changed.dtype == np.float32
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert mask.sum() >= SMALLEST * SIDE**2
        assert (changed[mask] > square[mask] + 0.05).mean() > 0.95
        np.testing.assert_allclose(changed[far], square[far], atol=1e-3)
        shares.append(np.abs(changed - square)[mask].sum() / np.abs(changed - square).sum())
        sizes.append(np.sqrt(mask.sum() / np.pi) / SIDE)
    assert min(shares) > 0.4  # the soft edge is not in the mask
    assert np.median(shares) > 0.8
    assert min(sizes) < 2 * RADIUS[0]
    assert max(sizes) > 0.5 * RADIUS[1]


def test_controls_edit_the_slice_near_the_lungs_and_have_no_mask(normal):
    square, lungs, far = normal
    changes = []
    for seed in range(20):
        changed, mask = insert(square, lungs, "control", np.random.default_rng(seed))
        assert not mask.any()
        np.testing.assert_allclose(changed[far], square[far], atol=1e-3)
        changes.append(np.abs(changed - square).max())
    assert np.median(changes) > 0.05


def test_the_seed_alone_decides(normal):
    square, lungs, _ = normal
    first, again, other = (insert(square, lungs, "lesion", np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
