"""Is one run better than another? Both are measured on the slices that they share, in the same resamples of groups.

Pairing is the point: two runs err on much the same slices, so the difference is known far better than either value,
and two overlapping intervals say nothing about it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from chestct.config.schema import Config
from chestct.errors import DataError
from chestct.files import write_atomic
from chestct.stats.bootstrap import MIN_GROUPS, difference_interval, draws, fewest_groups
from chestct.stats.metrics import missing, sample_of, statistics

KEYS = ["source", "path", "content"]
POOLED = ("accuracy", "brier", "log_loss", "ece")
"""Metrics that need no class to occur."""


def compare_runs(cfg: Config, out: Path) -> str:
    """Compares the two evaluations that cfg.compare names; writes comparison.json to `out`, returns it as text.

    Each is a predictions.parquet, or a folder that holds one or an `evaluation` folder with one. Raises DataError.
    """
    a, b = (_read(name) for name in cfg.compare)
    frame = compare(a, b, cfg.evaluation.resamples, cfg.data.split_seed)
    write_atomic(out / "comparison.json", frame.to_json(orient="records", indent=1))
    return compare_text(frame, *cfg.compare)


def compare(table_a: pd.DataFrame, table_b: pd.DataFrame, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """The difference B - A of every metric on the test slices that both tables of predictions hold.

    Slices are matched by source, path and content; groups are those of A; each run decides by its own threshold.
    Returns one row a metric: metric, a, b, difference, low, high (95 %, percentiles over the same draws of groups for
    both), excludes_zero, slices, groups and reason. Undefined values are None with a reason; so is an interval that
    rests on fewer than MIN_GROUPS groups of a class, or in which no draw shows a difference.

    Raises DataError if the tables share too few slices, disagree on a target, or are of different tasks.
    """
    # By what was measured: a bundle of subtypes on slices that only say cancer still has four logits.
    task = "binary" if "probability_cancer" in table_a else "subtype"
    if ("probability_cancer" in table_b) != (task == "binary"):
        raise DataError("The runs were evaluated for different tasks. Compare runs of one task.")
    tests = [table[table["split"] == "test"].drop_duplicates(KEYS).set_index(KEYS) for table in (table_a, table_b)]
    shared = tests[0].index.intersection(tests[1].index, sort=False)
    n, groups = len(shared), tests[0].loc[shared, "group"].nunique()
    if groups < MIN_GROUPS:
        raise DataError(
            f"The runs share {n} test slices in {groups} groups (A has {len(tests[0])}, B has {len(tests[1])}); a "
            f"comparison needs {MIN_GROUPS} groups. Evaluate both on the same data with the same data.split and "
            "data.split_seed."
        )
    a, b = (sample_of(test.loc[shared], task) for test in tests)
    if wrong := int((a.target != b.target).sum()):
        raise DataError(f"{wrong} of {n} shared slices have another target in the other run: labels differ.")
    values = [{name: float(v[0]) for name, v in statistics(sample, np.ones((1, n))).items()} for sample in (a, b)]
    drawn = [(statistics(a, weights), statistics(b, weights)) for weights in draws(a.group, resamples, seed)]
    rows = []
    for name in values[0]:
        row: dict[str, Any] = {"metric": name, "a": values[0][name], "b": values[1][name]}
        row |= {"difference": row["b"] - row["a"], "low": None, "high": None, "excludes_zero": False, "reason": ""}
        if np.isnan(row["difference"]):
            row["reason"] = missing(a if np.isnan(row["a"]) else b)
        else:
            differences = np.concatenate([of_b[name] - of_a[name] for of_a, of_b in drawn])
            fewest = groups if name in POOLED else fewest_groups(a.target, a.group)
            low, high, reason = difference_interval(differences, row["difference"], fewest)
            excludes = low is not None and high is not None and (low > 0 or high < 0)
            row |= {"low": low, "high": high, "excludes_zero": excludes, "reason": reason}
        rows.append(row | {"slices": n, "groups": groups})
    frame = pd.DataFrame(rows, dtype=object)
    return frame.where(frame.notna(), None)


def _read(name: str) -> pd.DataFrame:
    """The table of predictions that a path names."""
    candidates = [Path(name), Path(name) / "predictions.parquet", Path(name) / "evaluation" / "predictions.parquet"]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise DataError(
            f"No evaluation in {name}. Give the folder of a run or of an evaluation, or a predictions.parquet."
        )
    try:
        table = pd.read_parquet(path)
        return table.assign(flagged=table["flagged"])
    except (OSError, ValueError, KeyError) as error:
        reason = f"{path} is no table of predictions of this version ({error}). Evaluate the run again."
        raise DataError(reason) from None


def compare_text(frame: pd.DataFrame, name_a: str, name_b: str) -> str:
    """`compare`'s table for the terminal; a star marks the differences whose interval excludes 0."""
    counts = f"{frame['slices'].max()} shared slices in {frame['groups'].max()} groups"
    lines = [f"A  {name_a}", f"B  {name_b}", f"   {counts}; B - A with its 95 % interval, * excludes 0", ""]
    width = max(len(name) for name in frame["metric"])
    lines.append(f"{'':{width}}  {'A':>8}  {'B':>8}  {'B - A':>8}")
    for row in frame.to_dict("records"):
        a, b, difference = ("n/a" if row[key] is None else f"{row[key]:.4f}" for key in ("a", "b", "difference"))
        interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]" if row["low"] is not None else row["reason"]
        star = "*" if row["excludes_zero"] else ""
        lines.append(f"{row['metric']:{width}}  {a:>8}  {b:>8}  {difference:>8}  {interval} {star}".rstrip())
    return "\n".join(lines)
