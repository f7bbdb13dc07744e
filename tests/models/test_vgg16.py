import pytest
import torch
from torchvision.models import vgg16

from chestct.config.schema import ModelConfig
from chestct.errors import ConfigError, WeightsError
from chestct.models.vgg16 import VGG16, count_parameters
from chestct.models.weights import PACKAGED, load_weights


@pytest.fixture(scope="module")
def oxford():
    return load_weights("oxford")


def make(weights, size=64, outputs=1, **model):
    torch.manual_seed(0)
    return VGG16(ModelConfig(**model), outputs, size, weights).eval()


@pytest.mark.slow
def test_convolutions_are_torchvisions(oxford):
    from safetensors.torch import load_file

    reference = vgg16().eval()
    reference.load_state_dict({k: v.float() for k, v in load_file(PACKAGED).items()}, strict=False)
    x = torch.rand(2, 1, 64, 64)
    rgb = (x.expand(-1, 3, -1, -1) - torch.tensor(oxford.mean).view(1, 3, 1, 1)) * 255
    with torch.no_grad():
        ours, theirs = make(oxford).maps(x), reference.features(rgb)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3 * theirs.abs().max().item())


@pytest.mark.parametrize(("pool", "width"), [("gap", 512), ("flatten", 512 * 4)])
@pytest.mark.parametrize("hidden", [[], [16, 8]])
@pytest.mark.parametrize("outputs", [1, 4])
def test_head_gives_one_logit_an_output(oxford, pool, width, hidden, outputs):
    net = make(oxford, pool=pool, hidden=hidden, outputs=outputs)
    assert net(torch.rand(3, 1, 64, 64)).shape == (3, outputs)
    assert next(p for p in net.head.parameters()).shape[1] == width


def test_outputs_are_logits_not_scores(oxford):
    net = make(oxford)
    torch.nn.init.constant_(net.head[-1].bias, 30.0)
    assert net(torch.rand(2, 1, 64, 64)).min() > 1


def test_head_on_pooled_features_equals_head_on_maps(oxford):
    net = make(oxford, pool="flatten")
    maps = net.maps(torch.rand(2, 1, 64, 64))
    assert torch.equal(net.head(maps), net.head(net.head[0](maps)))


@pytest.mark.parametrize(("freeze", "trainable"), [(True, 0), (False, 26), (0, 26), (1, 22), (3, 12), (5, 0)])
def test_freeze_fixes_blocks_from_the_input(oxford, freeze, trainable):
    net = make(oxford)
    net.set_frozen(freeze)
    open_ = [name for name, p in net.features.named_parameters() if p.requires_grad]
    assert len(open_) == trainable
    assert net.frozen == (trainable == 0)
    if trainable:
        assert open_[-1] == "28.bias"


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 1, 32, 64), (1, 64, 64), (1, 1, 224, 224)])
def test_a_wrong_shape_is_named(oxford, shape):
    with pytest.raises(ValueError, match=r"expected slices \[B, 1, 64, 64\]"):
        make(oxford)(torch.rand(shape))


def test_random_weights_differ_by_seed_and_have_signal():
    none = load_weights("none")
    torch.manual_seed(0)
    one = VGG16(ModelConfig(), 1, 64, none)
    torch.manual_seed(1)
    two = VGG16(ModelConfig(), 1, 64, none)
    assert not torch.equal(one.features[0].weight, two.features[0].weight)
    assert one.maps(torch.rand(1, 1, 64, 64)).std() > 1e-3


def test_parameter_counts(oxford):
    net = make(oxford)
    net.set_frozen(True)
    assert count_parameters(list(net.parameters())) == (513, 513 + 14_714_688)  # table 2 of the paper, convolutions


@pytest.mark.parametrize(("backbone", "width"), [("mobilenet_v3_small", 576), ("densenet121", 1024), ("vgg11", 512)])
def test_other_convolutions_of_torchvision_take_the_place_of_vgg16(backbone, width):
    torch.manual_seed(0)
    net = VGG16(ModelConfig(backbone=backbone, weights="none"), 1, 64, load_weights("none", backbone))
    net.set_frozen(True)
    net.train()
    before = {key: value.clone() for key, value in net.features.state_dict().items()}
    x = torch.rand(2, 1, 64, 64)
    assert net(x).shape == (2, 1)
    assert net.maps(x).shape[1] == net.head[-1].in_features == width
    # frozen means that the running means of batch norms stay, too
    assert all(torch.equal(before[key], value) for key, value in net.features.state_dict().items())


def test_a_backbone_without_features_is_refused_with_those_that_have_them():
    for name in ("resnet18", "vgg17"):
        with pytest.raises(ConfigError, match=rf"model\.backbone={name}.*mobilenet"):
            load_weights("none", name).tensors or VGG16(ModelConfig(), 1, 64, load_weights("none", name))
    with pytest.raises(WeightsError, match=r"are VGG16's.*imagenet1k_v1"):
        load_weights("oxford", "vgg11")


def test_blocks_are_counted_in_vggs_alone():
    net = VGG16(ModelConfig(), 1, 64, load_weights("none", "mobilenet_v3_small"))
    with pytest.raises(ConfigError, match=r"model\.freeze=3.*true or false"):
        net.set_frozen(3)
