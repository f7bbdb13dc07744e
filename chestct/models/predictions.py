"""The table of predictions: one row a slice, from which every metric can be computed again by anyone."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from chestct.config.schema import classes_of
from chestct.stats.calibration import to_scores

KEPT = ["source", "path", "split", "label", "subtype", "target", "group", "content", "leaked"]
KEPT += ["width", "height", "mode", "format", "mean", "std"]  # for subgroups


def prediction_table(manifest: pd.DataFrame, split: str, logits: np.ndarray, task: str) -> pd.DataFrame:
    """The slices of a split with their logits and scores.

    logits: float [N, 1] (binary) or [N, K], in the manifest's order. Adds `logit_CLASS` and `score_CLASS` for each
    class that has a logit of its own (binary: cancer only); scores are P(class), not calibrated.
    """
    table = manifest.loc[manifest["split"] == split, KEPT].reset_index(drop=True)
    names = output_names(task)
    scores = to_scores(logits)
    for i, name in enumerate(names):
        table[f"logit_{name}"] = logits[:, i].astype(np.float64)
        table[f"score_{name}"] = scores[:, i]
    return table


def output_names(task: str) -> Sequence[str]:
    """The class of each output of the network."""
    return ("cancer",) if task == "binary" else classes_of(task)
