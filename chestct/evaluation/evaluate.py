"""From a checkpoint to its predictions, metrics and plots; what evaluate.py calls.

A checkpoint knows its settings, so the data it was made for is made again unless told otherwise; the numbers are then
those that training printed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from chestct.config import Config
from chestct.data.module import SliceModule
from chestct.errors import ChestCTError
from chestct.evaluation.metrics import measure
from chestct.evaluation.plots import draw_all
from chestct.models.classifier import Classifier, load_classifier
from chestct.models.features import attach
from chestct.models.predictions import prediction_table

SPLITS = ("valid", "test")


def predict(cfg: Config) -> pd.DataFrame:
    """Predictions of the checkpoint cfg.ckpt on the valid and test slices that `cfg` describes.

    Raises ChestCTError where there is no checkpoint: a network without training is never evaluated.
    """
    if not cfg.ckpt:
        raise ChestCTError(
            "Nothing to evaluate: give a checkpoint with ckpt=runs/.../checkpoints/best.ckpt, or ckpt=last for the "
            "newest run."
        )
    model = load_classifier(Path(cfg.ckpt)).eval()
    data = SliceModule(cfg)
    data.prepare_data()
    data.setup()
    if cfg.features.cache and model.cfg.always_frozen:
        attach(data, model.net, model.weights_digest, cfg, SPLITS)
    tables = [prediction_table(data.manifest, split, _logits(model, data, split), cfg.task) for split in SPLITS]
    return pd.concat(tables, ignore_index=True)


@torch.no_grad()
def _logits(model: Classifier, data: SliceModule, split: str) -> np.ndarray:
    """Logits float32 [N, K] of a split's plain slices."""
    dataset = data.dataset(split)
    size = data.cfg.data.batch_size
    keys = [(0, i) for i in range(len(dataset))]
    parts = [model(dataset.__getitems__(keys[at : at + size])["x"]) for at in range(0, len(keys), size)]
    return torch.cat(parts).numpy()


def write_report(predictions: pd.DataFrame, cfg: Config, out: Path) -> dict[str, Any]:
    """Writes metrics.json, predictions.parquet and plots (pictures and their data) to `out`; returns the metrics."""
    out.mkdir(parents=True, exist_ok=True)
    metrics = measure(predictions, cfg.task)
    metrics["about"] = {
        "task": cfg.task,
        "split": cfg.data.split,
        "synthetic": cfg.data.name == "phantom",
        "leaked": int(predictions["leaked"].sum()),
    }
    predictions.to_parquet(out / "predictions.parquet")
    draw_all(predictions[predictions["split"] == "test"], cfg.task, out)
    temporary = out / "metrics.json.tmp"
    temporary.write_text(json.dumps(metrics, indent=1) + "\n")
    temporary.replace(out / "metrics.json")
    return metrics
