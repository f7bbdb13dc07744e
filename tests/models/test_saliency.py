import copy

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from chestct.config.schema import ModelConfig
from chestct.imaging.preprocess import Preprocess
from chestct.models import saliency
from chestct.models.saliency import Placement, evidence, excess, heat, normal_evidence, overlay, placement
from chestct.models.vgg16 import VGG16
from chestct.models.weights import load_weights

SIZE = 64


@pytest.fixture(scope="module")
def oxford():
    return load_weights("oxford")


@pytest.fixture(scope="module")
def slices():
    return torch.rand(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def make(weights, outputs=1, **model):
    torch.manual_seed(0)
    net = VGG16(ModelConfig(**model), outputs, SIZE, weights).eval()
    net.set_frozen(True)
    return net


def grad_cam(net, maps, output=0):
    """Grad-CAM as published: the positive part of the plain evidence."""
    logits, found = evidence(net, maps, output)
    return logits, heat(found)


HEADS = [{}, {"dropout": 0.5}, {"pool": "flatten"}, {"hidden": [16]}, {"pool": "flatten", "hidden": [16, 8]}]


@pytest.mark.parametrize(
    ("outputs", "output", "model", "fine"),
    [
        (1, 0, HEADS[0], False),
        (1, 0, HEADS[1], True),
        (4, 2, HEADS[0], True),
        (4, 3, HEADS[2], False),
        (4, 3, HEADS[2], True),
        (1, 0, HEADS[3], True),
        (4, 1, HEADS[4], False),
    ],
)
def test_maps_are_those_of_the_grad_cam_package(oxford, slices, outputs, output, model, fine):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    net = make(oxford, outputs, **model)
    open_copy = copy.deepcopy(net)
    open_copy.set_frozen(False)

    class Raw(GradCAM):
        def get_cam_image(self, *args, **kwargs):
            self.raw = super().get_cam_image(*args, **kwargs)
            return self.raw

    # The layer whose output is the maps that ours are made from: the last max pool, or the ReLU before it.
    with Raw(open_copy, [open_copy.features[-2 if fine else -1]]) as theirs:
        picture = theirs(slices, [ClassifierOutputTarget(output)] * len(slices))
        raw = torch.tensor(theirs.raw)
    with torch.no_grad():
        maps = net.fine_maps(slices) if fine else net.maps(slices)
        logits, evidence = saliency.evidence(net, maps, output)
        heat = grad_cam(net, maps, output)[1]
        assert torch.allclose(logits, net(slices), rtol=1e-4, atol=1e-4)
    assert (evidence - raw).abs().max() <= 1e-4 * raw.abs().max()
    # The package also subtracts a map's minimum, which ours keeps: low heat everywhere is not no heat.
    ours = scale_cam_image(scale_cam_image(heat.numpy(), (SIZE, SIZE)))
    assert np.abs(ours - picture).max() < 1e-4


@pytest.mark.parametrize("maps_of", [VGG16.maps, VGG16.fine_maps])
@pytest.mark.parametrize("outputs", [1, 4])
def test_closed_form_equals_the_gradient(oxford, slices, outputs, maps_of):
    net = make(oxford, outputs)
    maps = maps_of(net, slices).detach()
    for output in range(outputs):
        closed, by_gradient = (f(net, maps, output) for f in (saliency.evidence, saliency.evidence_by_gradient))
        for ours, theirs in zip(closed, by_gradient, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_closed_form_needs_no_autograd(oxford, slices, monkeypatch):
    net = make(oxford, dropout=0.3)
    maps = net.maps(slices).detach()
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("autograd was used"))
    grad_cam(net, maps)


def test_fine_maps_are_those_before_the_last_pool(oxford, slices):
    net = make(oxford)
    fine = net.fine_maps(slices)
    assert fine.shape == (len(slices), 512, SIZE // 16, SIZE // 16)
    assert torch.equal(net.features[-1](fine), net.maps(slices))


def test_excess_is_in_spreads_of_normal_slices(oxford, slices):
    net = make(oxford, 4)
    normal = net.fine_maps(torch.rand(8, 1, SIZE, SIZE)).detach()
    baseline = normal_evidence(net, normal)
    assert baseline.shape == (2, 4, SIZE // 16, SIZE // 16)
    for output in range(4):
        logits, over = excess(net, normal, np.full(8, output), baseline)
        assert torch.equal(logits, evidence(net, normal)[0])
        assert over.mean(0).abs().max() < 1e-4
        assert over.std(0, correction=0).max() < 1  # the spread is raised by its mean over all places
        assert over.std(0, correction=0).mean() > 0.3
    assert not excess(net, normal[:1], np.zeros(1, int), normal_evidence(net, normal[:1]))[1].any()


def test_each_slice_is_explained_by_its_own_output(oxford, slices):
    net = make(oxford, 4)
    maps = net.fine_maps(torch.cat([slices, slices])).detach()
    for baseline in (None, normal_evidence(net, maps)):
        mixed = excess(net, maps, np.array([2, 0, 3, 2]), baseline)[1]
        for i, output in enumerate((2, 0, 3, 2)):
            assert torch.allclose(mixed[i], excess(net, maps, np.full(4, output), baseline)[1][i])
    assert torch.equal(excess(net, maps, np.array([2, 0, 3, 2]), baseline, against=True)[1], -mixed)


def test_smoothing_is_scipys_gaussian():
    found = torch.rand(2, 14, 14)
    sigma = 14 * saliency.SMOOTHING
    smooth = gaussian_filter(found.numpy(), (0, sigma, sigma), mode="constant", truncate=14)
    expected = smooth - smooth.mean((1, 2), keepdims=True)
    assert np.abs(saliency._standing_out(found).numpy() - expected).max() < 1e-5


def test_evidence_of_a_linear_head_sums_to_the_logit_less_its_bias(oxford, slices):
    net = make(oxford)
    logits, evidence = saliency.evidence(net, net.maps(slices).detach())
    assert torch.allclose(evidence.sum((1, 2)), logits[:, 0] - net.head[-1].bias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("model", HEADS)
def test_works_on_frozen_convolutions_where_gradients_are_off(oxford, slices, mode, model):
    net = make(oxford, **model)
    expected = grad_cam(net, net.maps(slices).detach())
    with mode():
        found = grad_cam(net, net.maps(slices))
    for ours, theirs in zip(found, expected, strict=True):
        assert not ours.requires_grad
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("model", HEADS)
def test_what_speaks_for_normal_is_what_speaks_against_cancer(oxford, slices, model):
    net = make(oxford, **model)
    maps = net.maps(slices).detach()
    normal = excess(net, maps, np.zeros(2, int), None, against=True)[1]
    with torch.no_grad():
        net.head[-1].weight.neg_()
        net.head[-1].bias.neg_()
    assert torch.allclose(normal, evidence(net, maps)[1], atol=1e-4)


def test_heat_is_the_positive_part_over_its_maximum():
    found = saliency.heat(torch.tensor([[[-2.0, 1.0], [4.0, 0.0]], [[-1.0, -2.0], [0.0, -3.0]]]))
    assert found.tolist() == [[[0.0, 0.25], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]
    assert saliency.heat(torch.full((1, 2, 2), 1e-30)).max() == 1


def test_a_slice_without_evidence_for_the_output_has_no_heat(oxford, slices):
    net = make(oxford)
    with torch.no_grad():
        net.head[-1].weight.copy_(-net.head[-1].weight.abs())
    heat = grad_cam(net, net.maps(slices).detach())[1]
    assert heat.dtype == torch.float32
    assert not heat.any()


def spot_at(height, width, row, column, background=0):
    """A slice with a bright square around a pixel, and its mask."""
    gray = np.full((height, width), background, np.uint8)
    gray[row - 12 : row + 13, column - 12 : column + 13] = 255
    return gray, gray == 255


@pytest.mark.parametrize("fit", ["pad", "stretch", "body"])
@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (97, 256), (256, 256)])
def test_placement_is_where_preprocess_puts_the_slice(fit, shape):
    rng = np.random.default_rng(0)
    gray = np.zeros(shape, np.uint8)
    gray[20:-30, 15:-10] = rng.integers(100, 256, (shape[0] - 50, shape[1] - 25))
    preprocess = Preprocess(SIZE, fit)
    left, top, right, bottom = placement(gray, preprocess).target
    square = preprocess(gray.astype(np.float32) / 255)
    outside = square.copy()
    outside[top:bottom, left:right] = 0
    assert not outside.any()
    if fit == "body":
        assert all(side.mean() > 60 for side in (square[top], square[bottom - 1]))
        assert all(side.mean() > 60 for side in (square[top:bottom, left], square[top:bottom, right - 1]))


@pytest.mark.parametrize("fit", ["pad", "stretch", "body"])
@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (256, 256)])
@pytest.mark.parametrize("place", [(0.2, 0.3), (0.7, 0.6)])
def test_a_mask_and_its_slice_land_on_the_same_pixels(fit, shape, place):
    gray, mask = spot_at(*shape, int(shape[0] * place[0]), int(shape[1] * place[1]), background=40)
    preprocess = Preprocess(SIZE, fit)
    square = preprocess(gray.astype(np.float32) / 255)
    assert ((square > 147) == saliency.mask_to_square(mask, placement(gray, preprocess))).mean() > 0.997


@pytest.mark.parametrize("fit", ["pad", "stretch", "body"])
@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (256, 256)])
@pytest.mark.parametrize("place", [(0.2, 0.3), (0.7, 0.6)])
def test_heat_comes_back_to_where_the_slice_had_it(fit, shape, place):
    row, column = int(shape[0] * place[0]), int(shape[1] * place[1])
    gray, _ = spot_at(*shape, row, column, background=10)
    gray[15:-20, 10:-5] |= 40  # a body that is not centred
    preprocess = Preprocess(SIZE, fit)
    square = torch.tensor(preprocess(gray.astype(np.float32) / 255)).float() / 255
    back = saliency.heat_to_slice((square > 0.5).float(), shape, placement(gray, preprocess))
    rows, columns = np.nonzero(back > 0.5)
    pixel = max(shape) / SIZE
    assert abs(rows.mean() - row) < pixel / 2
    assert abs(columns.mean() - column) < pixel / 2


def test_what_the_network_never_saw_has_no_heat():
    gray = np.zeros((100, 120), np.uint8)
    gray[30:80, 40:90] = 200
    place = placement(gray, Preprocess(SIZE, "body"))
    assert place.source == (40, 30, 90, 80)
    full = saliency.heat_to_slice(torch.ones(2, 2), gray.shape, place)
    assert (full > 0).sum() == 50 * 50
    assert full[30:80, 40:90].min() > 0.999


def test_upsampled_heat_of_a_square_slice_is_torchs_bilinear():
    heat = torch.rand(7, 7)
    place = Placement(224, (0, 0, 224, 224), (0, 0, 224, 224))
    expected = saliency.heat_to_square(heat[None], 224)[0].numpy()
    assert np.allclose(saliency.heat_to_slice(heat, (224, 224), place), expected, atol=1e-5)


def test_overlay_shows_the_slice_as_it_is_where_there_is_no_heat():
    gray = np.random.default_rng(0).integers(0, 256, (90, 130), dtype=np.uint8)
    place = placement(gray, Preprocess(SIZE))
    plain = overlay(gray, torch.zeros(2, 2), place)
    assert plain.shape == (90, 130, 3)
    assert plain.dtype == np.uint8
    assert (plain == gray[..., None]).all()


def test_overlay_is_all_colour_at_full_heat_and_opacity():
    gray = np.full((50, 50), 77, np.uint8)
    place = placement(gray, Preprocess(SIZE))
    assert (overlay(gray, torch.ones(2, 2), place, opacity=1.0) == saliency.ANCHORS[-1]).all()
    half = overlay(gray, torch.ones(2, 2), place, opacity=0.5).astype(int)
    assert np.abs(half - (saliency.ANCHORS[-1] + 77) / 2).max() <= 1


def test_colors_are_matplotlibs_plasma():
    from matplotlib import colormaps

    values = np.linspace(0, 1, 256)
    theirs = colormaps["plasma"](values)[:, :3] * 255
    assert np.abs(saliency.colors(values) - theirs).max() < 6
    assert np.ptp(saliency.colors(values), axis=1).min() > 80  # nowhere near grey
