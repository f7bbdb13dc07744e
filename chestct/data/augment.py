"""Views: one slice, changed a little at random by torchvision, the same way every time.

What happens to a slice in view v depends on the seed, v and the slice's content alone, not on batch, order or process;
so cached features, resumed runs and several machines all see the same views. View 0 is the slice as it is.

On a processor torchvision changes slice by slice (`make_views`). An accelerator would wait for Python there: it gets
the numbers that torchvision draws (`draw_changes`) and changes whole batches (`change_batch`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from chestct.config.schema import AugmentConfig
from chestct.files import digest

Batch = dict[str, Any]


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
            torch.default_generator.manual_seed(_seed(seed, view, content))  # torch.manual_seed takes much longer
            image = tv_tensors.Image(images[i])
            if masks is None:
                out[i] = change(image)
            else:
                out[i], masks[i] = change(image, tv_tensors.Mask(masks[i]))
    return out


def _seed(seed: int, view: int, content: str) -> int:
    return number_of(f"{seed}/{view}/{content}") >> 1  # generators take 63 bits


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
        steps.append(Blur(_blur_size(cfg, side), (1e-3, cfg.blur * side)))
    if cfg.window:
        steps.append(v2.ColorJitter(brightness=cfg.window, contrast=cfg.window))
    if cfg.gamma:
        steps.append(Intensity("gamma", functional.adjust_gamma, lambda: math.exp(_uniform(-cfg.gamma, cfg.gamma))))
    if cfg.noise:
        steps.append(Intensity("sigma", functional.gaussian_noise, lambda: _uniform(0, cfg.noise)))
    return v2.Compose(steps or [v2.Identity()])


def _blur_size(cfg: AugmentConfig, side: int) -> int:
    return 2 * min(math.ceil(3 * cfg.blur * side), side - 1) + 1


class Blur(v2.GaussianBlur):
    """torchvision's along rows, then columns: up to rounding the same, three to eight times as quick; masks stay."""

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        across, down = self.kernel_size
        for size in () if isinstance(inpt, tv_tensors.Mask) else ([across, 1], [1, down]):
            inpt = functional.gaussian_blur(inpt, size, **params)
        return inpt


class Intensity(v2.Transform):
    """A change of grey levels by one number that is drawn for each slice; masks stay."""

    def __init__(self, name: str, change: Callable[..., torch.Tensor], draw: Callable[[], float]) -> None:
        super().__init__()
        self.name, self.change, self.draw = name, change, draw

    def make_params(self, flat_inputs: list[Any]) -> dict[str, float]:
        return {self.name: self.draw()}

    def transform(self, inpt: torch.Tensor, params: dict[str, float]) -> torch.Tensor:
        return inpt if isinstance(inpt, tv_tensors.Mask) else self.change(inpt, **params)


NEUTRAL = {"changed": 0.0, "flip": 0.0, "a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0, "e": 1.0, "f": 0.0, "blur": 1e-3}
NEUTRAL |= {"brightness": 1.0, "contrast": 1.0, "contrast_first": 0.0, "gamma": 1.0, "noise": 0.0}
"""What changes nothing: the columns of `draw_changes`; a to f are the rows of a matrix as `affine_grid` takes it."""


def draw_changes(
    contents: Sequence[str], views: Sequence[int], seed: int, cfg: AugmentConfig, side: int
) -> tuple[torch.Tensor, list[int]]:
    """What `make_views` would draw for each slice and view: float32 [B, len(NEUTRAL)], and the seeds of their noise."""
    steps, image = transforms(cfg, side).transforms, [tv_tensors.Image(torch.empty(1, side, side))]
    seeds = [_seed(seed, view, content) for view, content in zip(views, contents, strict=True)]
    rows = []
    with torch.random.fork_rng(devices=[]):
        for view, number in zip(views, seeds, strict=True):
            torch.default_generator.manual_seed(number)
            row = NEUTRAL | {"changed": float(view > 0)}
            for step in steps if view else ():
                row |= _drawn(step, image, side)
            rows.append(list(row.values()))
    return torch.tensor(rows), seeds


def _drawn(step: v2.Transform, image: list[torch.Tensor], side: int) -> dict[str, float]:
    if isinstance(step, v2.RandomHorizontalFlip):
        return {"flip": float(torch.rand(1) < step.p)}
    drawn = step.make_params(image)
    if isinstance(step, v2.RandomAffine):
        return _origin(side, **drawn)
    if isinstance(step, v2.GaussianBlur):
        return {"blur": drawn["sigma"][0]}
    if isinstance(step, v2.ColorJitter):
        order = drawn["fn_idx"].tolist()
        values = {name: drawn[f"{name}_factor"] for name in ("brightness", "contrast")}
        return values | {"contrast_first": float(order.index(1) < order.index(0))}
    return {"noise": drawn["sigma"]} if "sigma" in drawn else drawn


def _origin(
    side: int, angle: float, translate: Sequence[float], scale: float, shear: Sequence[float]
) -> dict[str, float]:
    """Where the places of a moved slice come from: the inverse of torchvision's rotation, zoom, shear and shift."""
    turn, sx, sy = (math.radians(degrees) for degrees in (angle, *shear))
    a, c = (wave(turn - sy) / math.cos(sy) / scale for wave in (math.cos, math.sin))
    b, d = -a * math.tan(sx) - math.sin(turn) / scale, math.cos(turn) / scale - c * math.tan(sx)
    x, y = (2 * shift / side for shift in translate)
    return {"a": d, "b": -b, "c": b * y - d * x, "d": -c, "e": a, "f": c * x - a * y}


def change_batch(images: torch.Tensor, changes: torch.Tensor, seeds: Sequence[int], cfg: AugmentConfig) -> torch.Tensor:
    """The views of `make_views`, up to rounding, computed for all slices at once and where they lie.

    images: float32 [B, 1, S, S] in [0, 1]; changes, seeds: of `draw_changes`. Only the noise has other numbers: it is
    drawn where the slices lie, by the same seeds, with the same spread.
    """
    number = dict(zip(NEUTRAL, changes[:, :, None, None, None].unbind(1), strict=True))  # (B, 1, 1, 1) each
    x = torch.where(number["flip"] > 0, images.flip(3), images)
    if cfg.rotate or cfg.shift or cfg.zoom or cfg.shear:
        grid = nn.functional.affine_grid(changes[:, 2:8].reshape(-1, 2, 3), list(x.shape), align_corners=False)
        both = nn.functional.grid_sample(torch.cat([x, torch.ones_like(x)], 1), grid, align_corners=False)
        x = both[:, :1] * both[:, 1:]  # the second: how much of a place lies inside
    if cfg.blur:
        reach = _blur_size(cfg, x.shape[-1]) // 2
        places = torch.linspace(-reach, reach, 2 * reach + 1, device=x.device) / math.sqrt(2)
        kernels = (places / number["blur"][:, 0]).square().neg().softmax(2).unsqueeze(1)  # (B, 1, 1, K)
        for kernel, edges in ((kernels, (reach, reach, 0, 0)), (kernels.mT, (0, 0, reach, reach))):
            padded = nn.functional.pad(x.transpose(0, 1), edges, mode="reflect")  # (1, B, ...): each slice is a group
            x = nn.functional.conv2d(padded, kernel, groups=len(x)).transpose(0, 1)
    if cfg.window:
        x = torch.where(
            number["contrast_first"] > 0, _bright(_contrast(x, number), number), _contrast(_bright(x, number), number)
        )
    if cfg.gamma:
        x = x.pow(number["gamma"])
    if cfg.noise:
        drawn, generator = torch.empty_like(x), torch.Generator(x.device)
        for one, seed in zip(drawn, seeds, strict=True):
            one.normal_(generator=generator.manual_seed(seed))
        x = (x + number["noise"] * drawn).clamp(0, 1)
    return torch.where(number["changed"] > 0, x, images)


def defers(device: torch.device) -> bool:
    """Whether this device makes views itself, in whole batches. On a processor that would only cost."""
    return device.type != "cpu"


def finish(batch: Batch, cfg: AugmentConfig, slices: torch.Tensor | None = None) -> Batch:
    """A batch with `x` float32 [B, 1, S, S], where the device is to make it; another batch as it is.

    batch: `x`, squares uint8 [B, S, S], or `row`, their places in `slices`, uint8 [N, S, S] on the device; and, where
    views are wanted, `changes` and `noise` of `draw_changes`.
    """
    x = slices[batch["row"]] if slices is not None and "row" in batch else batch["x"]
    if x.dtype != torch.uint8:
        return batch
    x = x.unsqueeze(1).float() / 255
    if "changes" in batch:
        x = change_batch(x, batch["changes"], batch["noise"], cfg)
    return {name: part for name, part in batch.items() if name not in ("row", "changes", "noise")} | {"x": x}


def _bright(x: torch.Tensor, number: dict[str, torch.Tensor]) -> torch.Tensor:
    return (x * number["brightness"]).clamp(0, 1)


def _contrast(x: torch.Tensor, number: dict[str, torch.Tensor]) -> torch.Tensor:
    return (x * number["contrast"] + (1 - number["contrast"]) * x.mean((1, 2, 3), keepdim=True)).clamp(0, 1)


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(1).uniform_(low, high))
