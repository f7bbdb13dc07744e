"""Where the convolutions and their weights come from: torchvision's networks, the file in the package, or one's own.

Each source knows the mean and scale that its weights were trained with. Only safetensors and `weights_only=True` are
ever loaded, and the packaged file is checked against its hash before use.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import nn

from chestct.errors import ConfigError, WeightsError, out_of_memory
from chestct.files import digest, file_digest

PACKAGED = Path(__file__).with_name("vgg16_features.fp16.safetensors")
PACKAGED_SHA256 = "608705a5e8e9a7d5d75e2eb4a72185943564b134fca29f49123ae440f73775ed"

Three = tuple[float, float, float]

OXFORD: tuple[Three, Three] = (0.48235, 0.45882, 0.40784), (255.0, 255.0, 255.0)
"""Mean and scale."""

OF_TORCHVISION = re.compile("imagenet1k|397923af")
"""In the name or the digest of a file of torchvision's VGG16; it puts the first digits of the one into the other."""

BACKBONES = ("alexnet", "convnext_*", "densenet*", "efficientnet_*", "mobilenet_*", "squeezenet*", "vgg*")
"""Torchvision's networks with `features`, 2-D convolutions that give maps [B, C, h, w]; Swin's are [B, h, w, C]."""


@dataclass(frozen=True)
class Weights:
    """Convolutions and the input they expect: (x - mean) * scale for RGB x in [0, 1]."""

    tensors: Mapping[str, torch.Tensor] | None  # `{i}.weight|bias` as in torchvision's vgg16().features; None: random
    mean: Three
    scale: Three
    digest: str  # identity of the tensors, and of a file with its mean and scale


VGG16_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and number of the convolutions in each block of VGG16; a max pool of stride 2 ends it."""


def convolutions(backbone: str = "vgg16", device: str = "meta") -> nn.Sequential:
    """`features` of a network of torchvision's; on the meta device they have shapes without numbers.

    Raises ConfigError where it is none of BACKBONES.
    """
    if (backbone, device) == ("vgg16", "meta"):
        with torch.device(device):
            return _vgg16()
    from torchvision.models import get_model, list_models

    if backbone not in list_models(include=BACKBONES):
        raise ConfigError(
            f"model.backbone={backbone} is no network of torchvision's that can be used. Those are "
            f"{', '.join(BACKBONES)}."
        )
    with torch.device(device):
        return cast(nn.Sequential, get_model(backbone, weights=None).features)


def _vgg16() -> nn.Sequential:
    """`features` of torchvision's vgg16, whose import would double the time until a service answers."""
    layers: list[nn.Module] = []
    channels = 3
    for width, count in VGG16_BLOCKS:
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


def load_weights(name: str, backbone: str = "vgg16") -> Weights:
    """oxford (packaged), imagenet1k_v1 (torchvision's hub), none (random), or a file (safetensors, or a state dict).

    A file of VGG16's is taken to expect the same input as `oxford` unless it is torchvision's, see OF_TORCHVISION, and
    one of another network as torchvision's; a line says so. Raises ConfigError for an unknown network, and WeightsError
    for a file that is missing, altered, unsafe or of another network, and for a hub out of reach.
    """
    if backbone != "vgg16":
        convolutions(backbone)  # raises ConfigError
    if name == "none":
        mean, scale = OXFORD if backbone == "vgg16" else _input(backbone)
        return Weights(None, mean, scale, "none")
    if name == "oxford":
        if backbone != "vgg16":
            raise WeightsError(
                f"model.weights=oxford are VGG16's. For model.backbone={backbone} give model.weights=imagenet1k_v1 "
                "(downloaded) or a file of torchvision's."
            )
        raw = PACKAGED.read_bytes() if PACKAGED.is_file() else b""
        if digest(raw) != PACKAGED_SHA256:
            raise WeightsError(f"The packaged weights {PACKAGED} are missing or altered. Install chestct again.")
        tensors, identity = load(raw), PACKAGED_SHA256
    elif name == "imagenet1k_v1":
        tensors, identity = _torchvision(backbone)
    else:
        tensors, identity = _file(Path(name))
    torchvisions = backbone != "vgg16" or OF_TORCHVISION.search(f"{identity[:8]} {Path(name).name.lower()}")
    mean, scale = _input(backbone) if torchvisions else OXFORD
    if name == "imagenet1k_v1" and backbone != "vgg16":
        identity = digest(f"{identity} {mean} {scale}")  # earlier versions gave all of them VGG16's
    if name not in ("oxford", "imagenet1k_v1"):
        identity = digest(f"{identity} {mean} {scale}")  # the file's name decides about them
        numbers = " and scale ".join(", ".join(f"{x:g}" for x in three) for three in (mean, scale))
        like = (
            "torchvision's do" if torchvisions else "oxford does; imagenet1k in its name would say: as torchvision's do"
        )
        _say(f"model.weights={name}: taken to expect mean {numbers}, as {like}.")
    return Weights(_checked(tensors, name, backbone), mean, scale, identity)


def _input(backbone: str) -> tuple[Three, Three]:
    """Mean and scale of torchvision's weights of a network."""
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(backbone)
    expected = weights.IMAGENET1K_V1.transforms()
    return cast(Three, tuple(expected.mean)), cast(Three, tuple(1 / std for std in expected.std))


@cache
def _say(text: str) -> None:
    """Prints it once, though a run loads its weights for training and again for its report."""
    print(text)


def _torchvision(backbone: str) -> tuple[dict[str, torch.Tensor], str]:
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(backbone)
    try:
        tensors = weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"model.weights=imagenet1k_v1 is downloaded from torchvision's hub, which cannot be reached ({error}). "
            f"Use {'model.weights=oxford, which is in the package, or ' if backbone == 'vgg16' else ''}a file."
        ) from None
    return dict(tensors), weights.IMAGENET1K_V1.url.rsplit("-", 1)[-1]


def _file(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    if not path.is_file():
        raise WeightsError(
            f"model.weights={path}: no such file. Give oxford (in the package), imagenet1k_v1 (downloaded), none "
            "(random), or the path of a safetensors file or state dict."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path), file_digest(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True)), file_digest(path)
    except pickle.UnpicklingError as error:
        reason = "it is no file of torch's, but perhaps a pointer of git-lfs or a web page. Fetch it again"
        if "unsupported global" in str(error).lower():
            reason = "it holds more than tensors, and unpickling it could run code. Save it as safetensors"
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        if out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
    raise WeightsError(f"model.weights={path} cannot be read: {reason}.")


def _checked(tensors: Mapping[str, Any], name: str, backbone: str) -> dict[str, torch.Tensor]:
    """The tensors of the convolutions, in float32; raises WeightsError where one is missing or misshapen."""
    checked = {}
    for key, wanted in convolutions(backbone).state_dict().items():
        tensor = tensors.get(f"features.{key}")
        if not isinstance(tensor, torch.Tensor) or tensor.shape != wanted.shape:
            raise WeightsError(
                f"model.weights={name} are not the weights of {backbone}: features.{key} is missing or not shaped "
                f"{list(wanted.shape)}."
            )
        checked[key] = tensor.to(wanted.dtype)
    return checked
