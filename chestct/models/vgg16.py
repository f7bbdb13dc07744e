"""torchvision's VGG16 convolutions with a small head, as a plain network: grey slices in, logits out.

The input contract is one channel in [0, 1]; the three channels, mean and scale that the weights expect are made here,
so that no caller can get them wrong. The last map of the convolutions is all that the head sees, which makes frozen
features and class activation maps exact and cheap. `model.backbone` puts other convolutions of torchvision's in their
place, `model.head` another head.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from chestct.config.schema import ModelConfig
from chestct.errors import ConfigError
from chestct.models.head import Standardise, make_head
from chestct.models.weights import VGG16_BLOCKS, Weights, convolutions


class VGG16(nn.Module):
    """Logits [B, outputs] for slices float [B, 1, S, S] in [0, 1]; one output is the logit of cancer."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, cfg: ModelConfig, outputs: int, size: int, weights: Weights) -> None:
        super().__init__()
        self.size = size
        self.digest = weights.digest  # of the convolutions as they were given; training changes the network, not this
        self.blocks = sorted({int(block) for block in cfg.block.split("+")})
        self.block = self.blocks[-1]
        layers = convolutions(cfg.backbone).eval()
        if self.blocks != [5]:
            layers = layers[: self._block_ends(layers)[self.block]]
        if cfg.backbone == "vgg16":  # a pass on the meta device imports torch's compiler: a third of a start
            self.channels, grid = sum(VGG16_BLOCKS[block - 1][0] for block in self.blocks), [size >> self.block] * 2
        else:
            self.channels, *grid = self._joined(layers, torch.empty(1, 3, size, size, device="meta")).shape[1:]
        self.grid: tuple[int, int] = (grid[0], grid[1])  # of the maps that the head gets
        if weights.tensors is None:
            layers = convolutions(cfg.backbone, "cpu").eval()[: len(layers)]
        else:
            layers.load_state_dict({key: weights.tensors[key] for key in layers.state_dict()}, assign=True)
        # 1.5 to 2 times as fast as NCHW on CPUs, and faster on GPUs with tensor cores.
        self.features = layers.to(memory_format=torch.channels_last)
        self.pools_last = len(self.blocks) == 1 and isinstance(layers[-1], nn.MaxPool2d)
        places = {"flatten": math.prod(self.grid), "mean_max_std": 3}.get(cfg.pool, 1)
        self.head = make_head(cfg, self.channels * places, outputs, self.grid)
        # Buffers, so that they move with the network; not saved, as they belong to the weights.
        for name, values in (("mean", weights.mean), ("scale", weights.scale)):
            self.register_buffer(name, torch.tensor(values, device="cpu").view(1, 3, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float [B, 1, S, S] in [0, 1]. Returns logits [B, outputs]."""
        return self.answer(x)[0]

    def answer(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and `conv5`, from which explanation and novelty come, for x as in `forward`."""
        conv5 = self.conv5(x)
        return self.head(self.pool(conv5)), conv5

    def maps(self, x: torch.Tensor) -> torch.Tensor:
        """What the head gets: the last map of the convolutions, [B, 512, S // 32, S // 32], for x as in `forward`.

        With model.block=4 it is twice as fine, with 3 four times (and has 256 channels). That holds for `conv5` too.
        Of several blocks, as in model.block=3+4, the maps lie on the grid of the last, one after another.
        """
        return self.pool(self.conv5(x))

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """What is cached while convolutions are frozen, for x as in `forward`, see `pooled_map`."""
        return self.pooled_map(self.conv5(x))

    def pooled_map(self, conv5: torch.Tensor) -> torch.Tensor:
        """From `conv5` to `maps` after the head's own pooling, float32 [B, D].

        With model.pool=topk nothing is pooled before the head: float16 [B, C, h, w].
        """
        pooled = self.head[0](self.pool(conv5))
        return pooled.float() if pooled.ndim == 2 else pooled.half()

    def conv5(self, x: torch.Tensor) -> torch.Tensor:
        """What the last max pool gets, [B, 512, S // 16, S // 16], for x as in `forward`.

        Heat maps are made from it, as in Selvaraju et al. 2017: lesions are smaller than a place of the pooled maps.
        Convolutions that do not end with a pool give their last map, and several blocks what the head gets.
        """
        if x.ndim != 4 or x.shape[1] != 1 or x.shape[2:] != (self.size, self.size):
            raise ValueError(f"expected slices [B, 1, {self.size}, {self.size}], got {list(x.shape)}")
        x = ((x - self.mean) * self.scale).contiguous(memory_format=torch.channels_last)  # (B, 3, S, S)
        return self.features[:-1](x) if self.pools_last else self._joined(self.features, x)

    def pool(self, conv5: torch.Tensor) -> torch.Tensor:
        """From `conv5` to `maps`, [B, C, h, w] both."""
        return self.features[-1](conv5) if self.pools_last else conv5

    def _joined(self, layers: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        """The maps of all `blocks` [B, C, h, w] on the grid of the last; finer ones are averaged."""
        if len(self.blocks) == 1:
            return layers(x)
        ends = [self._block_ends(layers)[block] for block in self.blocks]
        maps = []
        for start, end in zip([0, *ends], ends, strict=False):
            x = layers[start:end](x)
            maps.append(x)
        side = x.shape[2]
        for i, finer in enumerate(maps[:-1]):
            step, rest = divmod(finer.shape[2], side)
            # Adaptive, which OpenVINO computes slowly, only where blocks of places do not fit.
            maps[i] = functional.adaptive_avg_pool2d(finer, side) if rest else functional.avg_pool2d(finer, step)
        return torch.cat(maps, 1)

    def channel_means(self, features: torch.Tensor) -> torch.Tensor:
        """Mean-pooled features [N, C] from what the head gets: maps [N, C, h, w], or as `pooled` gives them."""
        parts = features.reshape(len(features), self.channels, -1)
        return parts[..., 0] if features.ndim == 2 and self.head[0].pool in ("max", "mean_max_std") else parts.mean(2)

    def fit_standardise(self, maps: Iterable[torch.Tensor], w: torch.Tensor | None) -> None:
        """Fixes how a head that judges places standardises, by the maps of train and what each slice counts [N]."""
        for layer in self.head:
            if isinstance(layer, Standardise) and layer.places:
                layer.fit(maps, w)

    def batches(self, images: np.ndarray, size: int = 16, rows: np.ndarray | None = None) -> Iterator[torch.Tensor]:
        """Squares uint8 [N, S, S], or float in [0, 1], as `forward` takes them, some at a time and on its device.

        rows: int [M], which of them; only a batch at a time is read of images that are mapped.
        """
        for at in range(0, len(images if rows is None else rows), size):
            chosen = slice(at, at + size)
            # A copy: the store is mapped read-only.
            part = torch.tensor(images[chosen if rows is None else rows[chosen]], device=self.mean.device).unsqueeze(1)
            yield part.float() / 255 if part.dtype == torch.uint8 else part.float()

    def first_trainable(self, freeze: bool | int) -> int:
        """Index in `features` of the first layer that trains, for `model.freeze`: true, false, or blocks of VGG's.

        Raises ConfigError where blocks are counted in convolutions that have none.
        """
        if isinstance(freeze, bool):
            return len(self.features) if freeze else 0
        return self._block_ends(self.features)[max(0, min(freeze, self.block))]

    def _block_ends(self, layers: nn.Sequential) -> list[int]:
        """How many layers there are up to the end of 0, 1, ... blocks."""
        ends = [0, *(i + 1 for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d))]
        if len(ends) <= self.block or len(ends) > 6:
            raise ConfigError(
                "model.block below 5, model.freeze=1 to 5 and trainer.unfreeze_epoch count VGG16's five blocks, which "
                "this model.backbone does not have. Give model.freeze=true or false, and leave the others out."
            )
        return ends

    def set_frozen(self, freeze: bool | int) -> None:
        """Fixes all convolutions (true), none (false), or the given number of blocks from the input."""
        first = self.first_trainable(freeze)
        for i, layer in enumerate(self.features):
            layer.requires_grad_(i >= first)
        self.train(self.training)

    def train(self, mode: bool = True) -> "VGG16":
        """As nn.Module.train; frozen convolutions stay as they are, statistics of a batch norm included."""
        super().train(mode)
        for layer in self.features:
            layer.train(mode and any(p.requires_grad for p in layer.parameters()))
        return self

    @property
    def frozen(self) -> bool:
        """Whether no convolution can change, so that features may be computed once."""
        return not any(p.requires_grad for p in self.features.parameters())


def pick_device(accelerator: str = "auto") -> torch.device:
    """What a network computes on outside of training, which Lightning decides: this machine's accelerator or the CPU.

    accelerator: of `trainer.accelerator`. Raises ConfigError where this machine does not have what is named.
    """
    device = None if accelerator == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    if accelerator not in ("auto", "cpu", "gpu" if device else "", device.type if device else ""):
        raise ConfigError(
            f"accelerator={accelerator}: this machine has {device.type if device else 'none that torch can use'}. "
            "Leave it out, or give auto or cpu."
        )
    return device or torch.device("cpu")
