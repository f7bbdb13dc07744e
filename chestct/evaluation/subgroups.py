"""Where a model is worse than on the whole: by source, subtype, file, size and contrast.

Each subgroup is judged by its share of right decisions, because many hold one class only and have no AUROC; a flag
marks one whose interval leaves out the value of all slices of the same class mix.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from chestct.stats.metrics import Estimate, measure

FEWEST = 5
"""Groups below which a subgroup is listed, but not judged."""


def subgroups(
    test: pd.DataFrame, scores: np.ndarray, threshold: float, *, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """One row for each subgroup of the test slices: `by`, `name`, class counts, `sensitivity`, `specificity`, `auroc`
    (Estimates), and `flag`, a sentence where an interval leaves out the overall value.

    test: predictions with the manifest's columns; scores: calibrated P(cancer), float [N].
    """
    table = test.assign(target=(test["label"] == "cancer").astype(int)).reset_index(drop=True)
    overall = measure(table, "binary", scores[:, None], threshold, resamples=resamples, seed=seed)
    rows = []
    for by, name, mask in _parts(table):
        part, own = table[mask], scores[mask.to_numpy()]
        estimates = measure(part, "binary", own[:, None], threshold, resamples=resamples, seed=seed)
        shown = {metric: estimates[metric] for metric in ("sensitivity", "specificity", "auroc")}
        rows.append(
            {
                "by": by,
                "name": name,
                "normal": int((part["target"] == 0).sum()),
                "cancer": int((part["target"] == 1).sum()),
                "groups": int(part["group"].nunique()),
                **shown,
                "flag": _flag(shown, overall),
            }
        )
    return rows


def _parts(table: pd.DataFrame) -> Iterator[tuple[str, str, pd.Series]]:
    """(kind, name, mask) of every subgroup; kinds that do not divide the slices are left out."""
    kinds = {
        "source": table["source"],
        "subtype": table["subtype"].str.replace("_", " "),
        "file": table["format"] + " " + table["mode"].where(table["mode"] != table["format"], ""),
        "size": _thirds((table["width"] * table["height"]) ** 0.5, "px", 0),
        "contrast": _thirds(table["std"], "sd", 2),
    }
    for kind, names in kinds.items():
        if names.nunique() > 1:
            ordered = names.cat.categories if isinstance(names.dtype, pd.CategoricalDtype) else sorted(names.unique())
            yield from ((kind, str(name).strip(), names == name) for name in ordered if (names == name).any())


def _thirds(values: pd.Series, unit: str, digits: int) -> pd.Series:
    """The third of the slices that each value falls into, named by its bounds."""
    low, high = values.quantile([1 / 3, 2 / 3])
    low_text, high_text = (f"{value:.{digits}f} {unit}" for value in (low, high))
    if low_text == high_text:  # too alike to have names of their own
        return pd.Series("all", index=values.index)
    names = [f"up to {low_text}", f"{low_text} to {high_text}", f"above {high_text}"]
    third = np.select([values <= low, values <= high], [0, 1], 2)
    return pd.Series(pd.Categorical.from_codes(third, pd.Index(names)), index=values.index)


def _flag(part: dict[str, Estimate], overall: dict[str, Estimate]) -> str:
    for name, estimate in part.items():
        whole = overall[name].value
        if estimate.low is None or estimate.high is None or whole is None or estimate.groups < FEWEST:
            continue
        if not estimate.low <= whole <= estimate.high:
            return f"{name} {'below' if estimate.high < whole else 'above'} the {whole:.3f} of all slices"
    return ""
