"""The table of predictions: one row a slice, from which every metric can be computed again by anyone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from chestct.config.schema import classes_of
from chestct.data.splits import SPLITS, measurable
from chestct.stats import drift

KEPT = ["source", "path", "split", "label", "subtype", "target", "group", "content", "leaked"]


def prediction_table(manifest: pd.DataFrame, split: str, logits: np.ndarray, task: str) -> pd.DataFrame:
    """The slices of a split with `logit_CLASS` for each class that has a logit of its own (binary: cancer only).

    logits: float [N, 1] (binary) or [N, K], in the manifest's order.
    """
    table = manifest.loc[manifest["split"] == split, KEPT].reset_index(drop=True)
    table[[f"logit_{name}" for name in output_names(task)]] = logits.astype(np.float64)
    return table


def output_names(task: str) -> Sequence[str]:
    """The class of each output of the network."""
    return ("cancer",) if task == "binary" else classes_of(task)


def training_facts(manifest: pd.DataFrame, table: pd.DataFrame) -> dict[str, Any]:
    """What a bundle keeps to be compared with later slices: quantiles of all that drift looks at, and slices by split.

    Those of measurable slices: of train in the manifest, of validation in the table of predictions.
    """
    columns = drift.measured(measurable(manifest, "train"), measurable(table, "valid"))
    return {
        "data": {"slices": {split: len(measurable(manifest, split)) for split in SPLITS}},
        "statistics": {name: np.quantile(values, drift.QUANTILES).tolist() for name, values in columns.items()},
    }
