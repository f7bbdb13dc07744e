"""The page about the model: what it was trained on, what it scored with which certainty, and what its card says.

Everything comes from the bundle, so that the page cannot praise a model that is not in use.
"""

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from chestct.models.bundle import Bundle
from chestct.serving import sentences as text
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
    card = MARKDOWN.render(re.sub(r"^#", "###", text.body(bundle.card), flags=re.MULTILINE))  # below a heading of ours
    return (
        f'<article class="about prose"><h2>About the model</h2>{first}{_summary(bundle)}{metrics_table(bundle.facts)}'
        f"{reliability_plot(bundle)}<details><summary>The whole model card</summary>{card}</details></article>"
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
        f'<line class="spread" x1="{_x(point["score"])}" x2="{_x(point["score"])}" y1="{_y(point["low"])}" '
        f'y2="{_y(point["high"])}"/><circle class="point" cx="{_x(point["score"])}" cy="{_y(point["observed"])}" '
        f'r="{3 + 12 * (point["n"] / count) ** 0.5:.1f}"><title>{point["n"]:.0f} slices with a mean probability of '
        f"{text.percent(point['score'])}: {point['observed']:.0%} cancer</title></circle>"
        for point in points
    )
    ticks = "".join(
        f'<text x="{_x(share)}" y="{_y(0) + 18}" text-anchor="middle">{share:.0%}</text>'
        f'<text x="{_x(0) - 8}" y="{_y(share) + 4}" text-anchor="end">{share:.0%}</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    threshold = bundle.point.threshold
    return f"""<section><h3>Does the probability hold?</h3><svg class="plot" viewBox="0 0 470 300" role="img"
aria-label="Reliability: probability of cancer against the share of test slices that are cancer">
<line class="axis" x1="{_x(0)}" x2="{_x(1)}" y1="{_y(0)}" y2="{_y(0)}"/>{ticks}
<line class="ideal" x1="{_x(0)}" y1="{_y(0)}" x2="{_x(1)}" y2="{_y(1)}"/>
<line class="threshold" x1="{_x(threshold)}" x2="{_x(threshold)}" y1="{_y(0)}" y2="{_y(1)}"/>
<text class="mark" x="{_x(threshold) + 6}" y="{_y(1) + 8}">threshold</text>{marks}
<text x="{_x(0.5)}" y="{_y(0) + 40}" text-anchor="middle">probability of cancer</text></svg>
<p class="small">Height: share of the test slices with that probability that are cancer. On the dashed line, of those
with 75 % three in four are. {count:,.0f} slices in ten bins; larger dots stand for more of them, bars are 95 %
intervals.</p></section>"""


def _x(share: float) -> float:
    return round(52 + 400 * share, 1)


def _y(share: float) -> float:
    return round(16 + 230 * (1 - share), 1)
