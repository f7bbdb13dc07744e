"""VGG16's convolutions with a small head, as a plain network: grey slices in, logits out.

The input contract is one channel in [0, 1]; the three channels, mean and scale that the weights expect are made here,
so that no caller can get them wrong. The last map of the convolutions is all that the head sees, which makes frozen
features and class activation maps exact and cheap.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from chestct.config.schema import ModelConfig
from chestct.models.weights import Weights
from chestct.ranks import place

CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the convolutions in each block: configuration D of Simonyan and Zisserman 2014, table 1."""

BLOCK_STARTS = (0, 5, 10, 17, 24)
"""Index in `features` at which each of the five blocks begins; each ends with a 2 x 2 max pool."""


def convolution_layers() -> nn.Sequential:
    """The same modules under the same keys as `torchvision.models.vgg16().features` (a test compares them).

    Built here because importing torchvision takes longer than everything else that serving does at start-up.
    """
    layers: list[nn.Module] = []
    width = 3
    for block in CHANNELS:
        for channels in block:
            layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU(inplace=True)]
            width = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def convolution_shapes() -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the convolutions, keyed as in a state dict."""
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in convolution_layers().state_dict().items()}


class VGG16(nn.Module):
    """Logits [B, outputs] for slices float [B, 1, S, S] in [0, 1]; one output is the logit of cancer."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, cfg: ModelConfig, outputs: int, size: int, weights: Weights) -> None:
        super().__init__()
        self.size = size
        self.digest = weights.digest  # of the convolutions as they were given; training changes the network, not this
        self.features = _filled(weights)
        self.head = _head(cfg, outputs, size)
        # Buffers, so that they move with the network; not saved, as they belong to the weights.
        self.register_buffer("mean", torch.tensor(weights.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(weights.scale).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float [B, 1, S, S] in [0, 1]. Returns logits [B, outputs]."""
        return self.head(self.maps(x))

    def maps(self, x: torch.Tensor) -> torch.Tensor:
        """The last map of the convolutions, [B, 512, S // 32, S // 32], for x as in `forward`."""
        return self.features[-1](self.fine_maps(x))

    def fine_maps(self, x: torch.Tensor) -> torch.Tensor:
        """What the last max pool gets, [B, 512, S // 16, S // 16], for x as in `forward`.

        Heat maps are made from it, as in Selvaraju et al. 2017: lesions are smaller than a place of the pooled maps.
        """
        if x.ndim != 4 or x.shape[1] != 1 or x.shape[2:] != (self.size, self.size):
            raise ValueError(f"expected slices [B, 1, {self.size}, {self.size}], got {list(x.shape)}")
        x = (x - self.mean) * self.scale  # (B, 3, S, S)
        return self.features[:-1](x.contiguous(memory_format=torch.channels_last))

    def batches(self, images: np.ndarray, size: int = 16) -> Iterator[torch.Tensor]:
        """Squares uint8 [N, S, S], or float in [0, 1], as `forward` takes them, some at a time and on its device."""
        for at in range(0, len(images), size):
            # A copy: the store is mapped read-only.
            part = torch.tensor(images[at : at + size], device=self.mean.device).unsqueeze(1)
            yield part.float() / 255 if part.dtype == torch.uint8 else part.float()

    def set_frozen(self, freeze: bool | int) -> None:
        """Fixes all convolutions (true), none (false), or the given number of blocks from the input."""
        blocks = {True: 5, False: 0}[freeze] if isinstance(freeze, bool) else freeze
        first_trainable = BLOCK_STARTS[blocks] if blocks < 5 else len(self.features)
        for i, layer in enumerate(self.features):
            layer.requires_grad_(i >= first_trainable)

    def pack(self) -> None:
        """Brings the convolutions into the order that the processor computes in; no training or saving afterwards.

        Same bits, and for a single slice half the time. Does nothing where torch comes without oneDNN.
        """
        if torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
            side, layers = self.size, []
            for layer in self.features:
                side //= 2 if isinstance(layer, nn.MaxPool2d) else 1
                layers.append(PackedConvolution(layer, side) if isinstance(layer, nn.Conv2d) else layer)
            self.features = nn.Sequential(*(nn.Identity() if isinstance(layer, nn.ReLU) else layer for layer in layers))

    @property
    def frozen(self) -> bool:
        """Whether no convolution can change, so that features may be computed once."""
        return not any(p.requires_grad for p in self.features.parameters())


ONE = (1, 1)
"""Padding, stride and dilation of every convolution."""


class PackedConvolution(nn.Module):
    """A convolution of VGG16 with its ReLU, for float32 on a CPU: `layer`, whose input is `side` pixels wide.

    Eager torch reorders the weights in every call, which for one slice takes as long as the convolution itself. These
    are the operators that torch.compile emits, without its minute of compiling.
    """

    def __init__(self, layer: nn.Conv2d, side: int) -> None:
        super().__init__()
        dense, shape = layer.weight.detach().contiguous().to_mkldnn(), [1, layer.in_channels, side, side]
        self.weight = torch.ops.aten.mkldnn_reorder_conv2d_weight(dense, ONE, ONE, ONE, 1, shape)
        self.bias = layer.bias.detach() if layer.bias is not None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fused = torch.ops.mkldnn._convolution_pointwise
        convolved: torch.Tensor = fused(x, self.weight, self.bias, ONE, ONE, ONE, 1, "relu", [], "")
        return convolved


def _filled(weights: Weights) -> nn.Sequential:
    if weights.tensors is None:
        layers = convolution_layers()
        for layer in layers:
            if isinstance(layer, nn.Conv2d):  # as torchvision's vgg16 does without weights
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    else:
        with torch.device("meta"):  # random numbers that are thrown away cost a second
            layers = convolution_layers()
        layers.load_state_dict(dict(weights.tensors), assign=True)
    # 1.5 to 2 times as fast as NCHW on CPUs, and faster on GPUs with tensor cores.
    return layers.to(memory_format=torch.channels_last)


def _head(cfg: ModelConfig, outputs: int, size: int) -> nn.Sequential:
    """Pooling, then linear layers with ReLU and dropout between them."""
    width = feature_width(cfg.pool, size)
    layers: list[nn.Module] = [Pool(cfg.pool)]
    for out in cfg.hidden:
        layers += [Dropout(cfg.dropout), nn.Linear(width, out), nn.ReLU()]
        width = out
    layers += [Dropout(cfg.dropout), nn.Linear(width, outputs)]
    return nn.Sequential(*layers)


class Dropout(nn.Dropout):
    """Draws for the batch of all processes and takes this one's share, so that several drop what one would drop."""

    batch: int | None = None
    """Slices of the batch of all processes; None: those that come are all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.p:
            return x
        kept = torch.empty(self.batch or len(x), *x.shape[1:], device=x.device).bernoulli_(1 - self.p)
        return x * kept[place().rank :: place().size] / (1 - self.p)


class Pool(nn.Module):
    """[B, 512, h, w] -> [B, 512] (gap) or [B, 512 * h * w] (flatten); what is pooled already passes through."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if maps.ndim == 2:
            return maps
        return maps.mean((2, 3)) if self.pool == "gap" else maps.flatten(1)


def feature_width(pool: str, size: int) -> int:
    """How many numbers the head gets from one slice."""
    return 512 if pool == "gap" else 512 * (size // 32) ** 2


def count_parameters(parameters: Sequence[nn.Parameter]) -> tuple[int, int]:
    """(trainable, all) numbers in these parameters."""
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
