"""The report of an evaluation: one HTML file for people, JSON and Parquet for machines, figures, the model card."""

import dataclasses
import json
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chestct.evaluation.evaluate import Evaluation
from chestct.files import write_atomic
from chestct.models.novelty import FOREIGN
from chestct.reporting import environment, text
from chestct.reporting.figures import figures, gallery, points

COLUMNS = {
    "test": ("auroc", "auroc_low", "auroc_high", "accuracy", "sensitivity", "specificity", "ece", "margin"),
    "valid": ("auroc", "log_loss"),
}
"""Split -> metrics of metrics.json, the columns of `dvc exp show`."""


def write(evaluation: Evaluation, out: Path) -> None:
    """Writes metrics.json, evaluation.json (all, with reasons), predictions.parquet, the points of `dvc plots`, figures
    as SVG and report.html into `out`, each file whole or not at all; of a checkpoint MODEL_CARD.md, and of the
    protocol's parts, where they were measured, protocol.json, protocol.md and held_out.parquet.
    """
    values, drawn = flat(evaluation), figures(evaluation)
    files: dict[str, bytes | str] = {
        "metrics.json": _json({s: {name: values[s].get(name) for name in COLUMNS[s]} for s in evaluation.metrics}),
        "evaluation.json": _json(contents(evaluation)),
        "predictions.parquet": evaluation.table.to_parquet(index=False),
        **{f"{name}.json": _json(rows, indent=None) for name, rows in points(evaluation).items()},
        **{f"{name}.svg": figure for name, figure in drawn.items() if isinstance(figure, bytes)},
        "report.html": html(evaluation, drawn),
    }
    if "bundle" not in evaluation.about:  # which has its own card
        files["MODEL_CARD.md"] = model_card(evaluation)
    if parts := evaluation.sections.get("protocol"):
        files |= {"protocol.json": _json(parts), "protocol.md": _render("protocol.md.j2", evaluation)}
    if evaluation.held_out is not None:
        files["held_out.parquet"] = evaluation.held_out.to_parquet(index=False)
    for name, content in files.items():
        write_atomic(out / name, content)


def flat(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """The metrics of each split as plain numbers, `NAME`, `NAME_low`, `NAME_high`; None where undefined."""
    result = {}
    for split, estimates in evaluation.metrics.items():
        part = evaluation.table[evaluation.table["split"] == split]
        values: dict[str, Any] = {"slices": len(part), "groups": part["group"].nunique()}
        if split == "test" and evaluation.headline.margin:
            values["shortcut_auroc"] = evaluation.headline.shortcut_auroc
            estimates = estimates | {"margin": evaluation.headline.margin}
        for name, e in estimates.items():
            values |= {name: e.value, f"{name}_low": e.low, f"{name}_high": e.high}
        result[split] = values
    return result


def contents(evaluation: Evaluation) -> dict[str, Any]:
    """All that was measured; undefined numbers are None with a reason next to them."""
    return {
        "answer": text.answer(evaluation),
        "headline": text.headline(evaluation),
        "caveats": text.caveats(evaluation),
        "about": evaluation.about,
        "operating_point": dataclasses.asdict(evaluation.point),
        "metrics": evaluation.metrics,
        "side_by_side": evaluation.rows,
        "sections": {name: section for name, section in evaluation.sections.items() if name != "audit"},
    }


def html(evaluation: Evaluation, drawn: Mapping[str, bytes | str] | None = None) -> str:
    """The report for people: one file that fetches nothing, light and dark, for screen, phone and paper."""
    given = (drawn or figures(evaluation)).items()
    svg = {n: f"data:image/svg+xml;base64,{b64encode(f).decode()}" if isinstance(f, bytes) else f for n, f in given}
    return _render("evaluation.html.j2", evaluation, figures=svg, galleries=gallery(evaluation))


def model_card(evaluation: Evaluation) -> str:
    """The card of a checkpoint as Markdown, with the metadata that model hubs read at its head."""
    return _render("model_card.md.j2", evaluation)


def _render(template: str, evaluation: Evaluation, **values: Any) -> str:
    values |= {"evaluation": evaluation, "cfg": evaluation.cfg, "about": evaluation.about, "point": evaluation.point}
    return environment.render(template, text=text, test=evaluation.metrics["test"], foreign=FOREIGN, **values)


def _json(value: Any, indent: int | None = 1) -> str:
    # allow_nan=False: an undefined number has to be None with a reason, and a NaN that slips through is a bug.
    return json.dumps(value, indent=indent, allow_nan=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """Dataclasses, tables and NumPy values as what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "to_dict"):  # a DataFrame, whose undefined numbers are NaN
        return value.astype(object).where(value.notna(), None).to_dict("records")
    return value.tolist() if hasattr(value, "tolist") else str(value)
