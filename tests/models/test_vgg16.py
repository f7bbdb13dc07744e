import pytest
import torch
from torchvision.models import vgg16

from chestct.config.schema import ModelConfig
from chestct.errors import ConfigError
from chestct.models.head import make_head
from chestct.models.vgg16 import VGG16
from chestct.models.weights import PACKAGED, load_weights
from tests.conftest import network


def test_convolutions_are_torchvisions():
    from safetensors.torch import load_file

    reference = vgg16().eval()
    reference.load_state_dict({k: v.float() for k, v in load_file(PACKAGED).items()}, strict=False)
    x = torch.rand(2, 1, 64, 64)
    rgb = (x.expand(-1, 3, -1, -1) - torch.tensor(load_weights("oxford").mean).view(1, 3, 1, 1)) * 255
    with torch.no_grad():
        ours, theirs = network().maps(x), reference.features(rgb)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3 * theirs.abs().max().item())


@pytest.mark.parametrize(
    ("pool", "width"), [("gap", 512), ("max", 512 * 2), ("flatten", 512 * 4), ("mean_max_std", 512 * 3)]
)
@pytest.mark.parametrize("hidden", [[], [16, 8]])
@pytest.mark.parametrize("outputs", [1, 4])
@torch.no_grad()
def test_head_gives_one_logit_an_output_of_maps_or_of_pooled_features(pool, width, hidden, outputs):
    net, x = network(pool=pool, hidden=hidden, outputs=outputs), torch.rand(3, 1, 64, 64)
    torch.nn.init.constant_(net.head[-1].bias, 900.0)
    pooled, (logits, conv5) = net.pooled(x), net.answer(x)
    assert pooled.shape == (3, width)
    assert logits.shape == (3, outputs)
    assert logits.min() > 1  # not scores
    torch.testing.assert_close(net.head(pooled), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.channel_means(pooled), net.channel_means(net.pool(conv5)))


@torch.no_grad()
def test_maximum_and_spread_of_several_blocks_stand_next_to_the_mean():
    net = network(pool="mean_max_std", block="3+4")
    maps = net.maps(torch.rand(2, 1, 64, 64))
    parts = net.head[0](maps).reshape(2, 256 + 512, 3)
    torch.testing.assert_close(parts[..., 0], maps.mean((2, 3)))
    torch.testing.assert_close(parts[..., 1], maps.amax((2, 3)))
    torch.testing.assert_close(parts[..., 2], maps.std((2, 3), correction=0), atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_a_head_on_maxima_sees_nothing_else():
    net = network(pool="max")
    maps = net.maps(torch.rand(2, 1, 64, 64))
    linear = torch.nn.Linear(512, 1)
    linear.load_state_dict(net.head[-1].state_dict())
    torch.testing.assert_close(net.head(maps), linear(maps.amax((2, 3))))


@pytest.mark.parametrize(("freeze", "trainable"), [(True, 0), (False, 26), (3, 12), (5, 0)])
def test_freeze_fixes_blocks_from_the_input(freeze, trainable):
    net = network()
    net.set_frozen(freeze)
    open_ = [name for name, p in net.features.named_parameters() if p.requires_grad]
    assert len(open_) == trainable
    assert net.frozen == (trainable == 0)
    if trainable:
        assert open_[-1] == "28.bias"


def test_a_wrong_shape_is_named():
    for shape in ((1, 3, 64, 64), (1, 1, 32, 64), (1, 64, 64), (1, 1, 224, 224)):
        with pytest.raises(ValueError, match=r"expected slices \[B, 1, 64, 64\]"):
            network()(torch.rand(shape))


def test_other_convolutions_of_torchvision_take_the_place_of_vgg16():
    torch.manual_seed(0)
    cfg = ModelConfig(backbone="mobilenet_v3_small", weights="none")
    net = VGG16(cfg, 1, 64, load_weights("none", cfg.backbone))
    net.set_frozen(True)
    net.train()
    before = {key: value.clone() for key, value in net.features.state_dict().items()}
    assert net(torch.rand(2, 1, 64, 64)).shape == (2, 1)
    assert net.head[-1].in_features == 576
    # frozen means that the running means of batch norms stay, too
    assert all(torch.equal(before[key], value) for key, value in net.features.state_dict().items())
    with pytest.raises(ConfigError, match="true or false"):
        net.set_frozen(3)


@pytest.mark.parametrize("pool", ["gap", "topk"])
def test_a_head_of_ones_own_that_does_not_fit_is_refused_with_the_shapes(pool):
    def made(name, **given):
        return make_head(ModelConfig(pool=pool, head={"_target_": f"torch.nn.{name}", **given}), 8, 3, (2, 2))

    with pytest.raises(ConfigError, match=r"Flatten: of features \[2, 8.* to make logits \[2, 3\], but it gives \[2, "):
        made("Flatten")
    with pytest.raises(ConfigError, match=r"Linear: .*, but it raises RuntimeError: mat1 and mat2"):
        made("Linear", in_features=9)
    layers = [{"_target_": "torch.nn.Flatten"}, {"_target_": "torch.nn.LazyLinear", "out_features": 3}]
    assert made("Sequential", _args_=layers).training
