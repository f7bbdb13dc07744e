"""Whether test looks like train: each of a slice's single numbers, compared between the two.

Groups are compared, not slices (a group counts with its mean), by the two-sample Kolmogorov-Smirnov test with Holm's
correction over the numbers. Large sets make any difference significant, so a shift must also be material: a KS distance
of 0.2 says that one fifth of the slices would have to move.
"""

import numpy as np
import pandas as pd
from scipy.stats import ks_2samp

from chestct.audit.inventory import Table
from chestct.audit.shortcuts import BASELINES, MIN_GROUPS, STATISTICS, columns
from chestct.imaging.statistics import holm

MATERIAL_DISTANCE = 0.2


def shift(manifest: pd.DataFrame, split: pd.Series) -> Table:
    """KS distance of train and test for every single number, with the p-value after Holm's correction.

    One row for each: `name`, `title`, `distance` in [0, 1], `p` in [0, 1], `train` and `test` (means over groups) and
    `flagged`; None with a `reason` where a split has too few groups.
    """
    numbers = columns(manifest)
    train, test = (
        numbers[split == name].groupby(manifest.loc[split == name, "group"]).mean() for name in ("train", "test")
    )
    titles = {baseline.name: baseline.title for baseline in BASELINES}
    rows: Table = [{"name": name, "title": titles[name]} for name in STATISTICS]
    nothing = {"distance": None, "p": None, "train": None, "test": None, "flagged": False}
    if min(len(train), len(test)) < MIN_GROUPS:
        reason = f"too few groups: {len(train)} in train, {len(test)} in test, needs {MIN_GROUPS} in each"
        return [row | nothing | {"reason": reason} for row in rows]
    tests = [ks_2samp(train[row["name"]], test[row["name"]]) for row in rows]
    for row, result, p in zip(rows, tests, holm(np.array([result.pvalue for result in tests])), strict=True):
        distance = float(result.statistic)
        means = {
            "train": float(train[row["name"]].to_numpy().mean()),
            "test": float(test[row["name"]].to_numpy().mean()),
        }
        flagged = bool(p < 0.05 and distance >= MATERIAL_DISTANCE)
        row |= {"distance": distance, "p": float(p), **means, "flagged": flagged, "reason": ""}
    return rows
