"""Whether heat maps mean something, on slices whose lesions are known: phantoms.

A map has to find the lesion more often than whoever looks where lesions usually are, depend on what the network has
learned (Adebayo et al. 2018), and name the pixels that the score rests on (Petsiuk et al. 2018). Each check ends as a
yes or no with its figures, so that a report can say in a sentence what failed.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage, stats
from torch import nn

from chestct.config.schema import WindowConfig
from chestct.imaging.decode import decode
from chestct.imaging.preprocess import BODY_LEVEL, Preprocess
from chestct.models.saliency import heat, heat_to_square, mask_to_square, normalised_cam, placement
from chestct.models.vgg16 import VGG16
from chestct.phantom.dataset import read_truth
from chestct.stats.calibration import to_scores, wilson

TOLERANCE = 15 / 224
"""How far from the lesion a peak may lie, as a share of the side: the 15 pixels of Zhang et al. 2018 (pointing game),
which is about half a position of the network's last map."""

LOST = 0.5
"""Mean absolute rank correlation below which a map counts as lost when the network's weights are."""

STEPS, DRAWS = 8, 2
"""Points of a deletion or insertion curve less one; random orders, and random weights, that a map is compared with."""


def lesion_slices(root: Path, preprocess: Preprocess, window: WindowConfig) -> tuple[np.ndarray, np.ndarray]:
    """Slices with a lesion of a phantom set, and their lesions: uint8 and bool [N, S, S], as the network sees them."""
    truth = read_truth(root)
    files = [] if truth is None else [file for file in truth["files"] if file["mask"]]
    squares, masks = [], []
    for file in files:
        gray = (decode(root / file["path"], window).gray * 255 + 0.5).astype(np.uint8)
        mask = np.asarray(Image.open(root / file["mask"]).convert("1"))
        squares.append(preprocess(gray / np.float32(255)))
        masks.append(mask_to_square(mask, placement(gray, preprocess)))
    return np.stack(squares), np.stack(masks)


def check_explanation(
    net: VGG16,
    images: np.ndarray,
    masks: np.ndarray,
    outputs: np.ndarray,
    baseline: torch.Tensor | None = None,
    curves: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Checks the heat maps of slices with lesions; plain values for JSON.

    images: uint8 [N, S, S]; masks: bool [N, S, S], at least two and none empty; outputs: int [N], the output to be
    explained; baseline: as for `normalised_cam`; curves: slices (those of the highest scores) for the checks that need
    further forward passes. Returns `passes`, `checks` {name: bool}, `failures` (a sentence each), `slices`,
    `tolerance_px`, `pointing`, `share`, `randomisation`, `deletion` and `insertion`.
    """
    if len(images) < 2 or not masks.any((1, 2)).all():
        raise ValueError("at least two slices, each with a lesion, are needed")
    score, cam = _explain(net, images, outputs, baseline)
    shown = np.stack([heat_to_square(one, images.shape[1]) for one in heat(cam)])
    body = np.stack([ndimage.binary_fill_holes(image > BODY_LEVEL * 255) for image in images])
    few = np.argsort(-score, kind="stable")[:curves]
    result: dict[str, Any] = {
        "slices": len(images),
        "tolerance_px": round(TOLERANCE * images.shape[1]),
        **_localisation(shown, masks, body),
        "randomisation": _randomisation(net, images[few], outputs[few], body[few], seed),
        **_curves(net, images[few], outputs[few], cam[few], body[few], seed),
    }
    checks, failures = _judge(result)
    return {"passes": all(checks.values()), "checks": checks, "failures": failures, **result}


@torch.no_grad()
def _explain(
    net: VGG16, images: np.ndarray, outputs: np.ndarray, baseline: torch.Tensor | None
) -> tuple[np.ndarray, torch.Tensor]:
    """Scores float [N] of the outputs in question and their normalised maps [N, h, w]."""
    starts = range(0, len(images), 16)
    parts = [
        normalised_cam(net, net.conv5(x), outputs[at : at + 16], baseline)
        for at, x in zip(starts, net.batches(images, 16), strict=True)
    ]
    logits, cams = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return _scores(logits, outputs), cams


def _scores(logits: torch.Tensor, outputs: np.ndarray) -> np.ndarray:
    """P(output), float64 [N], not calibrated."""
    return to_scores(logits.numpy())[np.arange(len(outputs)), outputs]


def _localisation(shown: np.ndarray, masks: np.ndarray, body: np.ndarray) -> dict[str, Any]:
    """Pointing game and share of heat in the lesion, for heat [N, S, S] and for what knows nothing of the slice.

    chance: a random point of the body; centre: its centre of mass; average_lesion: where the other slices' lesions
    are most often.
    """
    n, side = len(masks), masks.shape[1]
    near = np.stack([ndimage.distance_transform_edt(~mask) for mask in masks]) <= round(TOLERANCE * side)
    others = masks.sum(0) - masks.astype(float)
    centres = [ndimage.center_of_mass(b) if b.any() else (side / 2, side / 2) for b in body]
    spots = np.zeros_like(others)
    spots[(np.arange(n), *np.array(centres).astype(int).T)] = 1
    usual = ndimage.gaussian_filter(near.sum(0) - near.astype(float), (0, side / 56, side / 56))
    pointing: dict[str, Any] = {
        "chance": _mean_in(near, body),
        "centre": _hit(spots, near),
        "average_lesion": _hit(usual, near),
        "heat": _hit(shown, near),
    }
    share = {
        "chance": _mean_in(masks, body),
        "centre": _share(ndimage.gaussian_filter(spots, (0, side / 8, side / 8)), masks),
        "average_lesion": _share(others, masks),
        "heat": _share(shown, masks),
    }
    hits = round(pointing["heat"] * n)
    pointing |= {"interval": list(wilson(hits, n)), "hits": hits, "heat_0px": _hit(shown, masks)}
    return {"pointing": pointing | {"no_heat": int((shown.max((1, 2)) == 0).sum())}, "share": share}


def _hit(maps: np.ndarray, allowed: np.ndarray) -> float:
    """Share of the maps [N, S, S] whose peak is allowed; a map without any heat points nowhere."""
    flat = maps.reshape(len(maps), -1)
    at = flat.argmax(1)
    rows = np.arange(len(maps))
    return float((allowed.reshape(len(maps), -1)[rows, at] & (flat[rows, at] > 0)).mean())


def _share(maps: np.ndarray, masks: np.ndarray) -> float:
    """Mean share of a map's heat that lies in the mask; none of it where there is no heat."""
    total = maps.sum((1, 2))
    return float(((maps * masks).sum((1, 2)) / np.where(total > 0, total, 1)).mean())


def _mean_in(allowed: np.ndarray, body: np.ndarray) -> float:
    return float(np.mean([(a & b).sum() / max(1, b.sum()) for a, b in zip(allowed, body, strict=True)]))


@torch.no_grad()
def _randomisation(
    net: VGG16, images: np.ndarray, outputs: np.ndarray, body: np.ndarray, seed: int
) -> dict[str, float]:
    """Mean absolute rank correlation, within the body, of a map with that of a network whose weights are drawn anew."""
    x = (torch.cat(list(net.batches(images))) - net.mean) * net.scale
    last = net.first_trainable(4)
    trunk = net.features[:last](x)

    def map_of(block: nn.Sequential, head: nn.Sequential) -> np.ndarray:
        altered: Any = SimpleNamespace(pool=net.pool, head=head)  # all that a map is made with, but for conv5
        return normalised_cam(altered, block[:-1](trunk.clone()), outputs, None)[1].cpu().numpy()

    own = map_of(net.features[last:], net.head)
    positions = nn.functional.adaptive_avg_pool2d(torch.tensor(body).float(), own.shape[1:]).numpy() > 0.5
    likeness: dict[str, list[float]] = {"head": [], "last_block": []}
    for draw in range(DRAWS):
        redrawn = {
            "head": (net.features[last:], _redrawn(net.head, seed + draw)),
            "last_block": (_redrawn(net.features[last:], seed + draw), net.head),
        }
        for name, parts in redrawn.items():
            pairs = zip(own, map_of(*parts), positions, strict=True)
            likeness[name] += [_rank_correlation(a[inside], b[inside]) for a, b, inside in pairs]
    return {name: float(np.mean(np.abs(values))) for name, values in likeness.items()}


def _redrawn(layers: nn.Sequential, seed: int) -> nn.Sequential:
    """A copy of layers with new weights, as spread as the old."""
    layers = copy.deepcopy(layers)
    generator = torch.Generator().manual_seed(seed)
    for parameter in layers.parameters():
        fresh = torch.randn(parameter.shape, generator=generator) * parameter.std(correction=0).cpu()
        parameter.copy_(fresh)
    return layers


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; 0 where one of them is constant: such a map says nothing."""
    constant = len(a) < 2 or not (np.ptp(a) and np.ptp(b))
    return 0.0 if constant else float(stats.spearmanr(a, b).statistic)


def _curves(
    net: VGG16,
    images: np.ndarray,
    outputs: np.ndarray,
    cam: torch.Tensor,
    body: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """Area under the score as the body's pixels are blurred away (deletion) or appear (insertion), hottest first.

    For comparison the same for random orders, drawn as coarse as the map.
    """
    rng = np.random.default_rng(seed)
    side = images.shape[1]
    areas: dict[str, dict[str, list[float]]] = {name: {"heat": [], "random": []} for name in ("deletion", "insertion")}
    for image, output, one, inside in zip(images, outputs, cam, body, strict=True):
        blurred = ndimage.gaussian_filter(image, side / 16)
        random = [torch.tensor(rng.random(one.shape)) for _ in range(DRAWS)]
        score = _scorer(net, int(output))
        for kind, order in [("heat", one), *(("random", draw) for draw in random)]:
            ranking = heat_to_square(order.float(), side)
            areas["deletion"][kind].append(_area(score, image, blurred, ranking, inside))
            areas["insertion"][kind].append(_area(score, blurred, image, ranking, inside))
    means = {name: {kind: float(np.mean(values)) for kind, values in by.items()} for name, by in areas.items()}
    return {**means, "curve_slices": len(images)}


def _scorer(net: VGG16, output: int) -> Callable[[np.ndarray], np.ndarray]:
    @torch.no_grad()
    def score(images: np.ndarray) -> np.ndarray:
        logits = torch.cat([net(x).cpu() for x in net.batches(images)])
        return _scores(logits, np.full(len(images), output))

    return score


def _area(
    score: Callable[[np.ndarray], np.ndarray],
    before: np.ndarray,
    after: np.ndarray,
    ranking: np.ndarray,
    inside: np.ndarray,
) -> float:
    """Area in [0, 1] under the score while pixels inside the body turn from before to after, highest ranked first."""
    rank = np.full(ranking.shape, np.inf)
    rank[inside] = stats.rankdata(-ranking[inside], method="ordinal") / max(1, inside.sum())
    frames = np.stack([np.where(rank <= step / STEPS, after, before) for step in range(STEPS + 1)])
    return float(np.trapezoid(score(frames), dx=1 / STEPS))


def _judge(result: dict[str, Any]) -> tuple[dict[str, bool], list[str]]:
    """Each check's outcome, and a sentence for each that failed."""
    pointing, share, weights = result["pointing"], result["share"], result["randomisation"]
    blind = max(("chance", "centre", "average_lesion"), key=lambda name: pointing[name])
    best_share = max(share[name] for name in ("chance", "centre", "average_lesion"))
    deletion, insertion = result["deletion"], result["insertion"]
    outcomes = {
        "pointing": (
            pointing["interval"][0] > pointing[blind],
            f"The hottest point lies in the lesion (or within {result['tolerance_px']} pixels of it) in "
            f"{pointing['heat']:.0%} of {result['slices']} slices, 95 % interval {pointing['interval'][0]:.0%} to "
            f"{pointing['interval'][1]:.0%}: not clearly more often than without looking at the slice "
            f"({blind.replace('_', ' ')}: {pointing[blind]:.0%}).",
        ),
        "share": (
            share["heat"] > best_share,
            f"{share['heat']:.1%} of the heat lies in the lesion, no more than without looking at the slice "
            f"({best_share:.1%}).",
        ),
        "randomisation": (
            max(weights.values()) < LOST,
            f"Maps of a network with random weights resemble the model's: absolute rank correlation "
            f"{weights['head']:.2f} with a random head, {weights['last_block']:.2f} with a random last block.",
        ),
        "deletion": (
            deletion["heat"] < deletion["random"],
            f"Blurring the hottest areas first lowers the score no faster than a random order (area under the curve "
            f"{deletion['heat']:.2f} against {deletion['random']:.2f}).",
        ),
        "insertion": (
            insertion["heat"] > insertion["random"],
            f"Showing the hottest areas first raises the score no faster than a random order (area under the curve "
            f"{insertion['heat']:.2f} against {insertion['random']:.2f}).",
        ),
    }
    checks = {name: bool(passed) for name, (passed, _) in outcomes.items()}
    return checks, [sentence for passed, sentence in outcomes.values() if not passed]
