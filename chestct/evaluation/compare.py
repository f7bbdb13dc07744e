"""Is one run better than another? Both are measured on the slices that they share, in the same resamples of groups.

Pairing is the point: two runs err on much the same slices, so the difference is known far better than either value,
and two overlapping intervals say nothing about it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from chestct.config.schema import Config, classes_of
from chestct.errors import DataError
from chestct.stats.bootstrap import MIN_GROUPS, draws, percentiles
from chestct.stats.metrics import Sample, missing, proportions_of, sample_of, statistics

KEYS = ["source", "path", "content"]
POOLED = ("brier", "log_loss", "ece")
"""Metrics that need no class to occur."""


def compare(
    table_a: pd.DataFrame,
    table_b: pd.DataFrame,
    task: str,
    split: str = "test",
    scores: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    thresholds: tuple[float, float] = (0.5, 0.5),
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """The difference B - A of every metric on the slices of `split` that both tables of predictions hold.

    scores: calibrated scores [N, K] of each whole table, or None for the table's own; thresholds: of A and of B.
    Slices are matched by source, path and content; groups are those of A. Returns one row a metric: metric, a, b,
    difference, low, high (95 %, percentiles over the same draws of groups for both), excludes_zero, slices, groups and
    reason. Undefined values are None with a reason; so is an interval that rests on fewer than MIN_GROUPS groups of a
    class, or in which no draw shows a difference.

    Raises DataError if the tables share too few slices, disagree on a target, or were not made for `task`.
    """
    at_a, at_b = _shared(table_a, table_b, split)
    a, b = (
        _sample(table, task, values, threshold, at)
        for table, values, threshold, at in zip((table_a, table_b), scores, thresholds, (at_a, at_b), strict=True)
    )
    if wrong := int((a.target != b.target).sum()):
        raise DataError(f"{wrong} of {len(at_a)} shared slices have another target in the other run: labels differ.")
    groups = len(np.unique(a.group))
    if groups < MIN_GROUPS:
        raise DataError(
            f"The runs share {len(at_a)} {split} slices in {groups} groups; a comparison needs {MIN_GROUPS} groups. "
            "Evaluate both on the same data with the same data.split and data.split_seed."
        )
    ones = np.ones((1, len(at_a)))
    values_a, values_b = statistics(a, ones), statistics(b, ones)
    drawn: list[dict[str, np.ndarray]] = []
    for weights in draws(a.group, resamples, seed):
        drawn_a, drawn_b = statistics(a, weights), statistics(b, weights)
        drawn.append({name: drawn_b[name] - drawn_a[name] for name in drawn_a})
    rows = []
    for name in values_a:
        value_a, value_b = _plain(values_a[name][0]), _plain(values_b[name][0])
        differences = np.concatenate([part[name] for part in drawn])
        found = _difference(name, a, b, value_a, value_b, differences)
        rows.append({"metric": name, "a": value_a, "b": value_b} | found)
    return pd.DataFrame(rows, dtype=object)  # None stays None


def compare_runs(cfg: Config, out: Path) -> str:
    """Compares the two evaluations that cfg.compare names; writes comparison.json to `out`, returns it as text.

    Each is a predictions.parquet, or a folder that holds one or an `evaluation` folder with one. Raises DataError.
    """
    (name_a, a), (name_b, b) = ((name, _read(name)) for name in cfg.compare)
    frame = compare(a, b, _task(a), resamples=cfg.evaluation.resamples, seed=cfg.data.split_seed, **_calibrated(a, b))
    out.mkdir(parents=True, exist_ok=True)
    frame.to_json(out / "comparison.json", orient="records", indent=1)
    return compare_text(frame, name_a, name_b)


def _read(name: str) -> pd.DataFrame:
    """The table of predictions that a path names."""
    places = [Path(name), Path(name) / "predictions.parquet", Path(name) / "evaluation" / "predictions.parquet"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise DataError(
            f"No evaluation in {name}. Give the folder of a run or of an evaluation, or a predictions.parquet."
        )
    try:
        table = pd.read_parquet(found)
        return table.assign(flagged=table["flagged"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{found} is no table of predictions of this version ({error}). Evaluate the run again."
        ) from None


def _task(table: pd.DataFrame) -> str:
    return "binary" if "logit_cancer" in table else "subtype"


def _calibrated(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, Any]:
    """Calibrated scores and thresholds of both, as `compare` takes them."""
    names = [name for name in classes_of(_task(a)) if name != "normal" or _task(a) != "binary"]
    columns = [f"probability_{name}" for name in names]
    missing_in = [name for name, table in (("A", a), ("B", b)) if not set(columns) <= set(table)]
    if missing_in:
        raise DataError(f"Run {missing_in[0]} was evaluated for another task. Compare runs of one task.")
    return {"scores": (a[columns].to_numpy(), b[columns].to_numpy()), "thresholds": (_threshold(a), _threshold(b))}


def _threshold(table: pd.DataFrame) -> float:
    """A threshold that gives the decisions in the table."""
    cancer = 1 - table["probability_normal"]
    return float(cancer[table["flagged"]].min()) if table["flagged"].any() else 1.1


def compare_text(frame: pd.DataFrame, name_a: str, name_b: str) -> str:
    """`compare`'s table for the terminal; a star marks the differences whose interval excludes 0."""
    counts = f"{frame['slices'].max()} shared slices in {frame['groups'].max()} groups"
    lines = [f"A  {name_a}", f"B  {name_b}", f"   {counts}; B - A with its 95 % interval, * excludes 0", ""]
    width = max(len(name) for name in frame["metric"])
    lines.append(f"{'':{width}}  {'A':>8}  {'B':>8}  {'B - A':>8}")
    for row in frame.to_dict("records"):
        a, b, difference = (_text(row[key]) for key in ("a", "b", "difference"))
        interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]" if row["low"] is not None else row["reason"]
        star = "*" if row["excludes_zero"] else ""
        lines.append(f"{row['metric']:{width}}  {a:>8}  {b:>8}  {difference:>8}  {interval} {star}".rstrip())
    return "\n".join(lines)


def _shared(table_a: pd.DataFrame, table_b: pd.DataFrame, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Where the shared slices of the split stand in each table, int [M] each."""
    parts = []
    for name, table in (("A", table_a), ("B", table_b)):
        part = table[KEYS].assign(row=np.arange(len(table)))[(table["split"] == split).to_numpy()]
        if copies := int(part.duplicated(KEYS).sum()):
            raise DataError(f"Run {name} holds {copies} {split} slices twice; compare one evaluation with one other.")
        parts.append(part)
    both = parts[0].merge(parts[1], on=KEYS, suffixes=("_a", "_b"))
    if both.empty:
        raise DataError(
            f"The runs share no {split} slice: A has {len(parts[0])}, B has {len(parts[1])}. Evaluate both on the same "
            "data with the same data.split and data.split_seed."
        )
    return both["row_a"].to_numpy(), both["row_b"].to_numpy()


def _sample(table: pd.DataFrame, task: str, scores: np.ndarray | None, threshold: float, rows: np.ndarray) -> Sample:
    try:
        return sample_of(table.iloc[rows], task, None if scores is None else scores[rows], threshold)
    except KeyError as error:
        raise DataError(f"Not a table of task {task}: {error}. Compare runs of one task.") from error


def _difference(
    name: str, a: Sample, b: Sample, value_a: float | None, value_b: float | None, drawn: np.ndarray
) -> dict[str, object]:
    bases = [proportions_of(sample)[name][1] for sample in (a, b) if name in proportions_of(sample)]
    base = np.logical_or(*bases) if bases else np.ones(len(a.target), bool)
    found: dict[str, object] = {"difference": None, "low": None, "high": None, "excludes_zero": False}
    counts = {"slices": int(base.sum()), "groups": len(np.unique(a.group[base]))}
    if value_a is None or value_b is None:
        sample = a if value_a is None else b
        reason = proportions_of(sample)[name][2] if bases else missing(sample)
        return found | counts | {"reason": reason}
    found["difference"] = difference = value_b - value_a
    few = counts["groups"] if bases or name in POOLED else _smallest(a)
    if few < MIN_GROUPS:
        return found | counts | {"reason": f"no interval: {few} groups of a class, needs {MIN_GROUPS}"}
    low, high, reason = percentiles(drawn, difference)
    if low is not None and high is not None and high - low < 1e-12:
        low, high, reason = None, None, "no interval: the same difference in every resample"
    excludes = low is not None and high is not None and (low > 0 or high < 0)
    return found | counts | {"low": low, "high": high, "excludes_zero": excludes, "reason": reason}


def _smallest(sample: Sample) -> int:
    """Groups of the class that has fewest."""
    return min(len(np.unique(sample.group[sample.target == k])) for k in np.unique(sample.target))


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _text(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
