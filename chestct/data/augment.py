"""Views: one slice, changed a little at random by torchvision, the same way every time.

What happens to a slice in view v depends on the seed, v and the slice's content alone, not on batch, order or process;
so cached features, resumed runs and several machines all see the same views. View 0 is the slice as it is.
"""

import math
from collections.abc import Sequence

import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from chestct.config.schema import AugmentConfig
from chestct.files import digest


def make_views(
    images: torch.Tensor,
    contents: Sequence[str],
    view: int,
    seed: int,
    cfg: AugmentConfig,
    masks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One view of each slice, float32 [B, 1, S, S] in [0, 1]; what moves in from outside is black.

    contents: the hash of each slice; masks: bool [B, 1, S, S], changed in place: turned and shifted with their slices.
    """
    if not view:
        return images
    change = transforms(cfg, images.shape[-1])
    out = images.clone()
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        for i, content in enumerate(contents):
            torch.manual_seed(number_of(f"{seed}/{view}/{content}") >> 1)  # it takes 63 bits
            image = tv_tensors.Image(images[i])
            if masks is None:
                out[i] = change(image)
            else:
                out[i], masks[i] = change(image, tv_tensors.Mask(masks[i]))
    return out


def number_of(text: str) -> int:
    """A number below 2**64 that the text decides."""
    return int(digest(text)[:16], 16)


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
        steps.append(
            v2.Lambda(lambda x: functional.adjust_gamma(x, math.exp(_uniform(-cfg.gamma, cfg.gamma))), tv_tensors.Image)
        )
    if cfg.noise:
        steps.append(v2.Lambda(lambda x: functional.gaussian_noise(x, sigma=_uniform(0, cfg.noise)), tv_tensors.Image))
    return v2.Compose(steps or [v2.Identity()])


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(1).uniform_(low, high))
