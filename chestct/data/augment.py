"""Views: one slice, changed a little at random, the same way every time it is asked for.

What happens to a slice in view v depends on the seed, v and the slice's content alone, not on batch, order or process;
so cached features, resumed runs and several machines all see the same views. View 0 is the slice as it is.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from chestct.config.schema import AugmentConfig


def make_views(
    images: torch.Tensor, contents: Sequence[str], views: Sequence[int], seed: int, cfg: AugmentConfig
) -> torch.Tensor:
    """View `views[i]` of each slice.

    images: float32 [B, 1, S, S] in [0, 1]; contents: the hash of each. Returns the same shape and range; what moves in
    from outside is black.
    """
    changed = [i for i, view in enumerate(views) if view]
    if not changed:
        return images
    noise = torch.zeros(len(changed), *images.shape[1:])
    draws = torch.zeros(len(changed), 11)
    for row, i in enumerate(changed):
        generator = torch.Generator().manual_seed(_seed(seed, views[i], contents[i]))
        draws[row, :10] = torch.rand(10, generator=generator)
        if cfg.noise:
            noise[row].normal_(generator=generator)
        if cfg.blur:
            draws[row, 10:] = torch.rand(1, generator=generator)
    out = images.clone()
    moved = _blur(_move(images[changed], draws[:, :6], cfg), draws[:, 10], cfg)
    out[changed] = _regray(moved, draws[:, 6:10], noise, cfg)
    return out


def _seed(seed: int, view: int, content: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{view}/{content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # manual_seed takes 63 bits and the sign


def _move(x: torch.Tensor, u: torch.Tensor, cfg: AugmentConfig) -> torch.Tensor:
    """Flip, rotation, shift, zoom and shear in one interpolation. u: uniform draws [B, 6] in [0, 1)."""
    if not any((cfg.flip, cfg.rotate, cfg.shift, cfg.zoom, cfg.shear)):
        return x
    signed = 2 * u - 1
    angle = signed[:, 0] * math.radians(cfg.rotate)
    shear = torch.tan(signed[:, 1] * math.radians(cfg.shear))
    zoom = 1 + signed[:, 2] * cfg.zoom
    mirror = torch.where(u[:, 3] < cfg.flip, -1.0, 1.0)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    # From output to input coordinates, both in [-1, 1]: rotate and zoom, shear along x, mirror x, shift.
    theta = torch.stack(
        [
            torch.stack([mirror * (cos + shear * sin), mirror * (shear * cos - sin), 2 * cfg.shift * signed[:, 4]], 1),
            torch.stack([sin, cos, 2 * cfg.shift * signed[:, 5]], 1),
        ],
        1,
    )  # (B, 2, 3)
    grid = functional.affine_grid(theta, list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _blur(x: torch.Tensor, u: torch.Tensor, cfg: AugmentConfig) -> torch.Tensor:
    """Each slice blurred by a Gaussian of its own width. u: uniform draws [B] in [0, 1)."""
    if not cfg.blur:
        return x
    side = x.shape[-1]
    offset = torch.arange(side)[:, None] - torch.arange(side)
    sigma = (cfg.blur * side * u).clamp(min=1e-3)[:, None, None]
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)  # (B, S, S)
    kernel = (kernel / kernel.sum(2, keepdim=True))[:, None]
    return kernel @ x @ kernel.mT


def _regray(x: torch.Tensor, u: torch.Tensor, noise: torch.Tensor, cfg: AugmentConfig) -> torch.Tensor:
    """Another display window, another gamma, noise. u: uniform draws [B, 4] in [0, 1); noise: standard normal."""
    contrast, level, gamma = ((2 * u[:, i] - 1)[:, None, None, None] for i in range(3))
    x = (x - 0.5) * (1 + cfg.window * contrast) + 0.5 + cfg.window / 2 * level
    x = x.clamp(0, 1) ** torch.exp(cfg.gamma * gamma)
    return (x + cfg.noise * u[:, 3][:, None, None, None] * noise).clamp(0, 1)
