import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from chestct.evaluation.robustness import PERTURBATIONS, changed, robustness

SIDE = 96
TARGETS = np.arange(12) % 2


@pytest.fixture(scope="module")
def images():
    """Smooth grey blobs on black, as bodies are."""
    rng = np.random.default_rng(0)
    blobs = ndimage.gaussian_filter(rng.random((12, SIDE, SIDE)), (0, 4, 4))
    blobs = (blobs - blobs.min()) / np.ptp(blobs)
    blobs[:, :12] = blobs[:, -12:] = blobs[:, :, :12] = blobs[:, :, -12:] = 0
    return (40 + 170 * blobs).astype(np.uint8)


def mean_level(images):
    return images.mean((1, 2)) / 255


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_stronger_changes_change_more_and_levels_saturate_instead_of_wrapping(images, name):
    def distance(strength):
        rng = np.random.default_rng(0)
        after = np.stack([changed(name, image, strength, rng) for image in images])
        assert after.shape == images.shape
        assert after.dtype == np.uint8
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
    first = table.iloc[0]
    assert (first["perturbation"], first["score_change"], first["flipped"]) == ("none", 0.0, 0.0)
    brighter = mean_level(np.clip(np.rint(images + 255 * 0.2), 0, 255).astype(np.uint8))
    row = table.set_index(["perturbation", "level"]).loc[("brighter", 3)]
    assert row["score_change"] == pytest.approx(np.abs(brighter - plain).mean())
    assert row["flipped"] == ((brighter >= threshold) != (plain >= threshold)).mean() > 0
    assert row["auroc"] == roc_auc_score(TARGETS, brighter)
    assert row["auroc_change"] == row["auroc"] - roc_auc_score(TARGETS, plain)


def test_a_slice_is_changed_alike_whichever_others_stand_behind_it(images):
    seen = []
    for some in (images, images[:3]):
        robustness(lambda x: seen.append(x[0]) or mean_level(x), some, TARGETS[: len(some)])
    half = len(seen) // 2
    assert all((one == other).all() for one, other in zip(seen[:half], seen[half:], strict=True))


def test_auroc_of_one_class_is_none(images):
    table = robustness(mean_level, images, np.ones(len(images), int))
    assert table["auroc"].isna().all()
    assert table["score_change"].notna().all()
