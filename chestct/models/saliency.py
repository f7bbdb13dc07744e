"""Where the network looked: Grad-CAM from the last convolution's maps, and its picture over the whole slice.

These maps are all that the head sees, so the gradient runs through the head alone: it works on frozen convolutions,
under `no_grad`, and costs next to nothing beside the forward pass. What comes out first is *evidence*, signed and in
the unit of the logit; heat is its positive part, scaled for the eye, and no longer tells how much evidence there was.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from chestct.data.preprocess import Preprocess, body_box
from chestct.models.vgg16 import VGG16

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels; right and bottom lie outside."""


def grad_cam(
    net: VGG16,
    maps: torch.Tensor,
    output: int = 0,
    against: bool = False,
    baseline: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, K] and the heat float32 [B, h, w] in [0, 1] for one output, both detached (see `evidence`, `heat`).

    maps: float [B, 512, h, w] from `net.fine_maps`, or from `net.maps` at half the resolution; against: what speaks
    against the output instead (with one output, 0 is cancer and `against` is normal, whose logit is the negative);
    baseline: from `mean_evidence` of normal training slices, then heat is what exceeds a normal slice at that place.
    """
    logits, found = evidence(net, maps, output)
    if baseline is not None:
        found = found - baseline[output]
    return logits, heat(-found if against else found)


def evidence(net: VGG16, maps: torch.Tensor, output: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, K] and how each place of the maps moves logits[:, output], float32 [B, h, w], signed; both detached.

    Selvaraju et al. 2017, eq. 1 and 2 without the ReLU. For a linear head on mean-pooled maps this is the class
    activation map of Zhou et al. 2016, and on `net.maps` the evidence of all places sums to the logit less the head's
    bias. Nothing positive in it: nothing here speaks for the output. maps as in `grad_cam`; net in eval mode.
    """
    linear = _single_linear(net)
    if linear is None:
        return evidence_by_gradient(net, maps, output)
    maps = maps.detach()
    pooled = _pooled(net, maps)
    logits = functional.linear(pooled.mean((2, 3)), linear.weight, linear.bias).detach()
    weights = linear.weight[output].detach().expand(len(maps), -1)
    return logits, _weighted(maps, weights)


def evidence_by_gradient(net: VGG16, maps: torch.Tensor, output: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """As `evidence`, for any head: a channel weighs as much as the mean of its gradient over all places."""
    # Callers are usually under no_grad or inference_mode; a clone made out here can be differentiated all the same.
    with torch.inference_mode(False), torch.enable_grad():
        maps = maps.detach().clone()
        pooled = _pooled(net, maps).requires_grad_()
        logits = net.head(pooled)
        (gradient,) = torch.autograd.grad(logits[:, output].sum(), pooled)
    # A max pool hands each gradient to one place of its window, so their sum is that of the finer maps as well.
    return logits.detach(), _weighted(maps, gradient.sum((2, 3)))


def mean_evidence(net: VGG16, maps: torch.Tensor) -> torch.Tensor:
    """Mean evidence of each output over slices, float32 [K, h, w]; of normal training slices, it is `baseline`.

    Which share of the logit belongs to which place is open by a constant: a spine may count as evidence in every slice
    and the bias take it back. On the default phantoms, 32 normal slices as baseline raise the pointing game from 0.67
    to 0.86 (36 validation slices) and from 0.56 to 0.77 (48 test slices). For a linear head, the difference is the
    Shapley value of each place (Lundberg and Lee 2017, linear SHAP).
    """
    outputs = evidence(net, maps[:1])[0].shape[1]
    return torch.stack([evidence(net, maps, output)[1].mean(0) for output in range(outputs)])


def explained_output(logits: np.ndarray) -> np.ndarray:
    """The output whose evidence is shown, int [N]: cancer, or of several classes the likeliest kind of cancer."""
    return np.zeros(len(logits), int) if logits.shape[1] == 1 else 1 + logits[:, 1:].argmax(1)


def heat_maps(net: VGG16, maps: torch.Tensor, outputs: np.ndarray, baseline: torch.Tensor) -> np.ndarray:
    """Heat float32 [B, h, w] in [0, 1] of each slice's own output: where it exceeds what normal slices have there.

    maps: from `net.fine_maps`; outputs: int [B]; baseline: `mean_evidence` of normal training slices.
    """
    found = torch.stack([evidence(net, maps, k)[1] - baseline[k] for k in range(len(baseline))])
    return heat(found[torch.from_numpy(outputs), torch.arange(len(outputs))]).numpy()


def heat(evidence: torch.Tensor) -> torch.Tensor:
    """Positive evidence [B, h, w], each map divided by its own maximum: in [0, 1], all zeros where nothing speaks."""
    positive = evidence.clamp(min=0)
    peak = positive.amax((1, 2), keepdim=True)
    return positive / torch.where(peak > 0, peak, 1.0)


def _pooled(net: VGG16, maps: torch.Tensor) -> torch.Tensor:
    """What the head sees of maps from either side of the last max pool."""
    return functional.max_pool2d(maps, 2) if maps.shape[-1] > net.size // 32 else maps


def _weighted(maps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over channels of maps [B, C, h, w] by weights [B, C], divided by the number of places."""
    places = maps.shape[2] * maps.shape[3]
    return (torch.einsum("bk,bkhw->bhw", weights, maps) / places).float()


def _single_linear(net: VGG16) -> nn.Linear | None:
    """The head's linear layer where mean pooling and that layer are all there is (dropout does nothing in eval)."""
    layers = [layer for layer in net.head if not isinstance(layer, nn.Dropout)]
    pooled = getattr(layers[0], "pool", "") == "gap"
    return layers[1] if pooled and len(layers) == 2 and isinstance(layers[1], nn.Linear) else None


@dataclass(frozen=True)
class Placement:
    """Where a slice lies in the network's square: `source` of the slice was scaled to `target` of the square."""

    size: int
    source: Box
    target: Box


def placement(gray: np.ndarray, preprocess: Preprocess) -> Placement:
    """Where `preprocess` puts a slice, uint8 [H, W]."""
    height, width = gray.shape
    size = preprocess.size
    source = body_box(gray) if preprocess.fit == "body" else (0, 0, width, height)
    if preprocess.fit == "stretch":
        return Placement(size, source, (0, 0, size, size))
    sides = source[2] - source[0], source[3] - source[1]
    wide, high = (max(1, round(side * size / max(sides))) for side in sides)
    left, top = (size - wide) // 2, (size - high) // 2
    return Placement(size, source, (left, top, left + wide, top + high))


def mask_to_square(mask: np.ndarray, place: Placement) -> np.ndarray:
    """A mask of the slice, bool [H, W], as it lies in the network's square, bool [size, size]."""
    left, top, right, bottom = place.target
    part = Image.fromarray(mask.astype(np.uint8) * 255).crop(place.source)
    small = np.asarray(part.resize((right - left, bottom - top), Image.Resampling.BILINEAR))
    square = np.zeros((place.size, place.size), bool)
    square[top:bottom, left:right] = small >= 128
    return square


def heat_to_square(heat: torch.Tensor, size: int) -> torch.Tensor:
    """Heat [B, h, w] at the network's resolution, [B, size, size], bilinear."""
    return functional.interpolate(heat[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]


def heat_to_slice(heat: torch.Tensor, shape: tuple[int, int], place: Placement) -> np.ndarray:
    """Heat [h, w] over the network's square as float32 [H, W] over the slice; zero where the square does not reach."""
    height, width = shape
    (left, top, right, bottom), target = place.source, place.target

    def positions(pixels: int, begin: int, end: int, target_begin: int, target_end: int) -> torch.Tensor:
        # Centres of the slice's pixels in the square, from -1 at its one edge to 1 at the other.
        inside = (torch.arange(pixels) + 0.5 - begin) / (end - begin)
        return (target_begin + inside * (target_end - target_begin)) / place.size * 2 - 1

    y = positions(height, top, bottom, target[1], target[3])
    x = positions(width, left, right, target[0], target[2])
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (H, W, 2)
    full = functional.grid_sample(heat[None, None].float(), grid[None], padding_mode="border", align_corners=False)
    seen = np.zeros(shape, np.float32)
    seen[top:bottom, left:right] = full[0, 0, top:bottom, left:right].numpy()
    return seen


ANCHORS = np.array(
    [(13, 8, 135), (76, 2, 161), (126, 3, 168), (170, 35, 149), (204, 71, 120), (230, 108, 92), (248, 149, 64),
     (253, 197, 39), (240, 249, 33)]
)  # fmt: skip
"""Matplotlib's `plasma` at nine even steps: perceptually even, safe for the colour-blind, and nowhere grey."""


def colors(values: np.ndarray) -> np.ndarray:
    """uint8 RGB [..., 3] for values [...] in [0, 1]; dark blue, purple, orange, yellow."""
    steps = np.linspace(0, 1, len(ANCHORS))
    channels = [np.interp(values, steps, ANCHORS[:, i]) for i in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def overlay(gray: np.ndarray, heat: torch.Tensor, place: Placement, opacity: float = 0.6) -> np.ndarray:
    """The slice with its heat, uint8 RGB [H, W, 3] at full resolution.

    gray: uint8 [H, W]; heat: float [h, w] in [0, 1] over the network's square; place: from `placement`; opacity: of the
    hottest place. Opacity falls with the heat, so that where nothing speaks the slice is shown as it is.
    """
    return blend(gray, heat_to_slice(heat, (gray.shape[0], gray.shape[1]), place), opacity)


def blend(gray: np.ndarray, heat: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """As `overlay`, for heat float32 [H, W] in [0, 1] that lies over the slice already."""
    share = (opacity * heat)[..., None]
    return (gray[..., None] * (1 - share) + colors(heat) * share + 0.5).astype(np.uint8)
