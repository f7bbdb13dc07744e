"""Where a model is worse than on the whole: by source and by subtype.

Each subgroup is judged by its share of right decisions, because many hold one class only and have no AUROC; a flag
marks one whose interval leaves out the value of all slices of the same class mix.
"""

from typing import Any

import pandas as pd

from chestct.stats.metrics import Estimate, measure

FEWEST = 5
"""Groups below which a subgroup is listed, but not judged."""


def subgroups(test: pd.DataFrame, threshold: float, *, resamples: int, seed: int) -> list[dict[str, Any]]:
    """One row for each subgroup of the test slices: `by`, `name`, class counts, `sensitivity`, `specificity`, `auroc`
    (Estimates), and `flag`, a sentence where an interval leaves out the overall value.

    test: predictions with the manifest's columns and calibrated probabilities. Kinds that do not divide the slices are
    left out.
    """
    table = test.assign(target=(test["label"] == "cancer").astype(int)).reset_index(drop=True)

    def measured(part: pd.DataFrame) -> dict[str, Estimate]:
        scores = 1 - part[["probability_normal"]].to_numpy()
        estimates = measure(part, "binary", scores, threshold, resamples=resamples, seed=seed)
        return {metric: estimates[metric] for metric in ("sensitivity", "specificity", "auroc")}

    overall, rows = measured(table), []
    for by in ("source", "subtype"):
        for name, part in table.groupby(by) if table[by].nunique() > 1 else ():
            estimates = measured(part)
            counts = {"normal": int((part["target"] == 0).sum()), "cancer": int((part["target"] == 1).sum())}
            counts["groups"] = int(part["group"].nunique())
            about = {"by": by, "name": str(name).replace("_", " ")}
            rows.append(about | counts | estimates | {"flag": _flag(estimates, overall)})
    return rows


def _flag(part: dict[str, Estimate], overall: dict[str, Estimate]) -> str:
    for name, estimate in part.items():
        whole = overall[name].value
        if estimate.low is None or estimate.high is None or whole is None or estimate.groups < FEWEST:
            continue
        if not estimate.low <= whole <= estimate.high:
            return f"{name} {'below' if estimate.high < whole else 'above'} the {whole:.3f} of all slices"
    return ""
