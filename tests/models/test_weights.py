import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from chestct.errors import WeightsError
from chestct.models import weights
from chestct.models.weights import PACKAGED, load_weights


def test_packaged_weights_are_the_released_ones():
    loaded = load_weights("oxford").tensors
    # Values printed for the released MatConvNet file, see WEIGHTS.md; float16 keeps three digits.
    assert loaded["0.weight"].shape == (64, 3, 3, 3)
    assert loaded["0.bias"][0].item() == pytest.approx(0.73429835, rel=1e-3)
    assert loaded["28.bias"][0].item() == pytest.approx(0.18837857, rel=1e-3)
    assert len(loaded) == 26
    assert all(tensor.dtype == torch.float32 for tensor in loaded.values())


def test_altered_packaged_weights_are_refused(tmp_path, monkeypatch):
    altered = bytearray(PACKAGED.read_bytes())
    altered[-1] ^= 1
    (tmp_path / "w.safetensors").write_bytes(altered)
    monkeypatch.setattr(weights, "PACKAGED", tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="altered"):
        load_weights("oxford")


def test_missing_packaged_weights_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "PACKAGED", tmp_path / "gone")
    with pytest.raises(WeightsError, match="missing"):
        load_weights("oxford")


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_file_of_the_same_tensors_gives_the_same_convolutions(tmp_path, kind):
    path = tmp_path / f"w.{kind}"
    tensors = load_file(PACKAGED)
    save_file(tensors, path) if kind == "safetensors" else torch.save(tensors, path)
    loaded = load_weights(str(path))
    assert torch.equal(loaded.tensors["0.weight"], load_weights("oxford").tensors["0.weight"])
    assert loaded.mean == load_weights("oxford").mean


def test_a_torchvision_file_gets_torchvisions_mean_and_scale(tmp_path):
    save_file(load_file(PACKAGED), tmp_path / "vgg16_imagenet1k_v1.safetensors")
    weights = load_weights(str(tmp_path / "vgg16_imagenet1k_v1.safetensors"))
    assert weights.mean == (0.485, 0.456, 0.406)
    # so that a renamed file is not taken for the same network, whose features are in the cache
    (tmp_path / "vgg16_imagenet1k_v1.safetensors").rename(tmp_path / "other.safetensors")
    assert load_weights(str(tmp_path / "other.safetensors")).digest != weights.digest


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"features.0.weight": Evil()}))
    with pytest.raises(WeightsError):
        load_weights(str(tmp_path / "evil.pth"))
    torch.save({"features.0.weight": Evil()}, tmp_path / "evil2.pth")
    with pytest.raises(WeightsError, match="could run code"):
        load_weights(str(tmp_path / "evil2.pth"))


@pytest.mark.parametrize("name", ["gone.safetensors", "text.safetensors", "text.pth", "other.safetensors", "list.pth"])
def test_a_file_that_is_not_vgg16_is_one_clear_error(tmp_path, name):
    path = tmp_path / name
    if name.startswith("text"):
        path.write_text("hello")
    elif name.startswith("other"):
        save_file({"features.0.weight": torch.zeros(64, 1, 3, 3)}, path)
    elif name.startswith("list"):
        torch.save([1, 2], path)
    with pytest.raises(WeightsError, match=r"model\.weights="):
        load_weights(str(path))


def test_a_hub_out_of_reach_is_said_with_the_way_out(monkeypatch):
    from torchvision.models import VGG16_Weights

    def unreachable(self, *_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(VGG16_Weights, "get_state_dict", unreachable)
    with pytest.raises(WeightsError, match=r"cannot be reached.*model\.weights=oxford"):
        load_weights("imagenet1k_v1")
