"""The table of predictions: one row a slice, from which every metric can be computed again by anyone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from chestct.config.schema import classes_of, of_patients
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


def measurable(table: pd.DataFrame, split: str) -> pd.DataFrame:
    """The slices of a split that are fitted to and measured on, see `of_patients_first`."""
    return table[table["split"] == split][of_patients_first(table, split)]


def training_facts(manifest: pd.DataFrame, table: pd.DataFrame) -> dict[str, Any]:
    """What a bundle keeps to be compared with later slices: quantiles of all that drift looks at, and slices by split.

    Those of measurable slices: of train in the manifest, of validation in the table of predictions.
    """
    columns = drift.measured(measurable(manifest, "train"), measurable(table, "valid"))
    return {
        "data": {"slices": {str(split): int(n) for split, n in manifest["split"].value_counts().items()}},
        "statistics": {name: np.quantile(values, drift.QUANTILES).tolist() for name, values in columns.items()},
    }


def of_patients_first(table: pd.DataFrame, split: str) -> np.ndarray:
    """Which slices of a split are fitted to and measured on, bool [N]: phantoms only where the others lack a class.

    They are there to learn from: what they say holds for no patient.
    """
    rows = table[table["split"] == split]
    real = rows["source"].map(of_patients).to_numpy(bool, copy=True)
    return real if (rows["target"][real] > 0).nunique() == 2 else np.ones(len(rows), bool)
