"""The drift report for people: one HTML file, nothing fetched from anywhere, and a summary for terminals."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from chestct.files import write_atomic
from chestct.reporting.environment import render
from chestct.serving.predictor import NOT_MEDICAL
from chestct.serving.shift import FEWEST, SHARE_LARGE, SIGNIFICANT, Drift, Shift
from chestct.stats.drift import PSI_LARGE, PSI_MODERATE

BINS = 24


def write(drift: Drift, path: Path) -> None:
    """Writes the report, whole or not at all."""
    write_atomic(path, html(drift))


def html(drift: Drift) -> str:
    """The report as a self-contained page, light and dark."""
    return render(
        "drift.html.j2",
        drift=drift,
        period=period(drift),
        histograms={shift.name: histogram(shift) for shift in drift.shifts},
        known_mix=all(share is not None for _, share in drift.mix.values()),
        significant=SIGNIFICANT,
        large=PSI_LARGE,
        moderate=PSI_MODERATE,
        share_large=SHARE_LARGE,
        fewest=FEWEST,
        not_medical=NOT_MEDICAL,
    )


def summary(drift: Drift) -> str:
    """The report for a terminal, one line for each thing compared."""
    words = {"drift": "DRIFT", "small": "small", "same": "same", "unknown": "?"}
    lines = [f"Bundle {drift.bundle}{', ' + period(drift) if drift.slices else ''}. {drift.sentence}"]
    lines += [f"  {words[shift.verdict]:<7}{shift.title:<34}{shift.sentence}" for shift in drift.shifts]
    if drift.slices:
        mix = (f"{name} {count:,} ({count / drift.slices:.0%})" for name, (count, _) in drift.mix.items())
        lines.append(f"  Decisions: {', '.join(mix)}")
    if drift.others:
        lines.append(f"  {drift.others:,} records of other bundles were left out.")
    if drift.known:
        lines.append(f"  {drift.known:,} slices from the model's training data were left out.")
    return "\n".join(lines)


def period(drift: Drift) -> str:
    """From which day to which, "" without records."""
    if not drift.slices:
        return ""
    first, last = (time.strftime("%Y-%m-%d", time.gmtime(moment)) for moment in (drift.first, drift.last))
    return first if first == last else f"{first} to {last}"


def histogram(shift: Shift) -> dict[str, Any] | None:
    """Both distributions of a number: `before` and `now`, masses float [BINS] between `low` and `high`; else None.

    A percent on either side may lie far out, and would squeeze all the rest; it is counted in the outermost bins.
    """
    if shift.quantiles is None or shift.values is None:
        return None
    quantiles, values = shift.quantiles, shift.values
    low = min(quantiles[1], float(np.quantile(values, 0.01)))
    high = max(quantiles[-2], float(np.quantile(values, 0.99)))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    upto = np.interp(edges[1:-1], quantiles, np.linspace(0, 1, len(quantiles)))
    before = np.diff(np.concatenate([[0.0], upto, [1.0]]))
    now = np.bincount(np.searchsorted(edges[1:-1], values, side="left"), minlength=BINS) / len(values)
    return {"before": before, "now": now, "top": max(before.max(), now.max()), "low": edges[0], "high": edges[-1]}
