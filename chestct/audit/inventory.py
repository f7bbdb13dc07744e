"""What there is: slices, distinct contents and groups by source, split and class; formats and sizes by class.

Every table counts three things side by side, because only the last is worth anything statistically: files, distinct
contents, and groups (the effective sample size: copies and slices of one patient are one observation, not many).
"""

from typing import Any

import pandas as pd

from chestct.config.schema import SUBTYPES
from chestct.data.splits import LEFT_OUT, SPLITS

CLASSES = (*SUBTYPES, "cancer")

Table = list[dict[str, Any]]


def counts(manifest: pd.DataFrame, split: pd.Series) -> Table:
    """Files, distinct contents and groups for every source, split and class that occurs, in a fixed order."""
    frame = manifest.assign(
        split=pd.Categorical(split, [*SPLITS, LEFT_OUT]), subtype=pd.Categorical(manifest["subtype"], CLASSES)
    )
    return _sizes(frame, ["source", "split", "subtype"])


def balance(manifest: pd.DataFrame, split: pd.Series) -> Table:
    """The same for every split and label, with a row of zeros where a label is missing from a split."""
    part = manifest[split.isin(SPLITS)]
    label, held = pd.Categorical(part["label"], ["normal", "cancer"]), pd.Categorical(split[part.index], SPLITS)
    return _sizes(part.assign(split=held, label=label), ["split", "label"], observed=False)


def formats(manifest: pd.DataFrame) -> Table:
    """How many files of each class come in which format and colour mode."""
    frame = manifest.assign(subtype=pd.Categorical(manifest["subtype"], CLASSES))
    table = frame.groupby(["subtype", "format", "mode"], observed=True).size().reset_index(name="files")
    return records(table)


def sizes(manifest: pd.DataFrame) -> Table:
    """Smallest, median and largest width and height (pixels), and median file size (bytes), of each class."""
    frame = manifest.assign(subtype=pd.Categorical(manifest["subtype"], CLASSES))
    rows = []
    for subtype, part in frame.groupby("subtype", observed=True):
        row: dict[str, Any] = {"subtype": str(subtype)}
        for side in ("width", "height"):
            row[side] = [int(part[side].quantile(q, interpolation="nearest")) for q in (0, 0.5, 1)]
        rows.append(row | {"bytes": int(part["bytes"].median())})
    return rows


def _sizes(frame: pd.DataFrame, by: list[str], *, observed: bool = True) -> Table:
    grouped = frame.groupby(by, observed=observed)
    table = grouped.agg(files=("path", "size"), contents=("content", "nunique"), groups=("group", "nunique"))
    return records(table.reset_index())


def records(table: pd.DataFrame) -> Table:
    """Rows as plain Python values, so that they go into JSON as they are."""
    return [
        dict(zip(table.columns, row, strict=True)) for row in zip(*(table[key].to_list() for key in table), strict=True)
    ]
