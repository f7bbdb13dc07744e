"""Where the network looked: Grad-CAM from the last convolution's maps, and its picture over the whole slice.

These maps are all that the head sees, so the gradient runs through the head alone: it works on frozen convolutions,
under `no_grad`, and costs next to nothing beside the forward pass. What comes out first is *evidence*, signed and in
the unit of the logit; *excess* is how far it lies above what normal slices show there; heat is the positive part of
that, scaled for the eye, and no longer tells how much there was.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from chestct.imaging.preprocess import Preprocess, body_box
from chestct.models.vgg16 import VGG16

SMOOTHING = 1 / 9
"""Standard deviation of the smoothing as a share of the side; a lesion and its surroundings take about a fifth."""

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels; right and bottom lie outside."""


def evidence(net: VGG16, maps: torch.Tensor, output: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, K] and how each place of the maps moves logits[:, output], float32 [B, h, w], signed; both detached.

    Selvaraju et al. 2017, eq. 1 and 2 without the ReLU. For a linear head on mean-pooled maps this is the class
    activation map of Zhou et al. 2016, and on `net.maps` the evidence of all places sums to the logit less the head's
    bias. maps: float [B, 512, h, w] from `net.fine_maps`, or from `net.maps` at half the resolution; net in eval mode.
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


def normal_evidence(net: VGG16, maps: torch.Tensor) -> torch.Tensor:
    """What normal training slices show as evidence, the `baseline` of `excess`: float32 [2, K, h, w], mean and spread.

    maps: from `net.fine_maps` of those slices. Spreads are averaged over neighbouring places, since some dozen slices
    tell them badly, and raised by their mean over all: where hardly anything ever varies, a trifle would be many.
    """
    outputs = evidence(net, maps[:1])[0].shape[1]
    found = torch.stack([_standing_out(evidence(net, maps, output)[1]) for output in range(outputs)])
    spread = functional.avg_pool2d(found.std(1, correction=0), 3, 1, padding=1, count_include_pad=False)
    scale = spread + spread.mean((1, 2), keepdim=True)
    return torch.stack([found.mean(1), torch.where(scale > 0, scale, 1.0)])


def excess(
    net: VGG16, maps: torch.Tensor, outputs: np.ndarray, baseline: torch.Tensor | None, against: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, K], and how far the evidence for each slice's own output exceeds that of normal slices, [B, h, w].

    In spreads of normal slices at that place, signed; detached. Which share of the logit belongs to which place is open
    by a constant: a spine may count as evidence in every slice and the bias take it back; and along the body's edge,
    evidence differs much between slices that all are normal. Evidence is smoothed to the size of a lesion, and a
    slice's own mean is taken off, since what is everywhere is no place.

    On 760 default phantoms of other seeds than those of training, the hottest point lies within 15 pixels of the lesion
    in 0.86 (0.83 of the 48 test slices); in 0.75 without smoothing and spread, in 0.56 for Grad-CAM as it is.

    maps: from `net.fine_maps`; outputs: int [B]; baseline: from `normal_evidence`, None for the plain evidence;
    against: what speaks against the output instead (with one output, 0 is cancer and `against` is normal).
    """
    by_output = {int(k): evidence(net, maps, int(k)) for k in np.unique(outputs)}
    logits = next(iter(by_output.values()))[0]
    found = torch.stack([by_output[int(k)][1][i] for i, k in enumerate(outputs)])
    if baseline is not None:
        mean, spread = baseline.to(found.device)[:, torch.from_numpy(outputs)]
        found = (_standing_out(found) - mean) / spread
    return logits, -found if against else found


def _standing_out(found: torch.Tensor) -> torch.Tensor:
    """Evidence [B, h, w], smoothed by a Gaussian (zero outside the square), less each map's mean."""
    places = torch.arange(found.shape[-1], device=found.device)
    sigma = SMOOTHING * len(places)
    weights = torch.exp(-0.5 * ((places[:, None] - places) / sigma) ** 2)
    steps = torch.arange(-len(places), len(places) + 1)
    weights = weights / torch.exp(-0.5 * (steps / sigma) ** 2).sum().to(found.device)
    smooth = weights @ found @ weights
    return smooth - smooth.mean((1, 2), keepdim=True)


def explained_output(logits: np.ndarray) -> np.ndarray:
    """The output whose evidence is shown, int [N]: cancer, or of several classes the likeliest kind of cancer."""
    return np.zeros(len(logits), int) if logits.shape[1] == 1 else 1 + logits[:, 1:].argmax(1)


def heat(found: torch.Tensor) -> torch.Tensor:
    """The positive part of maps [B, h, w], each divided by its own maximum: in [0, 1], all zeros where nothing is."""
    positive = found.clamp(min=0)
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
    """Heat [B, h, w] at the network's resolution, [B, size, size], bicubic: peaks may lie between places."""
    full = functional.interpolate(heat[:, None], (size, size), mode="bicubic", align_corners=False)[:, 0]
    return full.clamp(0, 1)


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
    full = functional.grid_sample(heat[None, None].float(), grid[None], "bicubic", "border", align_corners=False)
    seen = np.zeros(shape, np.float32)
    seen[top:bottom, left:right] = full[0, 0, top:bottom, left:right].clamp(0, 1).numpy()
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
