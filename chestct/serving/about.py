"""The page about the model: what it was trained on, what it scored with which certainty, and what its card says.

Everything comes from the bundle, so that the page cannot praise a model that is not in use.
"""

import re
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
    known = text.findings(bundle.card)
    first = f"<section><h3>What to know first</h3>{MARKDOWN.render(known)}</section>" if known else ""
    plots = reliability_plot(bundle) + score_plot(bundle)
    card = MARKDOWN.render(re.sub(r"^#", "###", text.body(bundle.card), flags=re.MULTILINE))  # below a heading of ours
    return (
        f'<article class="about prose"><h2>About the model</h2>{first}{_summary(bundle)}{metrics_table(bundle.facts)}'
        f'<div class="plots">{plots}</div>'
        f"<details><summary>The whole model card</summary>{card}</details></article>"
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


def reliability_plot(bundle: Bundle) -> str:
    """How often test slices of a probability really were cancer, as inline SVG; "" where the bundle does not say."""
    points = bundle.facts.get("reliability", {}).get("test")
    if not points:
        return ""
    count = sum(point["n"] for point in points)
    marks = "".join(
        f'<line class="spread" x1="{_x(point["score"]):.1f}" x2="{_x(point["score"]):.1f}" '
        f'y1="{_y(point["low"]):.1f}" y2="{_y(point["high"]):.1f}"/><circle class="point" '
        f'cx="{_x(point["score"]):.1f}" cy="{_y(point["observed"]):.1f}" r="{3 + 9 * (point["n"] / count) ** 0.5:.1f}">'
        f"<title>{point['n']:.0f} slices with a mean of {text.percent(point['score'])}: {point['observed']:.0%} cancer"
        "</title></circle>"
        for point in points
    )
    said = f"""On the dashed line, of the slices with 80 % eight in ten are cancer. The {count:,.0f} test slices in ten
bins of equal width; larger dots stand for more slices, bars are 95 % intervals."""
    label = "Reliability: probability of cancer against the share of test slices that are cancer"
    shares = "".join(f'<text x="{LEFT - 8}" y="{_y(y) + 4:.0f}" text-anchor="end">{y:.0%}</text>' for y in (0, 0.5, 1))
    ideal = f'<line class="threshold" x1="{_x(0)}" y1="{_y(0)}" x2="{_x(1)}" y2="{_y(1)}"/>'
    return _plot(
        "Does the probability hold?", label, shares + ideal + marks, "probability of cancer, test slices", said
    )


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
    peak = max(float(shares.max()), 1e-9)
    threshold, name = bundle.point.threshold, text.percent(bundle.point.threshold)
    at = _x(min(1.0, threshold))
    anchor, nudge = ("end", -6) if threshold > 0.6 else ("start", 6)
    bars = "".join(
        f'<rect class="{"above" if edges[i] + 1e-9 >= threshold else "below"}" x="{_x(edges[i]) + 1:.1f}" '
        f'y="{_y(share / peak):.1f}" width="{WIDE / bins - 2:.1f}" height="{HIGH * share / peak:.1f}"/>'
        for i, share in enumerate(shares)
    )
    mark = (
        f'<line class="threshold" x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="{_y(0)}"/>'
        f'<text class="mark" x="{at + nudge:.1f}" y="14" text-anchor="{anchor}">threshold {name}</text>'
    )
    label = f"Shares of validation slices by probability of cancer; the threshold lies at {name}"
    said = "Most slices lie near 0 or 100 % where the model is sure; what lies about the threshold is hard for it."
    return _plot("How sure is it?", label, bars + mark, "probability of cancer, validation slices", said)


LEFT, TOP, WIDE, HIGH = 44, 20, 400, 220
"""The field of a plot within its 460 x 290."""


def _x(share: float) -> float:
    return LEFT + WIDE * share


def _y(share: float) -> float:
    return TOP + HIGH * (1 - share)


def _plot(title: str, label: str, drawn: str, below: str, said: str) -> str:
    """A figure with percents from left to right."""
    ticks = "".join(
        f'<text x="{_x(x):.0f}" y="{_y(0) + 18}" text-anchor="middle">{x:.0%}</text>' for x in (0, 0.25, 0.5, 0.75, 1)
    )
    return f"""<section><h3>{title}</h3><svg class="plot" viewBox="0 0 460 290" role="img" aria-label="{escape(label)}">
<line class="axis" x1="{LEFT}" x2="{_x(1)}" y1="{_y(0)}" y2="{_y(0)}"/>{ticks}{drawn}
<text x="{_x(0.5)}" y="{_y(0) + 40}" text-anchor="middle">{below}</text></svg><p class="small">{said}</p></section>"""
