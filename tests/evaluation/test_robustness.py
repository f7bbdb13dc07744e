import numpy as np
import pytest

from chestct.evaluation.robustness import PERTURBATIONS, robustness

SIDE = 96


@pytest.fixture(scope="module")
def images():
    """Smooth grey blobs on black, as bodies are."""
    from scipy import ndimage

    rng = np.random.default_rng(0)
    blobs = ndimage.gaussian_filter(rng.random((12, SIDE, SIDE)), (0, 4, 4))
    blobs = (blobs - blobs.min()) / np.ptp(blobs)
    blobs[:, :12] = blobs[:, -12:] = blobs[:, :, :12] = blobs[:, :, -12:] = 0
    return (40 + 170 * blobs).astype(np.uint8)


TARGETS = np.arange(12) % 2


def mean_level(images):
    return images.mean((1, 2)) / 255


@pytest.mark.parametrize("kind", PERTURBATIONS, ids=lambda kind: kind.name)
def test_stronger_changes_change_more(images, kind):
    def distance(strength):
        rng = np.random.default_rng(0)
        changed = [kind.change(image, strength, rng) for image in images]
        assert all(c.shape == i.shape and c.dtype == np.uint8 for c, i in zip(changed, images, strict=True))
        return np.mean([np.abs(c.astype(float) - i).mean() for c, i in zip(changed, images, strict=True)])

    weak, middle, strong = (distance(strength) for strength in kind.strengths)
    assert 0 < weak < middle < strong


def test_names_are_unique_and_signs_are_as_named():
    names = [kind.name for kind in PERTURBATIONS]
    assert len(set(names)) == len(names) == 11
    by_name = {kind.name: kind for kind in PERTURBATIONS}
    gray = np.full((8, 8), 100, np.uint8)
    rng = np.random.default_rng(0)
    assert (by_name["brighter"].change(gray, 0.1, rng) == 126).all()
    assert (by_name["darker"].change(gray, -0.1, rng) == 74).all()
    assert (by_name["less contrast"].change(gray, 0.5, rng) == 114).all()
    assert (by_name["narrower window"].change(gray, 0.5, rng) == 72).all()
    assert (by_name["gamma"].change(gray, 2.0, rng) == 39).all()


def test_levels_saturate_instead_of_wrapping():
    by_name = {kind.name: kind.change for kind in PERTURBATIONS}
    white, black = np.full((8, 8), 250, np.uint8), np.full((8, 8), 5, np.uint8)
    rng = np.random.default_rng(0)
    assert (by_name["brighter"](white, 0.2, rng) == 255).all()
    assert (by_name["darker"](black, -0.2, rng) == 0).all()
    assert by_name["noise"](white, 0.1, rng).min() > 100


def test_table_has_one_row_a_strength_and_one_for_the_slices_as_they_are(images):
    table = robustness(mean_level, images, TARGETS)
    assert len(table) == 1 + 3 * len(PERTURBATIONS)
    first = table.iloc[0]
    assert (first["perturbation"], first["score_change"], first["flipped"]) == ("none", 0.0, 0.0)
    assert (table["slices"] == len(images)).all()


def test_values_are_those_computed_by_hand(images):
    from sklearn.metrics import roc_auc_score

    plain = mean_level(images)
    threshold = plain.mean()
    table = robustness(mean_level, images, TARGETS, threshold).set_index(["perturbation", "level"])
    brighter = mean_level(np.clip(np.rint(images + 255 * 0.2), 0, 255).astype(np.uint8))
    row = table.loc[("brighter", 3)]
    assert row["score_change"] == pytest.approx(np.abs(brighter - plain).mean())
    assert row["flipped"] == ((brighter >= threshold) != (plain >= threshold)).mean() > 0
    assert row["auroc"] == roc_auc_score(TARGETS, brighter)
    assert row["auroc_change"] == row["auroc"] - roc_auc_score(TARGETS, plain)


def test_same_seed_same_table_other_seed_other_noise(images):
    first, again = (robustness(mean_level, images, TARGETS, seed=1) for _ in range(2))
    other = robustness(mean_level, images, TARGETS, seed=2)
    assert first.equals(again)
    noisy = first["perturbation"] == "noise"
    assert (first.loc[noisy, "score_change"] != other.loc[noisy, "score_change"]).all()


def test_a_slice_is_changed_alike_whichever_others_stand_behind_it(images):
    seen = []
    robustness(lambda x: seen.append(x) or mean_level(x), images, TARGETS)
    many = [batch[0] for batch in seen]
    seen.clear()
    robustness(lambda x: seen.append(x) or mean_level(x), images[:3], TARGETS[:3])
    assert all((one == batch[0]).all() for one, batch in zip(many, seen, strict=True))


def test_auroc_of_one_class_is_none(images):
    table = robustness(mean_level, images, np.ones(len(images), int))
    assert table["auroc"].isna().all()
    assert table["score_change"].notna().all()
