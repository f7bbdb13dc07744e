"""What the page says about the model, as Markdown: its data, its metrics with their intervals, and its card.

Everything comes from the bundle, so that the page cannot praise a model that is not in use.
"""

import re
from collections.abc import Mapping
from typing import Any

from chestct.models.bundle import Bundle
from chestct.serving.sentences import card_body, card_findings, percent, plain, threshold_meaning

METRICS = {
    "auroc": ("AUROC", "how well the scores order cancer above normal; 0.5 is chance, 1 perfect"),
    "sensitivity": ("Sensitivity", "share of the cancers that are detected"),
    "specificity": ("Specificity", "share of the normal slices that are left alone"),
    "precision": ("Precision", "share of the slices called cancer that are cancer"),
    "npv": ("Negative predictive value", "share of the slices called normal that are normal"),
    "balanced_accuracy": ("Balanced accuracy", "mean of sensitivity and specificity"),
    "accuracy": ("Accuracy", "share of the slices that are called right"),
    "ece": ("Calibration error", "mean gap between probability and what came true; 0 is best"),
    "brier": ("Brier score", "mean squared error of the probability; 0 is best"),
}
"""Name and meaning by the key in the bundle's metrics."""

SPLITS = {
    "test": "Test (never used for anything else)",
    "valid": "Validation (threshold and calibration were set on it)",
}


def model_facts(bundle: Bundle) -> str:
    """What to know first, what the model was trained on, what it scored."""
    parts = {
        "What to know first": card_findings(bundle.card),
        "What it is": _summary(bundle),
        "What it scored": metrics_table(bundle.facts),
        "Does the probability hold?": reliability(bundle.facts),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items() if text)


def model_card(bundle: Bundle) -> str:
    """The whole card, its headings below those of the page."""
    return re.sub(r"^#", "###", card_body(bundle.card), flags=re.MULTILINE)


def _summary(bundle: Bundle) -> str:
    facts = bundle.facts
    slices = ", ".join(f"{count:,} {split}" for split, count in facts.get("data", {}).get("slices", {}).items())
    lines = {
        "Bundle": f"`{bundle.id}`, made with chestct {plain(str(facts.get('chestct', '')))}",
        "Task": "cancer or normal" if bundle.task == "binary" else "normal and three kinds of carcinoma",
        "Slices": plain(slices),
        "It sees": f"{bundle.preprocess.size} × {bundle.preprocess.size} pixels; DICOM through the window "
        f"{bundle.window.center:.0f} / {bundle.window.width:.0f} HU",
        "Threshold": threshold_meaning(bundle.point),
    }
    return "\n".join(f"- **{name}**: {value}" for name, value in lines.items() if value)


def metrics_table(facts: Mapping[str, Any]) -> str:
    """Metrics of test and validation with their intervals; "" where the bundle has none."""
    splits = {split: facts["metrics"][split] for split in SPLITS if facts.get("metrics", {}).get(split)}
    rows = []
    for key, (name, meaning) in METRICS.items():
        cells = [_estimate(metrics.get(key)) for metrics in splits.values()]
        if any(cells):
            rows.append([f"**{name}**: {meaning}", *(cell or "–" for cell in cells)])
    if not rows:
        return ""
    note = "In brackets: 95 % intervals, with copies and near-copies of a slice counted as one."
    return f"{_table(['Metric', *(SPLITS[split] for split in splits)], rows)}\n\n{note}"


def _estimate(metric: Any) -> str:
    """A metric's cell: value, interval and what it rests on. metric: an Estimate as JSON, a number or None."""
    if metric is None:
        return ""
    if not isinstance(metric, Mapping):
        return f"{float(metric):.3f}"
    if metric.get("value") is None:
        return f"undefined: {plain(str(metric.get('reason', '')))}"
    interval, count = "", ""
    if metric.get("low") is not None and metric.get("high") is not None:
        interval = f" [{metric['low']:.3f}, {metric['high']:.3f}]"
    if metric.get("slices"):
        count = f", {metric['slices']:,} slices"
    return f"**{metric['value']:.3f}**{interval}{count}"


def reliability(facts: Mapping[str, Any]) -> str:
    """How many test slices of a probability really were cancer; "" where the bundle does not say."""
    bins = facts.get("reliability", {}).get("test")
    if not bins:
        return ""
    rows = [
        [
            percent(one["score"]),
            f"**{one['observed']:.0%}** [{one['low']:.0%}, {one['high']:.0%}]",
            f"{one['n']:,.0f}",
        ]
        for one in bins
    ]
    return (
        f"{_table(['Probability of cancer (mean of the bin)', 'Test slices with it that are cancer', 'Slices'], rows)}"
        "\n\nThe probability holds where the first two columns agree. In brackets: 95 % intervals."
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
