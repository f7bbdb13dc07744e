import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import VGG16_Weights

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


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "vgg16_imagenet1k_v1.safetensors"])
def test_a_file_of_the_same_tensors_gives_the_same_convolutions(tmp_path, name):
    tensors, oxford = load_file(PACKAGED), load_weights("oxford")
    save_file(tensors, tmp_path / name) if name.endswith("safetensors") else torch.save(tensors, tmp_path / name)
    loaded = load_weights(str(tmp_path / name))
    assert torch.equal(loaded.tensors["0.weight"], oxford.tensors["0.weight"])
    assert loaded.mean == ((0.485, 0.456, 0.406) if "imagenet1k" in name else oxford.mean)
    # A file with another mean is another network, whose features are in the cache.
    (tmp_path / name).rename(tmp_path / f"other-{name.replace('imagenet1k', '')}")
    renamed = load_weights(str(tmp_path / f"other-{name.replace('imagenet1k', '')}"))
    assert (renamed.digest != loaded.digest) == ("imagenet1k" in name)


@pytest.mark.parametrize(
    "name", ["gone.pth", "text.safetensors", "text.pth", "other.safetensors", "list.pth", "evil.pth", "raw.pth"]
)
def test_a_file_that_is_not_vgg16_is_one_clear_error_and_runs_nothing(tmp_path, name):
    path = tmp_path / name
    kind = path.stem
    if kind == "text":
        path.write_text("hello")
    elif kind == "other":
        save_file({"features.0.weight": torch.zeros(64, 1, 3, 3)}, path)
    elif kind == "raw":
        path.write_bytes(pickle.dumps({"features.0.weight": Trap()}))
    elif kind != "gone":
        torch.save([1, 2] if kind == "list" else {"features.0.weight": Trap()}, path)
    with pytest.raises(WeightsError, match=r"model\.weights=" + (".*could run code" if kind == "evil" else "")):
        load_weights(str(path))


def test_a_hub_out_of_reach_is_said_with_the_way_out(monkeypatch):
    def unreachable(self, *_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(VGG16_Weights, "get_state_dict", unreachable)
    with pytest.raises(WeightsError, match=r"cannot be reached.*model\.weights=oxford"):
        load_weights("imagenet1k_v1")


def test_a_backbone_without_features_is_refused_with_those_that_have_them():
    for name in ("resnet18", "vgg17"):
        with pytest.raises(ConfigError, match=rf"model\.backbone={name}.*mobilenet"):
            weights.convolutions(name)
    with pytest.raises(WeightsError, match=r"are VGG16's.*imagenet1k_v1"):
        load_weights("oxford", "vgg11")
