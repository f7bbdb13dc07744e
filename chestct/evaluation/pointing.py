"""Pointing game on real lesions: does the hottest place lie in a tumour's box, on a source that no training has seen?

Next to it stands what needs no look at the slice: a random place in the lungs, and the usual place of the lesions that
training was shown.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from chestct.config.schema import Config
from chestct.data.datamodule import SliceModule
from chestct.data.lesions import unpack
from chestct.data.store import preprocess_of
from chestct.evaluation.evaluate import conv5_of, normal_baseline
from chestct.evaluation.heatmap_check import hits
from chestct.imaging.decode import decode
from chestct.imaging.lungs import find_lungs
from chestct.imaging.preprocess import placement
from chestct.models.lightning_module import load_classifier
from chestct.models.saliency import heat, heat_to_square, normalised_cam
from chestct.models.vgg16 import has_places
from chestct.stats.bootstrap import effective_size
from chestct.stats.calibration import wilson
from chestct.stats.metrics import Estimate

TOLERANCE = 12
"""How far from the lesion a peak may lie, in pixels of the original slice (docs/protocol.md)."""


@torch.no_grad()
def pointing(cfg: Config, data: SliceModule, models: Sequence[Path], outputs: np.ndarray) -> dict[str, Any] | None:
    """Shares of the test slices with known lesions in which a place is found; None where no test slice has one.

    data: set up, with the features and places of train that these checkpoints (one a seed, of the settings `cfg`) were
    trained on; outputs: int [N], the output explained in each test slice. Maps are averaged over the seeds. The usual
    place is None where training was shown no lesion whose place is known.
    """
    assert data.store is not None
    test = data.manifest[data.manifest["split"] == "test"]
    chosen = np.flatnonzero((test["lesion"] != b"").to_numpy()).tolist()
    if not chosen:
        return None
    part, side, dataset = test.iloc[chosen], cfg.data.size, data.dataset("test")
    square, near, lungs = preprocess_of(cfg.data), [], []
    for root, path, row, lesion in part[["root", "path", "row", "lesion"]].itertuples(index=False, name=None):
        gray = (decode(Path(root, path), cfg.data.window).gray * 255 + 0.5).astype(np.uint8)
        place = placement(gray, square)
        allowed = TOLERANCE * (place.target[2] - place.target[0]) / (place.source[2] - place.source[0])
        near.append(ndimage.distance_transform_edt(~unpack(lesion, side)) <= allowed)
        lungs.append(find_lungs(data.store.images[row]))
    cams = []
    for path in models:
        model = load_classifier(path, cfg.trust).eval()
        conv5 = conv5_of(model, dataset, chosen, cfg)
        baseline = None if has_places(model.net.head) else normal_baseline(model, data, cfg)
        cams.append(normalised_cam(model.net, conv5, outputs[chosen], baseline)[1])
    shown = np.stack([heat_to_square(one, side) for one in heat(torch.stack(cams).mean(0))])
    found, group = hits(shown, np.stack(near)), part["group"].to_numpy()
    n, share = effective_size(found, group), float(found.mean())
    by_chance = [near[i][lung.mask].mean() for i, lung in enumerate(lungs) if lung is not None]
    taught = [places.sum((0, 1)) for places in data.places.get("train", [])]
    usual = None
    if taught and taught[0].numel() > 1 and (total := torch.stack(taught).sum(0)).any():
        usual = float(hits(np.stack([heat_to_square(total / total.max(), side)] * len(near)), np.stack(near)).mean())
    return {
        "slices": len(chosen),
        "heat map": Estimate(share, *wilson(share * n, n), len(chosen), len(np.unique(group))),
        "random place in the lungs": float(np.mean(by_chance)) if by_chance else None,
        "usual place": usual,
    }
