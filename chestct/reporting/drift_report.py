"""The drift report for people: one HTML file, nothing fetched from anywhere, and a summary for terminals."""

import os
import time
from html import escape
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import chestct
from chestct.serving.predictor import NOT_MEDICAL
from chestct.serving.shift import FEWEST, SHARE_LARGE, SIGNIFICANT, Drift, Shift
from chestct.stats.drift import PSI_LARGE, PSI_MODERATE

STYLE = Path(chestct.__file__).parent / "audit"
"""Folder of the style sheet that all reports share; the audit itself needs pandas and scikit-learn, so only read."""

WIDTH, HEIGHT, BINS = 280, 92, 24


def write(drift: Drift, path: Path) -> None:
    """Writes the report, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(html(drift), "utf-8")
    part.replace(path)


def html(drift: Drift) -> str:
    """The report as a self-contained page, light and dark."""
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).with_name("templates"), STYLE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("drift.html.j2").render(
        drift=drift,
        period=period(drift),
        pictures={shift.name: picture(shift) for shift in drift.shifts},
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


def picture(shift: Shift) -> str:
    """Both distributions as SVG in the page's colours, or both shares as bars; "" for what was not judged."""
    if shift.verdict == "unknown":
        return ""
    if shift.quantiles is None or shift.values is None:
        return _bars(shift)
    quantiles, values = shift.quantiles, shift.values
    # A percent on either side may lie far out, and would squeeze all the rest; it is counted in the outermost bins.
    low = min(quantiles[1], float(np.quantile(values, 0.01)))
    high = max(quantiles[-2], float(np.quantile(values, 0.99)))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    inner = edges[1:-1]
    upto = np.interp(inner, quantiles, np.linspace(0, 1, len(quantiles)))
    before = np.diff(np.concatenate([[0.0], upto, [1.0]]))
    now = np.bincount(np.searchsorted(inner, values, side="left"), minlength=BINS) / len(values)
    top = max(before.max(), now.max())
    area = f"M0 {HEIGHT} {_steps(before / top)} L{WIDTH} {HEIGHT} Z"
    return _svg(
        f"{shift.title}: {shift.sentence}",
        f'<path class="before" d="{area}"/><path class="now" d="M{_steps(now / top)[1:]}"/>'
        f'<line class="axis-line" x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}"/>'
        f'<text x="0" y="{HEIGHT + 14}">{edges[0]:.3g}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 14}" text-anchor="end">{edges[-1]:.3g}</text>',
    )


def _steps(heights: np.ndarray) -> str:
    """A step line over the whole width, beginning with L."""
    step = WIDTH / len(heights)
    points = [(x * step, HEIGHT * (1 - heights[i])) for i in range(len(heights)) for x in (i, i + 1)]
    return " ".join(f"L{x:.1f} {y:.1f}" for x, y in points)


def _bars(shift: Shift) -> str:
    rows = ((20, "before", shift.before), (58, "now", shift.now))
    parts = []
    for y, kind, share in rows:
        paint = 'class="before"' if kind == "before" else 'fill="var(--test)"'
        where = "validation" if kind == "before" else "this window"
        parts.append(
            f'<text x="0" y="{y - 5}">{where}: {share:.1%}</text>'
            f'<rect class="track-line" x="0" y="{y}" width="{WIDTH}" height="14" fill="var(--wash)"/>'
            f'<rect {paint} x="0" y="{y}" width="{max(1.5, share * WIDTH):.1f}" height="14"/>'
        )
    return _svg(f"{shift.title}: {shift.sentence}", "".join(parts), 74)


def _svg(label: str, body: str, height: int = HEIGHT + 18) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'
