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
    for prefix, values in (("logit", logits.astype(np.float64)), ("score", to_scores(logits))):
        table[[f"{prefix}_{name}" for name in output_names(task)]] = values
    return table


def output_names(task: str) -> Sequence[str]:
    """The class of each output of the network."""
    return ("cancer",) if task == "binary" else classes_of(task)
