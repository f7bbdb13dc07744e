import copy

import numpy as np
import pytest
import torch

from chestct.imaging.preprocess import Preprocess, mask_to_square, placement
from chestct.models import saliency
from chestct.models.saliency import blend, class_activation_map, heat, normal_cam, normalised_cam
from tests.conftest import network

SIZE = 64


@pytest.mark.parametrize(
    ("outputs", "output", "model"),
    [
        (1, 0, {"dropout": 0.5}),
        (4, 2, {}),
        (4, 3, {"pool": "flatten"}),
        (1, 0, {"hidden": [16]}),
        (4, 1, {"pool": "flatten", "hidden": [16, 8]}),
    ],
)
def test_maps_are_those_of_the_grad_cam_package_where_gradients_are_off(outputs, output, model):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    net, slices = network(outputs, **model), torch.rand(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    open_copy = copy.deepcopy(net)
    open_copy.set_frozen(False)

    class Raw(GradCAM):
        def get_cam_image(self, *args, **kwargs):
            self.raw = super().get_cam_image(*args, **kwargs)
            return self.raw

    with Raw(open_copy, [open_copy.features[-2]]) as theirs:  # the ReLU whose output is conv5
        picture = theirs(slices, [ClassifierOutputTarget(output)] * len(slices))
        raw = torch.tensor(theirs.raw)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            logits, cam = class_activation_map(net, net.conv5(slices), output)
            assert torch.allclose(logits, net(slices), rtol=1e-4, atol=1e-4)
        assert not cam.requires_grad
        assert (cam - raw).abs().max() <= 1e-4 * raw.abs().max()
    # The package also subtracts a map's minimum, which ours keeps: low heat everywhere is not no heat.
    ours = scale_cam_image(scale_cam_image(heat(cam).numpy(), (SIZE, SIZE)))
    assert np.abs(ours - picture).max() < 1e-4
    assert all(p.grad is None for p in net.parameters())


def test_normalised_maps_are_spreads_above_normal_slices_and_each_has_its_own_output():
    net = network(4)
    conv5 = net.conv5(torch.rand(4, 1, SIZE, SIZE)).detach()
    outputs = np.array([0, 1, 1, 3])
    baseline = normal_cam(net, conv5)
    assert baseline.shape == (2, 4, SIZE // 16, SIZE // 16)
    mixed = normalised_cam(net, conv5, outputs, baseline)[1]
    for i, output in enumerate(outputs):
        own = normalised_cam(net, conv5, np.full(4, output), baseline)[1]
        assert torch.allclose(mixed[i], own[i], atol=1e-5)
        assert own.mean(0).abs().max() < 1e-4  # of the slices that the baseline was made of
        assert own.std(0).max() < 1.5
    plain = normalised_cam(net, conv5, outputs, None)[1]
    assert torch.allclose(plain[3], class_activation_map(net, conv5, 3)[1][3])


def test_heat_is_the_positive_part_over_its_maximum():
    maps = heat(torch.tensor([[[-2.0, 1.0], [4.0, 0.0]], [[-1.0, -2.0], [0.0, -3.0]]]))
    assert maps.tolist() == [[[0.0, 0.25], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize("fit", ["pad", "stretch", "body"])
@pytest.mark.parametrize(
    ("shape", "place"), [((200, 300), (0.2, 0.3)), ((300, 200), (0.7, 0.6)), ((97, 256), (0.2, 0.3))]
)
def test_slices_masks_and_heat_land_on_the_same_pixels(fit, shape, place):
    row, column = int(shape[0] * place[0]), int(shape[1] * place[1])
    gray = np.full(shape, 10, np.uint8)
    gray[15:-20, 10:-5] = 40  # a body that is not centred
    gray[row - 12 : row + 13, column - 12 : column + 13] = 255
    mask = gray == 255
    preprocess = Preprocess(SIZE, fit)
    where = placement(gray, preprocess)
    square = preprocess(gray)
    left, top, right, bottom = where.target
    outside = square.copy()
    outside[top:bottom, left:right] = 0
    assert not outside.any()
    assert ((square > 147) == mask_to_square(mask, where)).mean() > 0.997
    back = saliency.heat_to_slice((torch.tensor(square) > 147).float(), shape, where)
    rows, columns = np.nonzero(back > 0.5)
    pixel = max(shape) / SIZE
    assert abs(rows.mean() - row) < pixel / 2
    assert abs(columns.mean() - column) < pixel / 2


def test_blending_shows_the_slice_where_there_is_no_heat_and_colour_at_full_heat():
    gray = np.random.default_rng(0).integers(0, 256, (90, 130), dtype=np.uint8)
    assert (blend(gray, np.zeros(gray.shape, np.float32)) == gray[..., None]).all()
    assert (blend(gray, np.ones(gray.shape, np.float32), opacity=1.0) == saliency.ANCHORS[-1]).all()
