"""How far the measured slices lie from the training data, in the numbers that the service watches, too."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from chestct.imaging.statistics import STATISTICS
from chestct.stats.drift import MEASURED, QUANTILES, Difference, difference


def training_facts(manifest: pd.DataFrame, predictions: pd.DataFrame) -> dict[str, Any]:
    """What a bundle keeps to be compared with later slices (see `difference`): QUANTILES, and slices by split.

    manifest: the slices of all splits; predictions: those of validation with `probability_normal` and `novelty`.
    """
    train, valid = manifest[manifest["split"] == "train"], predictions[predictions["split"] == "valid"]
    columns = _columns(train, valid)
    return {
        "data": {"slices": {str(split): int(n) for split, n in manifest["split"].value_counts().items()}},
        "statistics": {name: np.quantile(values, QUANTILES).tolist() for name, values in columns.items()},
    }


def shift(facts: Mapping[str, Any], manifest: pd.DataFrame, predictions: pd.DataFrame) -> list[Difference]:
    """Each of MEASURED, of these slices against the training data's. facts: of a bundle; both tables: of one split."""
    columns = _columns(manifest, predictions)
    return [difference(name, facts, columns[name]) for name in MEASURED]


def _columns(manifest: pd.DataFrame, predictions: pd.DataFrame) -> dict[str, np.ndarray]:
    scored = {"score": 1 - predictions["probability_normal"], "novelty": predictions["novelty"]}
    return {name: column.to_numpy(float) for name, column in {**manifest[list(STATISTICS)], **scored}.items()}
