"""The parts of a report that cost minutes and are made only where cfg.evaluation asks for them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from chestct.config import Config
from chestct.data.prepare import located
from chestct.data.store import preprocess_of
from chestct.evaluation.evaluate import Evaluation
from chestct.evaluation.explanation import check_explanation, lesion_slices
from chestct.evaluation.robustness import robustness
from chestct.models.saliency import explained_output
from chestct.phantom.dataset import write

OTHER_SEED = 1_000_003
"""Added to the phantoms' seed: heat maps are checked on lesions that no training has seen."""

BATCH = 16


def asked_for(found: Evaluation) -> dict[str, Any]:
    """The sections `explanation` and `robustness`, as far as they are asked for, of an evaluated checkpoint."""
    asked = found.cfg.evaluation
    sections: dict[str, Any] = {}
    if asked.phantoms:
        sections["explanation"] = explanation(found)
    if asked.robustness:
        sections["robustness"] = under_changes(found)
    return sections


def explanation(found: Evaluation) -> dict[str, Any]:
    """Heat maps of new phantoms held against their lesions (chestct.evaluation.explanation)."""
    assert found.model is not None
    cfg = found.cfg
    images, masks = lesion_slices(_new_phantoms(cfg), preprocess_of(cfg.data), cfg.data.window)
    images, masks = images[: cfg.evaluation.phantoms], masks[: cfg.evaluation.phantoms]
    outputs = explained_output(_logits(found, images))
    return check_explanation(found.model.net, images, masks, outputs, found.baseline, curves=2)


def _new_phantoms(cfg: Config) -> Path:
    """Root of phantoms like those of the settings, nearly all with lesions, drawn where they are not there yet."""
    drawn = dataclasses.replace(
        cfg.data.phantom,
        seed=cfg.data.phantom.seed + OTHER_SEED,
        slices=max(12, round(cfg.evaluation.phantoms / 0.9)),
        cancer=0.95,
        defects=[],
    )
    data = dataclasses.replace(cfg.data, name="phantom", root=None, sources={}, phantom=drawn)
    root = Path(located(dataclasses.replace(cfg, data=data)).root or "")
    write(root, drawn, cfg.trainer.progress)
    return root


def under_changes(found: Evaluation) -> pd.DataFrame:
    """Scores of test slices after graded changes; as many of each class as there are, up to half of those asked for."""
    assert found.data is not None
    assert found.data.store is not None
    manifest = found.data.manifest
    test = manifest[manifest["split"] == "test"].sample(frac=1, random_state=found.cfg.data.split_seed)
    most = max(1, found.cfg.evaluation.robustness // 2)
    normal, cancer = (test[test["label"] == label] for label in ("normal", "cancer"))
    chosen = pd.concat([normal.head(most), cancer.head(max(most, 2 * most - len(normal)))])
    return robustness(
        lambda images: 1 - found.point.probabilities(_logits(found, images))[:, 0],
        found.data.store.images[chosen["row"].to_numpy()],
        (chosen["label"] == "cancer").to_numpy(int),
        found.point.threshold,
    )


@torch.no_grad()
def _logits(found: Evaluation, images: np.ndarray) -> np.ndarray:
    assert found.model is not None
    parts = [images[at : at + BATCH] for at in range(0, len(images), BATCH)]
    return torch.cat([found.model.net(torch.tensor(part).unsqueeze(1).float() / 255) for part in parts]).numpy()
