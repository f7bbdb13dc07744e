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
from chestct.evaluation.pointing import Lesions, game, reach
from chestct.imaging.decode import decode
from chestct.imaging.preprocess import BODY_LEVEL, Preprocess, as_bytes, mask_to_square, placement
from chestct.models.bundle import Bundle
from chestct.models.saliency import explained_output, normalised_cam
from chestct.models.vgg16 import VGG16
from chestct.phantom.dataset import read_truth

LOST = 0.5
"""Mean absolute rank correlation below which a map counts as lost when the network's weights are."""

DRAWS = 2
"""Random weights that a map is compared with."""


def lesion_slices(root: Path, preprocess: Preprocess, window: WindowConfig, number: int) -> Lesions:
    """The first slices with a lesion of a phantom set, each a unit of its own."""
    squares, masks, allowed, paths = [], [], [], []
    for file in [file for file in (read_truth(root) or {"files": []})["files"] if file["mask"]][:number]:
        gray = as_bytes(decode(root / file["path"], window).gray)
        squares.append(preprocess(gray / np.float32(255)))
        masks.append(
            mask_to_square(np.asarray(Image.open(root / file["mask"]).convert("1")), placement(gray, preprocess))
        )
        allowed.append(reach(gray, preprocess))
        paths.append(file["path"])
    return Lesions(np.stack(squares), np.stack(masks), np.array(allowed), np.arange(len(paths)), paths)


@torch.no_grad()
def check_explanation(bundle: Bundle, lesions: Lesions, redrawn: int = 4) -> dict[str, Any]:
    """Checks the heat maps of slices with lesions.

    redrawn: slices (those of the highest scores) on which maps are compared with those of random weights. Returns
    `passes`, `failures` (a sentence each), `slices`, `pointing` (see `game`) and `randomisation`.
    """
    answers = bundle.predict(lesions.images, explain=True)
    outputs = explained_output(answers.logits)
    few = np.argsort(-answers.logits[np.arange(len(outputs)), outputs], kind="stable")[:redrawn]
    assert answers.heat is not None
    pointing = game(answers.heat, lesions, _of_other_half(lesions.masks))
    weights = _randomisation(bundle.net, lesions.images[few], outputs[few])
    failures = []
    blind = max(("random place in the lungs", "usual place"), key=lambda name: pointing[name] or 0)
    if pointing["heat map"].low <= (pointing[blind] or 0):
        failures.append(
            f"The hottest point lies in the lesion in {pointing['heat map'].value:.0%} of {len(outputs)} slices: not "
            f"clearly more often than without looking at the slice ({blind}: {pointing[blind]:.0%})."
        )
    if max(weights.values()) >= LOST:
        failures.append(
            f"Maps of a network with random weights resemble the model's: absolute rank correlation "
            f"{weights['head']:.2f} with a random head, {weights['last_block']:.2f} with a random last block."
        )
    figures = {"slices": len(outputs), "pointing": pointing, "randomisation": weights}
    return {"passes": not failures, "failures": failures, **figures}


def _of_other_half(masks: np.ndarray) -> np.ndarray:
    """Where lesions of the other half of the slices are most often, for each slice: [N, S, S].

    Of the other half: all slices but one would point away from that one's lesion wherever two places are as usual.
    """
    half = np.arange(len(masks)) % 2
    others = np.stack([masks[half != k].sum(0) for k in (0, 1)]).astype(float)
    return ndimage.gaussian_filter(others, (0, masks.shape[1] / 56, masks.shape[1] / 56))[half]


def _randomisation(net: VGG16, images: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
    """Mean absolute rank correlation, within the body, of a map with that of a network whose weights are drawn anew."""
    body = np.stack([ndimage.binary_fill_holes(image > BODY_LEVEL * 255) for image in images])
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
