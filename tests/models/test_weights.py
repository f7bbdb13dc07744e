import pickle
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import VGG16_Weights, get_model_weights, list_models

from chestct.errors import ConfigError, WeightsError
from chestct.models import weights
from chestct.models.weights import PACKAGED, load_weights
from tests.conftest import Trap


def test_packaged_weights_are_the_released_ones():
    loaded = load_weights("oxford").tensors
    # Values printed for the released MatConvNet file, see WEIGHTS.md; float16 keeps three digits.
    assert loaded["0.weight"].shape == (64, 3, 3, 3)
    assert loaded["0.bias"][0].item() == pytest.approx(0.73429835, rel=1e-3)
    assert loaded["28.bias"][0].item() == pytest.approx(0.18837857, rel=1e-3)
    assert len(loaded) == 26
    assert all(tensor.dtype == torch.float32 for tensor in loaded.values())


def test_altered_packaged_weights_are_refused(tmp_path, monkeypatch):
    content = bytearray(PACKAGED.read_bytes())
    content[-1] ^= 1
    (tmp_path / "w.safetensors").write_bytes(content)
    monkeypatch.setattr(weights, "PACKAGED", tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="missing or altered"):
        load_weights("oxford")


THEIRS = VGG16_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]


@pytest.mark.parametrize(
    ("name", "theirs"), [("w.safetensors", False), ("w.pt", False), ("vgg16_imagenet1k.pt", True), (THEIRS, True)]
)
def test_a_file_of_the_same_tensors_gives_the_same_convolutions(tmp_path, name, theirs, capsys):
    tensors, oxford = load_file(PACKAGED), load_weights("oxford")
    save_file(tensors, tmp_path / name) if name.endswith("safetensors") else torch.save(tensors, tmp_path / name)
    loaded = load_weights(str(tmp_path / name))
    assert torch.equal(loaded.tensors["0.weight"], oxford.tensors["0.weight"])
    assert loaded.mean == ((0.485, 0.456, 0.406) if theirs else oxford.mean)
    assert loaded.scale == ((1 / 0.229, 1 / 0.224, 1 / 0.225) if theirs else oxford.scale)
    stated = "0.485, 0.456, 0.406 and scale 4.36681, " if theirs else "0.48235, 0.45882, 0.40784 and scale 255, "
    assert f"{name}: taken to expect mean {stated}" in capsys.readouterr().out
    # A file with another mean is another network, whose features are in the cache.
    other = (tmp_path / name).rename(tmp_path / f"other{Path(name).suffix}")
    assert (load_weights(str(other)).digest != loaded.digest) == theirs


def test_torchvision_s_file_is_known_under_any_name(tmp_path, monkeypatch):
    save_file(load_file(PACKAGED), tmp_path / "mine.safetensors")
    digest = f"{THEIRS.removesuffix('.pth').rsplit('-', 1)[-1]:0<64}"
    monkeypatch.setattr(weights, "file_digest", lambda path: digest)
    assert load_weights(str(tmp_path / "mine.safetensors")).mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    "name",
    ["gone.pth", "text.safetensors", "text.pth", "cut.pth", "other.safetensors", "list.pth", "evil.pth", "raw.pth"],
)
def test_a_file_that_is_not_vgg16_is_one_clear_error_and_runs_nothing(tmp_path, name):
    path = tmp_path / name
    kind = path.stem
    if kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif kind == "cut":
        path.write_bytes(b"PK\x03\x04" + bytes(100))
    elif kind == "other":
        save_file({"features.0.weight": torch.zeros(64, 1, 3, 3)}, path)
    elif kind == "raw":
        path.write_bytes(pickle.dumps({"features.0.weight": Trap()}))
    elif kind != "gone":
        torch.save([1, 2] if kind == "list" else {"features.0.weight": Trap()}, path)
    with pytest.raises(WeightsError, match=r"model\.weights=") as error:
        load_weights(str(path))
    assert ("could run code" in str(error.value)) == (kind == "evil")
    assert ("git-lfs" in str(error.value)) == (name in ("text.pth", "raw.pth"))


def test_a_hub_out_of_reach_is_said_with_the_way_out(monkeypatch):
    monkeypatch.setattr(VGG16_Weights, "get_state_dict", Mock(side_effect=OSError("Name or service not known")))
    with pytest.raises(WeightsError, match=r"cannot be reached.*model\.weights=oxford"):
        load_weights("imagenet1k_v1")


@pytest.mark.parametrize("name", ["resnet18", "vgg17", "swin_t", "swin_v2_t", "s3d", "VGG16"])
def test_a_backbone_that_gives_no_maps_is_refused_with_those_that_do(name):
    with pytest.raises(ConfigError, match=rf"model\.backbone={name}.*mobilenet"):
        load_weights("none", name)


def test_the_packaged_weights_are_vgg16_s_alone():
    with pytest.raises(WeightsError, match=r"are VGG16's.*imagenet1k_v1"):
        load_weights("oxford", "vgg11")


@pytest.mark.parametrize(
    "name", ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "mobilenet_v2", "squeezenet1_1", "vgg11_bn"]
)
def test_the_other_families_give_maps(name):
    maps = weights.convolutions(name).eval()(torch.empty(1, 3, 64, 64, device="meta"))
    assert maps.ndim == 4
    assert maps.shape[1] > 100 > 4 >= maps.shape[2] == maps.shape[3]


def test_other_networks_get_the_input_that_torchvision_trained_them_on():
    loaded = load_weights("none", "efficientnet_v2_l")
    assert (loaded.mean, loaded.scale) == ((0.5, 0.5, 0.5), (2, 2, 2))
    assert load_weights("none", "efficientnet_v2_s").mean == (0.485, 0.456, 0.406)
    assert all(hasattr(get_model_weights(name), "IMAGENET1K_V1") for name in list_models(include=weights.BACKBONES))
