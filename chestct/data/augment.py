"""Views: one slice, changed a little at random by torchvision, the same way every time.

What happens to a slice in view v depends on the seed, v and the slice's content alone, not on batch, order or process;
so cached features, resumed runs and several machines all see the same views. View 0 is the slice as it is.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from chestct.config.schema import AugmentConfig
from chestct.files import digest


def make_views(
    images: torch.Tensor, contents: Sequence[str], views: Sequence[int], seed: int, cfg: AugmentConfig
) -> torch.Tensor:
    """View `views[i]` of each slice.

    images: float32 [B, 1, S, S] in [0, 1]; contents: the hash of each. Returns the same shape and range; what moves in
    from outside is black.
    """
    if not any(views):
        return images
    change = transforms(cfg, images.shape[-1])
    out = images.clone()
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        for i, view in enumerate(views):
            if view:
                torch.manual_seed(int(digest(f"{seed}/{view}/{contents[i]}")[:16], 16) >> 1)  # it takes 63 bits
                out[i] = change(images[i])
    return out


def transforms(cfg: AugmentConfig, side: int) -> v2.Compose:
    """The changes of one slice, float32 [1, side, side] in [0, 1], in their order; those set to zero are left out."""
    steps: list[v2.Transform] = []
    if cfg.flip:
        steps.append(v2.RandomHorizontalFlip(cfg.flip))
    if cfg.rotate or cfg.shift or cfg.zoom or cfg.shear:
        zoom = (1 - cfg.zoom, 1 + cfg.zoom)
        bilinear = InterpolationMode.BILINEAR
        steps.append(v2.RandomAffine(cfg.rotate, (cfg.shift, cfg.shift), zoom, cfg.shear, interpolation=bilinear))
    if cfg.blur:
        width = cfg.blur * side
        steps.append(v2.GaussianBlur(2 * min(math.ceil(3 * width), side - 1) + 1, (1e-3, width)))
    if cfg.window:
        steps.append(v2.ColorJitter(brightness=cfg.window, contrast=cfg.window))
    if cfg.gamma:
        steps.append(RandomStrength(lambda x, log: functional.adjust_gamma(x, math.exp(log)), -cfg.gamma, cfg.gamma))
    if cfg.noise:
        steps.append(RandomStrength(lambda x, sigma: functional.gaussian_noise(x, sigma=sigma), 0, cfg.noise))
    return v2.Compose(steps or [v2.Identity()])


class RandomStrength(v2.Transform):
    """`change` of a slice with a strength that is drawn uniformly from [low, high]."""

    def __init__(self, change: Callable[[torch.Tensor, float], torch.Tensor], low: float, high: float) -> None:
        super().__init__()
        self.change, self.low, self.high = change, low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"strength": float(torch.empty(1).uniform_(self.low, self.high))}

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        return self.change(inpt, params["strength"])
