from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.linear_model import LogisticRegression

from chestct.config.compose import compose
from chestct.errors import DecodeError
from chestct.evaluation.pointing import (
    TOLERANCE,
    Lesions,
    _of_other_half,
    check_explanation,
    drawn_lesions,
    known_lesions,
    pointing,
    pointing_game,
)
from chestct.evaluation.sections import optional_sections
from chestct.models.bundle import Bundle
from chestct.models.novelty import fit_novelty
from chestct.models.saliency import normal_cam
from chestct.models.vgg16 import VGG16
from chestct.phantom.dataset import write
from chestct.training.train import train
from tests.conftest import SMALL, network, opened
from tests.evaluation.evaluations import made_up, with_images

SIZE = 128


def draw(n, lesions, seed):
    """Discs of grey, with a chequered lesion somewhere in each or without; and the lesions' masks."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((SIZE, SIZE))
    body = np.hypot(y - 64, x - 64) < 60
    images = np.where(body, 90 + 8 * rng.standard_normal((n, SIZE, SIZE)), 0)
    masks = np.zeros((n, SIZE, SIZE), bool)
    for i in range(n if lesions else 0):
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(20, 44)
        masks[i] = np.hypot(y - 64 - radius * np.sin(angle), x - 64 - radius * np.cos(angle)) < 14
        images[i][masks[i]] = np.where((x // 4 + y // 4) % 2, 250, 30)[masks[i]]
    return np.clip(images, 0, 255).astype(np.uint8), masks


def known(images, masks, reach=8.0):
    return Lesions(images, masks, np.full(len(images), reach), np.arange(len(images)))


def test_heat_on_the_lesions_passes_and_heat_elsewhere_fails_with_a_sentence():
    places = np.zeros((12, 14, 14))
    for i, place in enumerate(places):
        place[1 + 3 * (i % 4), 1 + 4 * (i // 4)] = 1
    masks = places.repeat(16, 1).repeat(16, 2) > 0
    for heat, failure in (
        (places, ""),
        (np.roll(places, 7, axis=2), "lesion in 0% of 12 slices: not clearly more often"),
    ):
        bundle = SimpleNamespace(predict=lambda images, explain, heat=heat: SimpleNamespace(heat=heat))
        result = check_explanation(bundle, known(np.zeros(masks.shape, np.uint8), masks))
        assert bool(result["failure"]) == bool(failure)
        assert failure in result["failure"]
        assert result["pointing"]["heat map"].value == (not failure)


@pytest.mark.slow
@torch.no_grad()
def test_maps_of_a_network_that_learned_the_lesions_find_those_of_other_slices_and_no_other_place():
    net = network(size=SIZE)
    normal, sick = (net.conv5(next(net.batches(draw(12, lesions, lesions)[0], 12))) for lesions in (False, True))
    pooled = net.channel_means(net.pool(torch.cat([normal, sick]))).numpy()
    scale = pooled.std()
    fitted = LogisticRegression(C=0.1).fit(pooled / scale, [0] * 12 + [1] * 12)
    net.head[-1].weight.copy_(torch.tensor(fitted.coef_ / scale))
    net.head[-1].bias.copy_(torch.tensor(fitted.intercept_))
    bundle = Bundle(net, made_up().point, fit_novelty(*torch.rand(2, 40, 512)), normal_cam(net, normal), {})
    images, masks = draw(12, True, 7)
    result = check_explanation(bundle, known(images, masks))
    assert result["failure"] == ""
    assert result["pointing"]["heat map"].value > max(0.6, 2 * result["pointing"]["usual place"])
    elsewhere = check_explanation(bundle, known(images, np.roll(masks, 64, axis=2)))
    assert "hottest point lies in the lesion" in elsewhere["failure"]


def spot(row, column, side=224):
    found = np.zeros((side, side))
    found[row, column] = 1
    return found


def test_a_peak_may_lie_as_far_from_the_lesion_as_is_allowed_there():
    mask = np.zeros((224, 224), bool)
    mask[100:110, 100:110] = True
    shown = np.stack([spot(105, 105), spot(105, 124), spot(105, 125), np.zeros((224, 224))])
    lesions = known(np.zeros((4, 224, 224), np.uint8), np.stack([mask] * 4), reach=15)
    found = pointing_game(shown, lesions, usual=mask[::15, ::15].astype(float))
    assert found["heat map"].value == 0.5
    assert (found["heat map"].low, found["heat map"].high) == pytest.approx((0.15, 0.85), abs=1e-3)  # Wilson 1927
    assert found["random place in the lungs"] is None  # there are no lungs in black
    assert found["usual place"] == 1
    assert pointing_game(shown, lesions)["usual place"] is None


def test_the_usual_place_of_a_slice_is_that_of_the_others():
    centre, corner = np.zeros((2, 224, 224), bool)
    centre[105:120, 105:120] = True
    corner[20:35, 20:35] = True
    for masks, expected in (([centre, corner, corner, corner], 0.75), ([corner, corner, centre, centre], 0.5)):
        masks = np.stack(masks)
        usual = _of_other_half(masks)
        found = pointing_game(np.zeros(masks.shape), known(masks.astype(np.uint8), masks), usual)
        assert (found["heat map"].value, found["usual place"]) == (0, expected)


def test_heat_maps_are_checked_on_new_phantoms_whose_lesions_lie_where_their_masks_say(tmp_path, monkeypatch):
    evaluation = made_up()
    cfg = evaluation.cfg
    cfg.cache_dir, cfg.evaluation.phantoms, cfg.data.size, cfg.data.fit = str(tmp_path), 5, SIZE, "stretch"
    cfg.data.phantom.size = 96
    monkeypatch.setattr("chestct.evaluation.sections.check_explanation", lambda bundle, lesions: lesions)
    lesions = optional_sections(evaluation)["explanation"]
    (root,) = (path.parent for path in (tmp_path / "phantom").glob("*/masks"))
    write(tmp_path / "own", replace(cfg.data.phantom, slices=12, cancer=0.95))
    own, new = ({path.read_bytes() for path in folder.glob("t*/*/*.png")} for folder in (tmp_path / "own", root))
    assert own.isdisjoint(new)
    files = sorted((root / "masks").rglob("*.png"), key=lambda path: path.name)[:5]
    assert lesions.images.shape == lesions.masks.shape == (5, SIZE, SIZE)
    for file, mask, reach in zip(files, lesions.masks, lesions.reach, strict=True):
        drawn = np.asarray(Image.open(file))
        assert reach == pytest.approx(TOLERANCE * SIZE / drawn.shape[1])
        assert np.divide(ndimage.center_of_mass(mask), SIZE) == pytest.approx(
            np.divide(ndimage.center_of_mass(drawn), drawn.shape), abs=0.02
        )


def test_heat_maps_are_held_against_the_boxes_and_masks_of_test_slices_of_patients_alone(tmp_path):
    evaluation = made_up()
    evaluation.cfg.data.size = 32
    evaluation = with_images(evaluation, network(size=32), 32)
    whole, corner = np.ones((32, 32), bool), np.zeros((32, 32), bool)
    corner[:1, :1] = True
    manifest = evaluation.manifest
    manifest["root"] = str(tmp_path)
    cancers = manifest.index[(manifest["label"] == "cancer") & (manifest["split"] == "test")]
    for path in manifest.loc[cancers[:6], "path"]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (320, 320), 90).save(tmp_path / path)
    manifest["lesion"] = np.packbits(corner).tobytes()
    manifest.loc[manifest["split"] == "test", "lesion"] = b""
    manifest.loc[cancers[:6], "lesion"] = np.packbits(whole).tobytes()
    manifest["source"] = "phantom"
    assert optional_sections(evaluation) == {}  # masks of phantoms are checked by evaluation.phantoms
    manifest["source"] = "hospital"
    pointing = optional_sections(evaluation)["pointing"]
    assert (pointing["slices"], pointing["heat map"].groups) == (6, 6)
    assert pointing["heat map"].value == 1
    manifest.loc[cancers[:6], "group"] = 0
    manifest.loc[cancers[:6], "lesion"] = np.packbits(corner).tobytes()
    pointing = optional_sections(evaluation)["pointing"]
    assert pointing["heat map"].value < 1
    assert pointing["heat map"].low is None  # slices of one patient err together


def test_lesions_are_drawn_into_the_normal_slices_of_every_unit_in_turn(small, monkeypatch) -> None:
    monkeypatch.setattr("chestct.evaluation.pointing.DRAWN", 6)
    cfg = small()
    store = opened(cfg).store
    rows = store.manifest.assign(group=lambda t: np.arange(len(t)) % 20 // 5)
    lesions = drawn_lesions(rows, store.images, cfg)
    per_unit = np.unique(lesions.groups, return_counts=True)[1]
    assert len(per_unit) == rows["group"][rows["label"] == "normal"].nunique()
    assert per_unit.max() - per_unit.min() <= 1
    distances = np.abs(lesions.images[:, None] - store.images[rows["row"]] / 255)
    nearest = distances.mean((2, 3)).argmin(1)
    assert set(rows["label"].iloc[nearest]) == {"normal"}
    assert len(set(rows["content"].iloc[nearest])) == len(nearest)
    changed = distances[np.arange(len(nearest)), nearest]
    assert changed[lesions.masks].min() > 0.05
    assert changed[~lesions.masks].mean() < 0.01
    assert np.array_equal(drawn_lesions(rows, store.images, cfg).images, lesions.images)
    cancers = rows[rows["label"] == "cancer"]
    assert drawn_lesions(cancers, store.images, cfg) is known_lesions(rows[:0], store.images, cfg) is None


def test_slices_are_read_within_the_limits_of_the_settings(small) -> None:
    store = opened(small()).store
    with pytest.raises(DecodeError, match=r"data\.max_pixels allows 9"):
        drawn_lesions(store.manifest.assign(group=0), store.images, small("data.max_pixels=9"))


@pytest.mark.slow
def test_pointing_finds_lesions_where_the_evidence_is(phantoms: Path, cache: Path, tmp_path: Path, monkeypatch) -> None:
    cfg = compose(
        *SMALL, f"data.sources={{a: {{root: {phantoms}}}}}", f"cache_dir={cache}", "model.pool=topk", "model.block=4"
    )
    cfg = replace(cfg, data=replace(cfg.data, lesions=0.3, views=1))
    result = train(cfg, tmp_path / "run")
    test = result.data.manifest[result.data.manifest["split"] == "test"]
    images = result.data.store.images
    made = {"known": known_lesions(test, images, cfg), "drawn": drawn_lesions(test, images, cfg)}
    cover = torch.nn.functional.adaptive_avg_pool2d
    where = {len(lesions.masks): cover(torch.tensor(lesions.masks).float(), 16) for lesions in made.values()}
    assert len(where) == 2  # their number tells which slices are asked for

    def pointed(sign: int) -> dict:
        def evidence(net: VGG16, conv5: torch.Tensor, *_: object) -> tuple[None, torch.Tensor]:
            return None, sign * (where[len(conv5)] - 0.01)

        monkeypatch.setattr("chestct.evaluation.pointing.normalised_cam", evidence)
        return pointing(cfg, result.data, [result.best, result.best])

    right, wrong = pointed(1), pointed(-1)
    for kind, lesions in made.items():
        assert right[kind]["slices"] == len(lesions.masks)
        assert right[kind]["heat map"].value > 0.9
        assert wrong[kind]["heat map"].value < 0.3
        assert 0 <= right[kind]["usual place"] < 1
    result.data.manifest["lesion"] = b""
    assert list(pointing(cfg, result.data, [result.best])) == ["drawn"]
