"""Pointing game: does the hottest place lie in a lesion whose place is known?

One game for phantoms, for tumour boxes, and for lesions drawn into the normal slices of a source that no training has
seen. Next to the heat map stands what needs no look at the slice: a random place in the lungs, and the usual place of
lesions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import ndimage

from chestct.config.schema import Config
from chestct.data.augment import number_of
from chestct.data.datamodule import SliceModule
from chestct.data.lesions import unpack
from chestct.data.store import preprocess_of
from chestct.evaluation.evaluate import conv5_of, normal_baseline
from chestct.imaging.decode import decode
from chestct.imaging.lungs import find_lungs
from chestct.imaging.preprocess import as_bytes, placement
from chestct.imaging.slice import Limits
from chestct.models.bundle import Bundle
from chestct.models.lightning_module import load_classifier
from chestct.models.saliency import explained_output, heat, heat_to_square, normalised_cam
from chestct.phantom import insertion
from chestct.stats.bootstrap import effective_size
from chestct.stats.calibration import wilson
from chestct.stats.metrics import Estimate

TOLERANCE = 12
"""How far from the lesion a peak may lie, in pixels of the original slice (docs/protocol.md)."""

DRAWN = 60
"""Normal slices of a source that a lesion is drawn into, at most; as many of each unit as can be."""


@dataclass(frozen=True)
class Lesions:
    """N slices with lesions whose place is known, as the network sees them.

    images: [N, S, S], uint8 or float32 in [0, 1]; masks: bool [N, S, S], none empty; reach: float [N], TOLERANCE of the
    original slice in pixels of the square; groups: unit of each.
    """

    images: np.ndarray
    masks: np.ndarray
    reach: np.ndarray
    groups: np.ndarray


def known_lesions(rows: pd.DataFrame, images: np.ndarray, cfg: Config) -> Lesions | None:
    """The slices of a manifest whose lesions are known, by boxes or masks; None where there are none.

    images: of the store, uint8 [M, S, S].
    """
    rows = rows[rows["lesion"] != b""]
    masks = [unpack(lesion, images.shape[-1]) for lesion in rows["lesion"]]
    return _lesions(rows, images[rows["row"].to_numpy()], masks, cfg)


def drawn_lesions(rows: pd.DataFrame, images: np.ndarray, cfg: Config) -> Lesions | None:
    """Normal slices of a manifest with one lesion drawn into each, the same whenever it is asked for.

    At most DRAWN of them, from all units in turn; None where no slice shows lungs.
    """
    rows = rows[rows["label"] == "normal"].drop_duplicates("content").sample(frac=1, random_state=0)
    rows = rows.assign(turn=rows.groupby("group").cumcount()).sort_values("turn", kind="stable").head(DRAWN)
    squares, masks, kept = [], [], []
    for row, content in rows[["row", "content"]].itertuples(index=False, name=None):
        lungs, rng = find_lungs(images[row]), np.random.default_rng(number_of(f"pointing/{content}"))
        if lungs is not None:
            square, mask = insertion.insert(images[row] / np.float32(255), lungs.mask, "lesion", rng)
            if mask.any():
                squares.append(square)
                masks.append(mask)
                kept.append(content)
    return _lesions(rows[rows["content"].isin(kept)], squares, masks, cfg)


def _lesions(rows: pd.DataFrame, images: Sequence[np.ndarray], masks: list[np.ndarray], cfg: Config) -> Lesions | None:
    if rows.empty:
        return None
    preprocess, reach = preprocess_of(cfg.data), []
    limits = Limits(cfg.data.max_bytes, cfg.data.max_pixels)
    for root, path in zip(rows["root"], rows["path"], strict=True):
        place = placement(as_bytes(decode(Path(root, path), cfg.data.window, limits).gray), preprocess)
        reach.append(TOLERANCE * (place.target[2] - place.target[0]) / (place.source[2] - place.source[0]))
    return Lesions(np.stack(images), np.stack(masks), np.array(reach), rows["group"].to_numpy())


@torch.no_grad()
def pointing(cfg: Config, data: SliceModule, checkpoints: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The game on test slices: `known` lesions, and lesions `drawn` into normal slices, as far as there are any.

    data: set up, with the places of train that the checkpoints (one a seed, of the settings `cfg`) were trained on.
    Maps are averaged over the seeds. The usual place is that of the lesions that training was shown, None where it was
    shown none.
    """
    assert data.store is not None
    test = data.manifest[data.manifest["split"] == "test"]
    kinds = {"known": known_lesions, "drawn": drawn_lesions}
    by_kind = {kind: make(test, data.store.images, cfg) for kind, make in kinds.items()}
    models = [load_classifier(path, cfg.trust).eval() for path in checkpoints]
    baselines = [normal_baseline(model, data, cfg) for model in models]
    taught = [view[:].sum((0, 1)) for view in data.places.get("train", []) if view.rows[0].shape[-1] > 1]
    usual = torch.stack(taught).sum(0).numpy() if taught else None
    results = {}
    for kind, lesions in by_kind.items():
        if lesions is not None:
            maps_of = partial(conv5_of, data=data, images=lesions.images, cfg=cfg)
            # Frozen convolutions are the same in all models.
            conv5 = [maps_of(models[0])] * len(models) if cfg.always_frozen else [maps_of(model) for model in models]
            logits = [model.net.head(model.net.pool(maps)) for model, maps in zip(models, conv5, strict=True)]
            outputs = explained_output(torch.stack(logits).mean(0).numpy())
            parts = zip(models, conv5, baselines, strict=True)
            cams = [normalised_cam(model.net, maps, outputs, baseline)[1] for model, maps, baseline in parts]
            results[kind] = pointing_game(heat(torch.stack(cams).mean(0)).numpy(), lesions, usual)
    return results


def pointing_game(heats: np.ndarray, lesions: Lesions, usual: np.ndarray | None = None) -> dict[str, Any]:
    """Shares of slices in which a place lies in the lesion or near it; None for what is not known.

    heats: [N, h, w] in [0, 1]; one without any heat points nowhere. usual: where lesions usually are, [h, w] for all or
    [N, h, w]. The interval is over units (Wilson 1927, on the effective number of slices).
    """
    side, count = lesions.masks.shape[-1], len(lesions.masks)
    pairs = zip(lesions.masks, lesions.reach, strict=True)
    near = np.stack([ndimage.distance_transform_edt(~mask) <= allowed for mask, allowed in pairs])

    def hits(maps: np.ndarray) -> np.ndarray:
        squares = [heat_to_square(grid / max(grid.max(), 1e-12), side) for grid in maps]
        peaks = [np.unravel_index(square.argmax(), square.shape) for square in squares]
        return np.array([seen[at] > 0 and allowed[at] for seen, at, allowed in zip(squares, peaks, near, strict=True)])

    hit = hits(heats)
    lungs = [find_lungs(as_bytes(image)) for image in lesions.images]
    by_chance = [near[i][lung.mask].mean() for i, lung in enumerate(lungs) if lung is not None]
    taught = None if usual is None or not usual.any() else np.broadcast_to(usual, (count, *usual.shape[-2:]))
    n, share = effective_size(hit, lesions.groups), float(hit.mean())
    return {
        "slices": count,
        "heat map": Estimate(share, *wilson(share * n, n), count, len(np.unique(lesions.groups))),
        "random place in the lungs": float(np.mean(by_chance)) if by_chance else None,
        "usual place": None if taught is None else float(hits(taught).mean()),
    }


def check_explanation(bundle: Bundle, lesions: Lesions) -> dict[str, Any]:
    """Whether heat maps find lesions more often than whoever looks where lesions usually are.

    Returns `pointing` (see `pointing_game`) and `failure`, a sentence, empty where they do.
    """
    heats = bundle.predict(lesions.images, explain=True).heat
    assert heats is not None
    pointing, failure = pointing_game(heats, lesions, _of_other_half(lesions.masks)), ""
    blind = max(("random place in the lungs", "usual place"), key=lambda name: pointing[name] or 0)
    chance = pointing[blind] or 0  # no slice may show lungs
    if pointing["heat map"].low <= chance:
        failure = (
            f"The hottest point lies in the lesion in {pointing['heat map'].value:.0%} of {len(heats)} slices: not "
            f"clearly more often than without looking at the slice ({blind}: {chance:.0%})."
        )
    return {"pointing": pointing, "failure": failure}


def _of_other_half(masks: np.ndarray) -> np.ndarray:
    """Where lesions of the other half of the slices are most often, for each slice: [N, S, S].

    Of the other half, not of all slices but one: that sum lacks just the one's own lesion, and would point elsewhere.
    """
    half = np.arange(len(masks)) % 2
    others = np.stack([masks[half != k].sum(0) for k in (0, 1)]).astype(float)
    return ndimage.gaussian_filter(others, (0, masks.shape[1] / 56, masks.shape[1] / 56))[half]
