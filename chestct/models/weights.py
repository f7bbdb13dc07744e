"""Where VGG16's convolutions come from. Each source knows the mean and scale that its weights were trained with.

Only safetensors and `weights_only=True` are ever loaded, and a packaged file is checked against its hash before use.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file

from chestct.errors import WeightsError

PACKAGED = Path(__file__).with_name("vgg16_features.fp16.safetensors")
PACKAGED_SHA256 = "608705a5e8e9a7d5d75e2eb4a72185943564b134fca29f49123ae440f73775ed"

OXFORD_MEAN, OXFORD_SCALE = (0.48235, 0.45882, 0.40784), (255.0, 255.0, 255.0)
TORCHVISION_MEAN, TORCHVISION_SCALE = (0.485, 0.456, 0.406), (1 / 0.229, 1 / 0.224, 1 / 0.225)


@dataclass(frozen=True)
class Weights:
    """Convolutions and the input they expect: (x - mean) * scale for RGB x in [0, 1]."""

    name: str
    tensors: Mapping[str, torch.Tensor] | None  # `{i}.weight|bias` as in torchvision's vgg16().features; None: random
    mean: tuple[float, float, float]
    scale: tuple[float, float, float]
    digest: str  # identity of the tensors


def load_weights(name: str) -> Weights:
    """oxford (packaged), imagenet1k_v1 (torchvision's hub), none (random), or a file (safetensors, or a state dict).

    A file is taken to expect the same input as `oxford` unless its name contains `imagenet1k`, as torchvision's do.
    Raises WeightsError for a file that is missing, altered, unsafe or not VGG16's, and for a hub out of reach.
    """
    if name == "none":
        return Weights(name, None, OXFORD_MEAN, OXFORD_SCALE, "none")
    if name == "oxford":
        return Weights(name, _convolutions(_packaged(), name), OXFORD_MEAN, OXFORD_SCALE, PACKAGED_SHA256)
    if name == "imagenet1k_v1":
        tensors, digest = _torchvision()
    else:
        tensors, digest = _file(Path(name))
    torchvision_input = "imagenet1k" in Path(name).name.lower()
    mean, scale = (TORCHVISION_MEAN, TORCHVISION_SCALE) if torchvision_input else (OXFORD_MEAN, OXFORD_SCALE)
    return Weights(name, _convolutions(tensors, name), mean, scale, digest)


def _packaged() -> dict[str, torch.Tensor]:
    try:
        raw = PACKAGED.read_bytes()
    except FileNotFoundError:
        raise WeightsError(f"The packaged weights {PACKAGED} are missing. Install chestct again.") from None
    if hashlib.sha256(raw).hexdigest() != PACKAGED_SHA256:
        raise WeightsError(f"The packaged weights {PACKAGED} were altered (wrong SHA-256). Install chestct again.")
    return load(raw)


def _torchvision() -> tuple[dict[str, torch.Tensor], str]:
    from torchvision.models import VGG16_Weights

    try:
        tensors = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"model.weights=imagenet1k_v1 is downloaded from torchvision's hub, which cannot be reached ({error}). "
            "Use model.weights=oxford, which is in the package, or a file."
        ) from None
    return dict(tensors), VGG16_Weights.IMAGENET1K_V1.url.rsplit("-", 1)[-1]


def _file(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    if not path.is_file():
        raise WeightsError(
            f"model.weights={path}: no such file. Give oxford (in the package), imagenet1k_v1 (downloaded), none "
            "(random), or the path of a safetensors file or state dict."
        )
    try:
        if path.suffix == ".safetensors":
            tensors: Any = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(f"model.weights={path} cannot be read: {str(error).splitlines()[0]}") from None
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise WeightsError(
            f"model.weights={path} holds more than tensors, and unpickling it could run code. Save it again as "
            "safetensors, or as a plain state dict."
        ) from None
    if not isinstance(tensors, Mapping):
        raise WeightsError(f"model.weights={path} holds a {type(tensors).__name__}, not a state dict.")
    return dict(tensors), hashlib.sha256(path.read_bytes()).hexdigest()


def _convolutions(tensors: Mapping[str, Any], name: str) -> dict[str, torch.Tensor]:
    """The 13 convolutions as float32, keyed `{i}.weight|bias`; raises WeightsError where one does not fit."""
    from chestct.models.vgg16 import convolution_shapes

    found = {}
    for key, shape in convolution_shapes().items():
        tensor = tensors.get(f"features.{key}")
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
            what = "missing" if tensor is None else f"shaped {tuple(getattr(tensor, 'shape', ()))} instead of {shape}"
            raise WeightsError(f"model.weights={name} are not VGG16's convolutions: features.{key} is {what}.")
        found[key] = tensor.float()
    return found
