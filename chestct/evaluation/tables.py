"""Tables of figures that are made for several sources and seeds, as the protocol has them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from chestct.stats.metrics import Estimate

Table = list[dict[str, Any]]

FEWEST_UNITS = 3
"""Units (groups) of a source without which an interval over them means nothing, and none is given."""


@dataclass(frozen=True)
class Part:
    """A table of the protocol; cells are text, numbers, Estimates and Spreads, None where a figure is not available."""

    title: str
    rows: Table
    notes: list[str]


@dataclass(frozen=True)
class Spread:
    """The same figure of each single seed."""

    values: list[float]

    def __str__(self) -> str:
        sd = f" ± {np.std(self.values, ddof=1):.3f}" if len(self.values) > 1 else ""
        return f"{np.mean(self.values):.3f}{sd}"


def believed(row: dict[str, Any]) -> dict[str, Any]:
    """A row without intervals that rest on too few units."""
    return {
        name: dataclasses.replace(cell, low=None, high=None, reason=f"no interval over {cell.groups} groups")
        if isinstance(cell, Estimate) and cell.low is not None and cell.groups < FEWEST_UNITS
        else cell
        for name, cell in row.items()
    }


def mean_and_worst(rows: Table) -> Table:
    """Mean and worst of each column of figures."""
    mean: dict[str, Any] = {"held out": "mean"}
    worst: dict[str, Any] = {"held out": "worst"}
    columns = dict.fromkeys(name for row in rows for name in row if name not in ("threshold", "groups"))
    for column in columns:
        cells = [row.get(column) for row in rows]
        spreads = np.array([cell.values for cell in cells if isinstance(cell, Spread)])
        values = [cell.value if isinstance(cell, Estimate) else cell for cell in cells]
        figures = [value for value in values if isinstance(value, float)]
        if len(spreads):
            mean[column], worst[column] = Spread(spreads.mean(0).tolist()), Spread(spreads.min(0).tolist())
        elif figures:
            mean[column] = float(np.mean(figures))
            worst[column] = max(figures) if column == "ECE" else min(figures)
            if estimates := [cell for cell in cells if isinstance(cell, Estimate)]:
                rests_on = sum(cell.slices for cell in estimates), sum(cell.groups for cell in estimates)
                mean[column] = Estimate(mean[column], None, None, *rests_on)
                worst[column] = Estimate(worst[column], None, None, *rests_on)
    return [mean, worst]


def filled(rows: Table) -> Table:
    """Rows with all columns in one order; what single seeds reach is left out where there is one."""
    columns = dict.fromkeys(name for row in rows for name in row)
    single = {name for row in rows for name, cell in row.items() if isinstance(cell, Spread) and len(cell.values) == 1}
    return [{name: row.get(name, "") for name in columns if name not in single} for row in rows]
