"""Where a model is worse than on the whole: by source and by subtype.

Each subgroup is judged by its share of right decisions, because many hold one class only and have no AUROC; a flag
marks one whose interval leaves out the value of all slices of the same class mix.
"""

from typing import Any

import pandas as pd

from chestct.config.schema import Config
from chestct.stats.metrics import Estimate, measure

FEWEST = 5
"""Groups below which a subgroup is listed, but not judged."""


def of_cancer(table: pd.DataFrame, cfg: Config) -> dict[str, Estimate]:
    """All metrics of cancer against normal, whatever the task, of predictions with their decisions."""
    scores = table.get("probability_cancer", 1 - table["probability_normal"])
    binary = table.assign(target=(table["label"] == "cancer").astype(int), probability_cancer=scores)
    return measure(binary, "binary", cfg.evaluation.resamples, cfg.data.split_seed)


def subgroups(test: pd.DataFrame, cfg: Config) -> list[dict[str, Any]]:
    """One row for each subgroup of the test slices: `by`, `name`, class counts, `sensitivity`, `specificity`, `auroc`
    (Estimates), and `flag`, a sentence where an interval leaves out the overall value.

    test: predictions with their decisions. Kinds that do not divide the slices are left out.
    """
    overall, rows = of_cancer(test, cfg), []
    for by in ("source", "subtype"):
        if test[by].nunique() < 2:
            continue
        for name, part in test.groupby(by):
            measured = of_cancer(part, cfg)
            estimates = {metric: measured[metric] for metric in ("sensitivity", "specificity", "auroc")}
            counts = {label: int((part["label"] == label).sum()) for label in ("normal", "cancer")}
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
