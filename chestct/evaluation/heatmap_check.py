"""Whether heat maps mean something, on slices whose lesions are known: phantoms.

A map has to find the lesion more often than whoever looks where lesions usually are, and depend on what the network has
learned (Adebayo et al. 2018). Each check ends as a yes or no with its figures, so that a report can say in a sentence
what failed.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage, stats
from torch import nn

from chestct.config.schema import WindowConfig
from chestct.imaging.decode import decode
from chestct.imaging.preprocess import BODY_LEVEL, Preprocess, mask_to_square, placement
from chestct.models.saliency import heat, heat_to_square, normalised_cam
from chestct.models.vgg16 import VGG16
from chestct.phantom.dataset import read_truth
from chestct.stats.calibration import wilson

TOLERANCE = 15 / 224
"""How far from the lesion a peak may lie, as a share of the side: the 15 pixels of Zhang et al. 2018 (pointing game),
which is about half a position of the network's last map."""

LOST = 0.5
"""Mean absolute rank correlation below which a map counts as lost when the network's weights are."""

DRAWS = 2
"""Random weights that a map is compared with."""


def lesion_slices(root: Path, preprocess: Preprocess, window: WindowConfig) -> tuple[np.ndarray, np.ndarray]:
    """Slices with a lesion of a phantom set, and their lesions: uint8 and bool [N, S, S], as the network sees them."""
    truth = read_truth(root)
    squares, masks = [], []
    for file in [] if truth is None else truth["files"]:
        if file["mask"]:
            gray = (decode(root / file["path"], window).gray * 255 + 0.5).astype(np.uint8)
            squares.append(preprocess(gray / np.float32(255)))
            mask = np.asarray(Image.open(root / file["mask"]).convert("1"))
            masks.append(mask_to_square(mask, placement(gray, preprocess)))
    return np.stack(squares), np.stack(masks)


@torch.no_grad()
def check_explanation(
    net: VGG16,
    images: np.ndarray,
    masks: np.ndarray,
    outputs: np.ndarray,
    baseline: torch.Tensor | None = None,
    redrawn: int = 4,
) -> dict[str, Any]:
    """Checks the heat maps of slices with lesions; plain values for JSON.

    images: uint8 [N, S, S]; masks: bool [N, S, S], none empty; outputs: int [N], the output to be explained; baseline:
    as for `normalised_cam`; redrawn: slices (those of the highest scores) on which maps are compared with those of
    random weights. Returns `passes`, `failures` (a sentence each), `slices`, `pointing` and `randomisation`.
    """
    logits, shown, body = _maps(net, images, outputs, baseline)
    few = np.argsort(-logits[np.arange(len(outputs)), outputs], kind="stable")[:redrawn]
    pointing = _pointing(shown, masks, body)
    weights = _randomisation(net, images[few], outputs[few], body[few])
    failures = []
    blind = max(("chance", "centre", "average_lesion"), key=lambda name: pointing[name])
    if pointing["interval"][0] <= pointing[blind]:
        failures.append(
            f"The hottest point lies within {round(TOLERANCE * 224)} of 224 pixels of the lesion in "
            f"{pointing['heat']:.0%} of {len(images)} slices: not clearly more often than without looking at the "
            f"slice ({blind.replace('_', ' ')}: {pointing[blind]:.0%})."
        )
    if max(weights.values()) >= LOST:
        failures.append(
            f"Maps of a network with random weights resemble the model's: absolute rank correlation "
            f"{weights['head']:.2f} with a random head, {weights['last_block']:.2f} with a random last block."
        )
    figures = {"slices": len(images), "pointing": pointing, "randomisation": weights}
    return {"passes": not failures, "failures": failures, **figures}


@torch.no_grad()
def pointing_game(
    net: VGG16, images: np.ndarray, masks: np.ndarray, outputs: np.ndarray, baseline: torch.Tensor | None = None
) -> dict[str, Any]:
    """Shares of slices whose lesion is hit, for boxes of patients' slices: heat, chance, centre, average_lesion.

    Arguments as for `check_explanation`.
    """
    _, shown, body = _maps(net, images, outputs, baseline)
    return {name: share for name, share in _pointing(shown, masks, body).items() if name != "interval"}


def _maps(
    net: VGG16, images: np.ndarray, outputs: np.ndarray, baseline: torch.Tensor | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [N, K], heat and body, both [N, S, S]."""
    starts = range(0, len(images), 16)
    parts = [
        normalised_cam(net, net.conv5(x), outputs[at : at + 16], baseline)
        for at, x in zip(starts, net.batches(images, 16), strict=True)
    ]
    logits, cam = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    shown = np.stack([heat_to_square(one, images.shape[1]) for one in heat(cam)])
    return logits.numpy(), shown, np.stack([ndimage.binary_fill_holes(image > BODY_LEVEL * 255) for image in images])


def _pointing(shown: np.ndarray, masks: np.ndarray, body: np.ndarray) -> dict[str, Any]:
    """Pointing game for heat [N, S, S], and for what knows nothing of the slice.

    chance: a random point of the body; centre: its centre of mass; average_lesion: where lesions of
    the other half of the slices are most often.
    """
    n, side = len(masks), masks.shape[1]
    near = np.stack([ndimage.distance_transform_edt(~mask) for mask in masks]) <= round(TOLERANCE * side)

    centres = np.array([ndimage.center_of_mass(one) if one.any() else (side / 2, side / 2) for one in body])
    spots = np.zeros(masks.shape)
    spots[(np.arange(n), *centres.astype(int).T)] = 1
    # Of the other half: all slices but one would point away from that one's lesion wherever two places are as usual.
    half = np.arange(n) % 2
    others = np.stack([near[half != k].sum(0) for k in (0, 1)]).astype(float)
    usual = ndimage.gaussian_filter(others, (0, side / 56, side / 56))[half]
    found = float(hits(shown, near).mean())
    return {
        "chance": float(np.mean([(a & b).sum() / max(1, b.sum()) for a, b in zip(near, body, strict=True)])),
        "centre": float(hits(spots, near).mean()),
        "average_lesion": float(hits(usual, near).mean()),
        "heat": found,
        "interval": list(wilson(round(found * n), n)),
    }


def hits(maps: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Whether each map's peak lies where it may: bool [N] for maps and bool near, [N, S, S].

    A map without any heat points nowhere.
    """
    peaks = [np.unravel_index(one.argmax(), one.shape) for one in maps]
    return np.array([one[peak] > 0 and allowed[peak] for one, peak, allowed in zip(maps, peaks, near, strict=True)])


def _randomisation(net: VGG16, images: np.ndarray, outputs: np.ndarray, body: np.ndarray) -> dict[str, float]:
    """Mean absolute rank correlation, within the body, of a map with that of a network whose weights are drawn anew."""
    x = torch.cat(list(net.batches(images)))

    def map_of(net: VGG16) -> np.ndarray:
        return normalised_cam(net, net.conv5(x), outputs, None)[1].cpu().numpy()

    own = map_of(net)
    inside = nn.functional.adaptive_avg_pool2d(torch.tensor(body).float(), own.shape[1:]).numpy() > 0.5
    likeness: dict[str, list[float]] = {"head": [], "last_block": []}
    for draw in range(DRAWS):
        for name, values in likeness.items():
            altered = copy.deepcopy(net)
            layers = altered.head if name == "head" else altered.features[net.first_trainable(net.block - 1) :]
            generator = torch.Generator().manual_seed(draw)
            for parameter in layers.parameters():  # as spread as they were
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.std(correction=0).cpu())
            pairs = zip(own, map_of(altered), inside, strict=True)
            values += [_rank_correlation(a[where], b[where]) for a, b, where in pairs]
    return {name: float(np.mean(np.abs(values))) for name, values in likeness.items()}


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; 0 where one of them is constant: such a map says nothing."""
    constant = len(a) < 2 or not (np.ptp(a) and np.ptp(b))
    return 0.0 if constant else float(stats.spearmanr(a, b).statistic)
