import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from chestct.evaluation.robustness import PERTURBATIONS, changed, robustness

TARGETS = np.arange(12) % 2


@pytest.fixture(scope="module")
def images():
    """Smooth grey blobs, as bodies are."""
    blobs = ndimage.gaussian_filter(np.random.default_rng(0).random((12, 96, 96)), (0, 4, 4))
    return (40 + 170 * (blobs - blobs.min()) / np.ptp(blobs)).astype(np.uint8)


def mean_level(images):
    return images.mean((1, 2)) / 255


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_stronger_changes_change_more_and_levels_saturate_instead_of_wrapping(images, name):
    def distance(strength):
        rng = np.random.default_rng(0)
        after = np.stack([changed(name, image, strength, rng) for image in images])
        assert (after.shape, after.dtype) == (images.shape, np.uint8)
        return np.abs(after.astype(float) - images).mean()

    weak, middle, strong = (distance(strength) for strength in PERTURBATIONS[name][1])
    assert 0 < weak < middle < strong
    white = changed(name, np.full((8, 8), 250, np.uint8), PERTURBATIONS[name][1][-1], np.random.default_rng(0))
    assert name == "rotation" or white.min() > 100


def test_values_are_those_computed_by_hand(images):
    plain = mean_level(images)
    threshold = plain.mean()
    table = robustness(mean_level, images, TARGETS, threshold)
    assert len(table) == 1 + 3 * len(PERTURBATIONS)
    assert tuple(table.loc[0, ["perturbation", "score_change", "flipped"]]) == ("none", 0.0, 0.0)
    brighter = mean_level(np.clip(np.rint(images + 255 * 0.2), 0, 255).astype(np.uint8))
    row = table.set_index(["perturbation", "strength"]).loc[("brighter", 0.2)]
    assert row["score_change"] == pytest.approx(np.abs(brighter - plain).mean())
    assert row["flipped"] == ((brighter >= threshold) != (plain >= threshold)).mean() > 0
    assert row["auroc"] == pytest.approx(roc_auc_score(TARGETS, brighter))
    assert robustness(mean_level, images, np.ones(12, int), threshold)["auroc"].isna().all()
