"""The head that judges places: its map is the explanation, and lesions drawn into normal slices teach it where."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter

from chestct.config.compose import compose
from chestct.config.schema import ModelConfig
from chestct.config.schema_serving import TENSORS
from chestct.data import dataset as slices
from chestct.errors import ConfigError
from chestct.evaluation.evaluate import evaluate, logits_of
from chestct.evaluation.export import export
from chestct.imaging.lungs import find_lungs
from chestct.models.bundle import load_bundle
from chestct.models.features import attach
from chestct.models.head import BestPlaces, Smooth, Standardise
from chestct.models.lightning_module import places_loss
from chestct.models.saliency import normalised_cam
from chestct.models.vgg16 import VGG16
from chestct.models.weights import load_weights
from chestct.phantom.insertion import insert
from chestct.training.train import train
from tests.conftest import SMALL, network, opened

PLACES = ("experiment=places", "data.size=64", "data.views=1", "trainer.max_epochs=2", "model.hidden=[8]")


def in_view(dataset: slices.SliceDataset, view: int, positions: list[int]) -> dict[str, torch.Tensor]:
    """A batch of slices as training sees them in one view; its own batches mix them."""
    views = dataset.cfg.data.views + 1
    parts = [dataset[(view - at) % views, [at]] for at in positions]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def places(**model):
    return network(pool="topk", standardise=True, hidden=[8], **model)


@torch.no_grad()
@pytest.mark.parametrize(("block", "end", "side"), [("5", 31, 2), ("4", 24, 4), ("3", 17, 9)])
def test_an_earlier_block_is_what_the_whole_network_gives_there(block, end, side):
    x, whole, part = (
        torch.rand(2, 1, 72, 72),
        places(size=72),
        places(size=72, block=block),
    )  # which halves to odd sides
    maps = part.maps(x)
    assert maps.shape[1:] == (part.channels, side, side) == (part.channels, *part.grid)
    torch.testing.assert_close(maps, whole.features[:end]((x - whole.mean) * whole.scale))


@torch.no_grad()
@pytest.mark.parametrize(("last", "size"), [("4", 64), ("5", 72)])
def test_several_blocks_lie_on_the_grid_of_the_last_one_after_another(last, size):
    x, net = torch.rand(2, 1, size, size), places(size=size, block=f"{last}+3")
    maps = net.maps(x)
    assert maps.shape[1:] == (256 + 512, *net.grid) == (net.channels, *net.grid)
    torch.testing.assert_close(maps[:, 256:], places(size=size, block=last).maps(x))
    finer = places(size=size, block="3").maps(x)
    torch.testing.assert_close(maps[:, :256], torch.nn.functional.adaptive_avg_pool2d(finer, net.grid))
    torch.testing.assert_close(net.head(net.pooled(x)), net(x), atol=0, rtol=1e-3)  # cached in half precision


def test_blocks_are_those_of_vgg():
    with pytest.raises(ConfigError, match="five blocks"):
        VGG16(ModelConfig(backbone="alexnet", block="4"), 1, 64, load_weights("none", "alexnet"))


@torch.no_grad()
@pytest.mark.parametrize("smooth", [0, 0.7])
def test_the_map_is_what_the_score_is_made_of(smooth):
    net, x = places(block="4", smooth=smooth), torch.rand(3, 1, 64, 64)
    logits, cam = normalised_cam(net, net.conv5(x), np.zeros(3, int), torch.ones(2, 1, 8, 8))
    torch.testing.assert_close(logits, net(x))
    torch.testing.assert_close(logits[:, 0], cam.flatten(1).topk(3, 1).values.mean(1))


def test_fewer_places_than_the_best_are_all_of_them():
    evidence = torch.tensor([[[[0.5]]], [[[-1.0]]]])
    assert BestPlaces()(evidence).tolist() == [[0.5], [-1.0]]


def test_neighbours_share_their_evidence_and_outside_the_slice_there_is_none():
    smooth = Smooth(0.7, (11, 13))
    torch.testing.assert_close(smooth(torch.ones(2, 1, 11, 13)), torch.ones(2, 1, 11, 13))
    evidence = torch.zeros(1, 1, 11, 13)
    evidence[0, 0, 5, 6] = 1
    expected = gaussian_filter(evidence[0, 0].numpy(), 0.7, truncate=9, mode="constant")
    torch.testing.assert_close(smooth(evidence)[0, 0], torch.from_numpy(expected))


def test_the_loss_at_places_wants_lesions_where_they_are_and_nothing_elsewhere():
    covered = torch.zeros(2, 1, 4, 4)
    covered[0, 0, 1, 1:3] = torch.tensor([0.8, 0.1])  # a lesion, and a place that it touches: that one is not judged
    right = torch.where(covered > 0.5, 9.0, -9.0)
    assert places_loss(right, covered) < 0.01
    touched = right.clone()
    touched[0, 0, 1, 2] = 9
    assert places_loss(touched, covered) == places_loss(right, covered)
    for wrong in ((0, 0, 1, 1), (1, 0, 3, 3)):
        evidence = right.clone()
        evidence[wrong] = -right[wrong]
        assert places_loss(evidence, covered) > 0.2
    small = covered * 0.1  # the most that any place is covered is what there is
    assert places_loss(right, small) < 0.01
    loud = torch.cat([right[:1], -right[1:]])  # wrong on the second slice alone
    assert places_loss(loud, covered, torch.tensor([1.0, 0.0])) < 0.01 < places_loss(loud, covered, torch.ones(2))
    assert places_loss(loud, covered, torch.ones(2)) == places_loss(loud, covered)
    assert places_loss(-right, torch.full_like(covered, -1.0)) == 0  # nothing is known


def test_a_small_lesion_that_is_missed_costs_as_much_as_a_large_one():
    covered = torch.zeros(2, 1, 4, 4)
    covered[0, 0, 0, 0] = covered[1, 0, :3, :3] = 1
    losses = []
    for missed in range(2):
        evidence = torch.where(covered > 0, 9.0, -9.0)
        evidence[missed] = -9
        losses.append(places_loss(evidence, covered))
    torch.testing.assert_close(*losses)


def test_no_channel_of_another_scanner_decides_alone():
    standardise = Standardise(2).eval()
    maps = torch.tensor([[[[1.0, 300.0]], [[-300.0, 0.0]]]])
    torch.testing.assert_close(standardise(maps), maps.clamp(-5, 5), atol=1e-4, rtol=0)


def test_means_and_spreads_are_of_training_as_its_slices_count_whatever_a_batch_holds():
    torch.manual_seed(0)
    maps = torch.randn(100, 3, 4, 4) * 2 + 7
    w = torch.cat([torch.ones(70), torch.zeros(30)])
    standardise = Standardise(3).train()
    standardise.fit(maps.half().split(64), w)
    out = standardise(maps[:70])
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=0.01, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(3), atol=0.02, rtol=0)
    torch.testing.assert_close(standardise(maps[:2]), out[:2])
    torch.testing.assert_close(standardise.eval()(maps[:2]), out[:2])


def test_pooled_features_are_standardised_batch_by_batch_and_a_last_slice_alone_like_those_before_it():
    own, torchs = Standardise(3, places=False).train(), torch.nn.BatchNorm1d(3, affine=False).train()
    batches = torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(0)) * 50
    for batch in batches:
        torch.testing.assert_close(own(batch), torchs(batch))
    torch.testing.assert_close(own(batches[0, :1]), torchs.eval()(batches[0, :1]))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, phantoms, cache):
    """(settings, set up data) with lesions drawn into half of the normal training slices."""
    cfg = compose(
        *SMALL, f"data.root={phantoms}", f"cache_dir={cache}", *PLACES, "data.lesions=0.5", "data.balance=true"
    )
    data = opened(cfg)
    data.manifest["lesion"] = b""  # as of a hospital's slices: nothing is known but what is drawn
    return cfg, data


def test_lesions_make_normal_slices_cancer_and_are_where_the_places_say(drawn):
    _, data = drawn
    dataset = data.dataset("train", train=True)
    every = list(range(len(dataset)))
    plain, shown = in_view(dataset, 0, every), in_view(dataset, 1, every)
    normal = dataset.y == 0
    assert torch.equal(shown["w"], plain["w"])
    # A quarter of all views of normal slices show a lesion: with them, cancer counts as much as what is left of normal.
    of_normal, of_cancer = plain["w"][normal].sum().item(), plain["w"][~normal].sum().item()
    assert of_cancer + of_normal / 4 == pytest.approx(of_normal * 3 / 4)
    assert torch.equal(plain["y"], dataset.y)
    assert not plain["places"][normal].any()
    lesions = normal & (shown["y"] == 1)
    assert 0 < lesions.sum() < normal.sum()
    assert torch.equal(lesions, normal & (shown["places"].flatten(1).amax(1) > 0))
    assert (shown["places"][~normal] == -1).all()
    assert torch.equal(shown["y"][~normal], dataset.y[~normal])
    assert not data.dataset("valid").shown([0, 1], 1)[1].any()


def test_cached_maps_and_places_are_those_of_one_drawing(drawn, tmp_path, monkeypatch):
    cfg, data = drawn
    dataset, drawings, searches = data.dataset("train", train=True), [], []
    net = network(**vars(cfg.model))
    monkeypatch.setattr(slices, "insert", lambda *args: drawings.append(args) or insert(*args))
    monkeypatch.setattr(slices, "find_lungs", lambda image: searches.append(image) or find_lungs(image))
    attach(data, net, replace(cfg, cache_dir=str(tmp_path)), ("train",), views=3)
    normal = (dataset.y == 0).sum().item()
    assert (len(drawings), len(searches)) == (2 * normal, normal)  # features and places are of one drawing
    cached = data.dataset("train", train=True)
    data.features.clear(), data.places.clear()
    positions = list(range(12))
    images, maps = in_view(dataset, 1, positions), in_view(cached, 1, positions)
    assert torch.equal(images["y"], maps["y"])
    with torch.no_grad():
        torch.testing.assert_close(net.pooled(images["x"]), maps["x"], rtol=2e-3, atol=2e-3)
    assert maps["places"].shape == (12, 1, 4, 4)
    torch.testing.assert_close(
        torch.nn.functional.adaptive_avg_pool2d(images["places"].clamp(min=0), 4), maps["places"].clamp(min=0)
    )


@pytest.mark.slow
def test_a_run_ends_in_a_bundle_that_explains_itself(small, tmp_path, monkeypatch):
    settings = (*PLACES, "data.lesions=0.4")
    result = train(small(*settings), tmp_path / "run")
    assert np.isfinite(list(result.metrics.values())).all()
    with monkeypatch.context() as patch:  # no map of normal slices is asked for, which such a head does not need
        patch.setattr(VGG16, "conv5", lambda *_: pytest.fail("convolutions"))
        evaluation = evaluate(small(*settings, f"ckpt={result.best}"))
    assert evaluation.table["path"].tolist() == result.predictions["path"].tolist()
    np.testing.assert_allclose(logits_of(evaluation.table), logits_of(result.predictions), atol=1e-4)
    bundle = export(evaluation, tmp_path / "bundle", "# A card")
    outputs = bundle.predict(evaluation.images[:4], explain=True)
    assert outputs.heat.shape == (4, 4, 4)
    again = load_bundle(tmp_path / "bundle").predict(evaluation.images[:4])
    np.testing.assert_array_equal(outputs.logits, again.logits)
    assert "saliency.baseline" not in load_file(tmp_path / "bundle" / TENSORS)
