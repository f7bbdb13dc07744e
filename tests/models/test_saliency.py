import copy

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from chestct.config.schema import ModelConfig
from chestct.imaging.preprocess import Preprocess
from chestct.models import saliency
from chestct.models.saliency import (
    Placement,
    class_activation_map,
    heat,
    normal_cam,
    normalised_cam,
    overlay,
    placement,
)
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


def grad_cam(net, conv5, output=0):
    """Grad-CAM as published: the positive part of the plain map."""
    logits, cam = class_activation_map(net, conv5, output)
    return logits, heat(cam)


HEADS = [{}, {"dropout": 0.5}, {"pool": "flatten"}, {"hidden": [16]}, {"pool": "flatten", "hidden": [16, 8]}]


@pytest.mark.parametrize(("outputs", "output", "model"), [(1, 0, HEADS[1]), (4, 2, HEADS[0]), (4, 3, HEADS[2]),
                                                          (1, 0, HEADS[3]), (4, 1, HEADS[4])])  # fmt: skip
def test_maps_are_those_of_the_grad_cam_package(oxford, slices, outputs, output, model):
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

    with Raw(open_copy, [open_copy.features[-2]]) as theirs:  # the ReLU whose output is conv5
        picture = theirs(slices, [ClassifierOutputTarget(output)] * len(slices))
        raw = torch.tensor(theirs.raw)
    with torch.no_grad():
        logits, cam = class_activation_map(net, net.conv5(slices), output)
        assert torch.allclose(logits, net(slices), rtol=1e-4, atol=1e-4)
    assert (cam - raw).abs().max() <= 1e-4 * raw.abs().max()
    # The package also subtracts a map's minimum, which ours keeps: low heat everywhere is not no heat.
    ours = scale_cam_image(scale_cam_image(heat(cam).numpy(), (SIZE, SIZE)))
    assert np.abs(ours - picture).max() < 1e-4


@pytest.mark.parametrize("outputs", [1, 4])
def test_maps_of_a_linear_head_weigh_channels_by_its_weights(oxford, slices, outputs):
    """Zhou et al. 2016, from conv5: each pooled position takes the largest of four."""
    net = make(oxford, outputs)
    conv5 = net.conv5(slices)
    for output in range(outputs):
        expected = torch.einsum("k,bkhw->bhw", net.head[-1].weight[output], conv5) / (SIZE // 16) ** 2
        cam = class_activation_map(net, conv5, output)[1]
        assert torch.allclose(cam, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_conv5_is_what_the_last_pool_gets(oxford, slices):
    net = make(oxford)
    conv5 = net.conv5(slices)
    assert conv5.shape == (len(slices), 512, SIZE // 16, SIZE // 16)
    assert torch.equal(net.pool(conv5), net.maps(slices))


def test_normalised_maps_are_in_spreads_of_normal_slices(oxford, slices):
    net = make(oxford, 4)
    normal = net.conv5(torch.rand(8, 1, SIZE, SIZE)).detach()
    baseline = normal_cam(net, normal)
    assert baseline.shape == (2, 4, SIZE // 16, SIZE // 16)
    for output in range(4):
        logits, cam = normalised_cam(net, normal, np.full(8, output), baseline)
        assert torch.equal(logits, class_activation_map(net, normal)[0])
        assert cam.mean(0).abs().max() < 1e-4
        assert cam.std(0, correction=0).max() < 1  # the spread is raised by its mean over all positions
        assert cam.std(0, correction=0).mean() > 0.3
    assert not normalised_cam(net, normal[:1], np.zeros(1, int), normal_cam(net, normal[:1]))[1].any()


def test_each_slice_is_explained_by_its_own_output(oxford, slices):
    net = make(oxford, 4)
    conv5 = net.conv5(torch.cat([slices, slices])).detach()
    outputs = np.array([2, 0, 3, 2])
    for baseline in (None, normal_cam(net, conv5)):
        mixed = normalised_cam(net, conv5, outputs, baseline)[1]
        for i, output in enumerate(outputs):
            assert torch.allclose(mixed[i], normalised_cam(net, conv5, np.full(4, output), baseline)[1][i])
    assert torch.equal(normalised_cam(net, conv5, outputs, baseline, against=True)[1], -mixed)


def test_smoothing_is_scipys_gaussian():
    found = torch.rand(2, 14, 14)
    sigma = 14 * saliency.SMOOTHING
    smooth = gaussian_filter(found.numpy(), (0, sigma, sigma), mode="constant", truncate=14)
    expected = smooth - smooth.mean((1, 2), keepdims=True)
    assert np.abs(saliency._standing_out(found).numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("model", HEADS)
def test_works_on_frozen_convolutions_where_gradients_are_off(oxford, slices, mode, model):
    net = make(oxford, **model)
    expected = grad_cam(net, net.conv5(slices).detach())
    with mode():
        found = grad_cam(net, net.conv5(slices))
    for ours, theirs in zip(found, expected, strict=True):
        assert not ours.requires_grad
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("model", HEADS)
def test_what_speaks_for_normal_is_what_speaks_against_cancer(oxford, slices, model):
    net = make(oxford, **model)
    conv5 = net.conv5(slices).detach()
    normal = normalised_cam(net, conv5, np.zeros(2, int), None, against=True)[1]
    with torch.no_grad():
        net.head[-1].weight.neg_()
        net.head[-1].bias.neg_()
    assert torch.allclose(normal, class_activation_map(net, conv5)[1], atol=1e-4)


def test_heat_is_the_positive_part_over_its_maximum():
    found = saliency.heat(torch.tensor([[[-2.0, 1.0], [4.0, 0.0]], [[-1.0, -2.0], [0.0, -3.0]]]))
    assert found.tolist() == [[[0.0, 0.25], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]
    assert saliency.heat(torch.full((1, 2, 2), 1e-30)).max() == 1


def test_a_slice_in_which_nothing_speaks_for_the_output_has_no_heat(oxford, slices):
    net = make(oxford)
    with torch.no_grad():
        net.head[-1].weight.copy_(-net.head[-1].weight.abs())
    heat = grad_cam(net, net.conv5(slices).detach())[1]
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
