"""The page about the model: what it was trained on, what it scored with which certainty, and what its card says.

Everything comes from the bundle, so that the page cannot praise a model that is not in use.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from chestct.models.bundle import Bundle
from chestct.serving import text
from chestct.serving.answer import MARKDOWN

METRICS = (
    ("auroc", "AUROC", "how well the scores order cancer above normal; 0.5 is chance, 1 perfect"),
    ("sensitivity", "Sensitivity", "share of the cancers that are found"),
    ("specificity", "Specificity", "share of the normal slices that are left alone"),
    ("precision", "Precision", "share of the slices called cancer that are cancer"),
    ("npv", "Negative predictive value", "share of the slices called normal that are normal"),
    ("balanced_accuracy", "Balanced accuracy", "mean of sensitivity and specificity"),
    ("accuracy", "Accuracy", "share of the slices that are called right"),
    ("ece", "Calibration error", "mean gap between probability and what came true; 0 is best"),
    ("brier", "Brier score", "mean squared error of the probability; 0 is best"),
)
"""Key in the bundle's metrics, name, and what it means."""

SPLITS = {
    "test": "Test (never used for anything else)",
    "valid": "Validation (threshold and calibration were set on it)",
}


def render(bundle: Bundle) -> str:
    """The whole page as HTML."""
    return (
        f'<article class="about prose"><h2>About the model</h2>{_summary(bundle)}{metrics_table(bundle.facts)}'
        f"{score_plot(bundle)}<section><h3>Model card</h3>{MARKDOWN.render(_lowered(bundle.card))}</section></article>"
    )


def _summary(bundle: Bundle) -> str:
    facts, data = bundle.facts, bundle.facts.get("data", {})
    slices = ", ".join(f"{count:,} {split}" for split, count in data.get("slices", {}).items())
    rows = {
        "Bundle": f"<code>{escape(bundle.id)}</code>",
        "Made with": f"chestct {escape(str(facts.get('chestct', '')))}",
        "Task": "cancer or normal" if bundle.task == "binary" else "normal and three kinds of carcinoma",
        "Slices": escape(slices),
        "It sees": f"{bundle.preprocess.size} × {bundle.preprocess.size} pixels; DICOM through the window "
        f"{bundle.window.center:.0f} / {bundle.window.width:.0f} HU",
        "Threshold": escape(text.threshold_meaning(bundle.point)),
    }
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items() if value) + "</dl>"


def metrics_table(facts: Mapping[str, Any]) -> str:
    """Metrics of test and validation with their intervals; "" where the bundle has none."""
    splits = {split: facts.get("metrics", {}).get(split) for split in SPLITS}
    splits = {split: found for split, found in splits.items() if found}
    if not splits:
        return ""
    body = ""
    for key, name, meaning in METRICS:
        cells = [_estimate(found.get(key)) for found in splits.values()]
        if any(cells):
            body += (
                f'<tr><th scope="row">{name}<small>{meaning}</small></th>'
                + "".join(f"<td>{cell or '–'}</td>" for cell in cells)
                + "</tr>"
            )
    head = "".join(f'<th scope="col">{SPLITS[split]}</th>' for split in splits)
    return f"""<section><h3>What it scored</h3><div class="scroll" role="region" aria-label="Metrics" tabindex="0">
<table class="metrics"><thead><tr><th scope="col">Metric</th>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p class="small">In brackets: 95 % intervals, with copies and near-copies of a slice counted as one.</p></section>"""


def _estimate(found: Any) -> str:
    """A metric's cell: value, interval and what it rests on. found: an Estimate as JSON, a number or None."""
    if found is None:
        return ""
    if not isinstance(found, Mapping):
        return f"{float(found):.3f}"
    if found.get("value") is None:
        return f"undefined <small>{escape(str(found.get('reason', '')))}</small>"
    interval = ""
    if found.get("low") is not None and found.get("high") is not None:
        interval = f" <span>[{found['low']:.3f}, {found['high']:.3f}]</span>"
    count = f"<small>{found['slices']:,} slices</small>" if found.get("slices") else ""
    return f"<b>{found['value']:.3f}</b>{interval}{count}"


def score_plot(bundle: Bundle, bins: int = 20) -> str:
    """How probabilities of validation slices are spread, with the threshold, as inline SVG; "" without the figures.

    The bundle holds quantiles; the shares of slices in equal bins follow from them by interpolation.
    """
    quantiles = bundle.facts.get("statistics", {}).get("score")
    if not quantiles:
        return ""
    edges = np.linspace(0, 1, bins + 1)
    below = np.searchsorted(np.asarray(quantiles), edges, side="left") / len(quantiles)
    below[-1] = 1.0
    shares = np.diff(below)
    left, top, wide, high = 44, 16, 520, 180
    bar = wide / bins
    peak = max(float(shares.max()), 1e-9)
    threshold = bundle.point.threshold
    at = left + wide * min(1.0, threshold)
    anchor, nudge = ("end", -6) if threshold > 0.6 else ("start", 6)
    bars = "".join(
        f'<rect class="{"above" if edges[i] + 1e-9 >= threshold else "below"}" x="{left + i * bar + 1:.1f}" '
        f'y="{top + high * (1 - share / peak):.1f}" width="{bar - 2:.1f}" height="{high * share / peak:.1f}"/>'
        for i, share in enumerate(shares)
    )
    ticks = "".join(
        f'<text x="{left + wide * x:.0f}" y="{top + high + 18}" text-anchor="middle">{100 * x:.0f} %</text>'
        for x in (0, 0.25, 0.5, 0.75, 1)
    )
    return f"""<section><h3>How its probabilities are spread</h3>
<svg class="plot" viewBox="0 0 600 240" role="img" aria-label="Shares of validation slices by probability of cancer;
the threshold lies at {text.percent(threshold)}">
{bars}<line class="axis" x1="{left}" x2="{left + wide}" y1="{top + high}" y2="{top + high}"/>{ticks}
<line class="threshold" x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="{top + high}"/>
<text class="mark" x="{at + nudge:.1f}" y="14" text-anchor="{anchor}">threshold {text.percent(threshold)}</text>
<text x="{left + wide / 2}" y="{top + high + 38}" text-anchor="middle">probability of cancer, validation slices</text>
</svg></section>"""


def _lowered(card: str) -> str:
    """The card without its title and with its headings two levels down: it stands below a heading of the page."""
    lines = card.lstrip().splitlines()
    lines = lines[1:] if lines and lines[0].startswith("# ") else lines
    return "\n".join(f"##{line}" if line.startswith("#") else line for line in lines)
