"""The report of an evaluation: one HTML file for people, JSON and Parquet for machines, pictures for MLflow.

Everything is told from the Evaluation alone; nothing is measured here that the JSON does not hold too. Each number
stands with its interval and what it rests on, or as n/a with the reason.
"""

import dataclasses
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import chestct.audit
from chestct.audit.pictures import save
from chestct.config.schema import classes_of
from chestct.evaluation.evaluate import Evaluation
from chestct.models.novelty import FOREIGN
from chestct.reporting import figures as plots
from chestct.reporting.canvas import png, svg
from chestct.reporting.gallery import gallery
from chestct.reporting.model_card import model_card, predictive
from chestct.reporting.text import (
    HEADLINE,
    beside,
    called,
    cancer,
    counted,
    doubts,
    headline,
    interval,
    known,
    sections,
)
from chestct.stats.bootstrap import effective_size
from chestct.stats.calibration import expected_calibration_error, wilson
from chestct.stats.metrics import Estimate

COLUMNS = {
    "test": ("auroc", "auroc_low", "auroc_high", "accuracy", "sensitivity", "specificity", "ece", "margin"),
    "valid": ("auroc", "log_loss"),
}
"""Split -> metrics of metrics.json."""

STEPS = 120
"""Positions of the report's threshold slider."""


def write(found: Evaluation, out: Path) -> None:
    """Writes everything that an evaluation leaves behind into the folder `out`, each file whole or not at all.

    metrics.json (the columns of `dvc exp show`), evaluation.json (all, with reasons), predictions.parquet, the points
    of `dvc plots` with a picture each, report.html and MODEL_CARD.md.
    """
    out.mkdir(parents=True, exist_ok=True)
    save(out / "metrics.json", _json(columns(flat(found)), indent=1))
    save(out / "evaluation.json", _json(to_json(found), indent=1))
    table = io.BytesIO()
    found.table.to_parquet(table, index=False)
    save(out / "predictions.parquet", table.getvalue())
    for name, points in plots.data(found).items():
        save(out / f"{name}.json", _json(points))
    figures = plots.figures(found)
    for name, figure in ({**figures, "confusion": plots.draw_confusion(found)}).items():
        if not isinstance(figure, str):
            save(out / f"{name}.png", png(figure))
    save(out / "MODEL_CARD.md", model_card(found).encode("utf-8", "backslashreplace"))
    # File names may hold bytes that are no UTF-8; they are shown as escapes.
    save(out / "report.html", html(found, figures).encode("utf-8", "backslashreplace"))


def flat(found: Evaluation) -> dict[str, dict[str, Any]]:
    """The headline values of each split as plain numbers, `NAME`, `NAME_low`, `NAME_high`; None where undefined."""
    result: dict[str, dict[str, Any]] = {}
    for split, estimates in found.metrics.items():
        part = found.table[found.table["split"] == split]
        values: dict[str, Any] = {"slices": len(part), "groups": int(part["group"].nunique())}
        for name in (name for name in HEADLINE if name in estimates):
            values |= _ends(name, estimates[name])
        result[split] = values
    if found.headline.margin is not None:
        result["test"] |= {"shortcut_auroc": found.headline.shortcut_auroc, **_ends("margin", found.headline.margin)}
    return plain(result | {"about": found.about})


def columns(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of `flat`, what one compares experiments by: few enough to read beside the settings that differ."""
    return {
        split: {name: values[split].get(name) for name in names} for split, names in COLUMNS.items() if split in values
    }


def _ends(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def to_json(found: Evaluation) -> dict[str, Any]:
    """The whole evaluation as plain values; undefined numbers are None with a reason beside them."""
    return plain(
        {
            "headline": headline(found),
            "doubts": doubts(found),
            "about": found.about,
            "operating_point": found.point.to_dict(),
            "metrics": found.metrics,
            "side_by_side": found.rows,
            "operating_points": operating_points(found),
            "sections": {name: section for name, section in found.sections.items() if name != "audit"},
        }
    )


def plain(value: Any) -> Any:
    """Dataclasses, tables and NumPy values as what JSON knows; NaN and infinity as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, pd.DataFrame):
        return plain(value.to_dict("records"))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _json(value: Any, indent: int | None = None) -> bytes:
    # allow_nan=False: an undefined number has to be None with a reason, and a NaN that slips through is a bug.
    return (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode()


def html(found: Evaluation, figures: Mapping[str, Any] | None = None) -> str:
    """The report for people: one file that fetches nothing, light and dark, for screen, phone and paper."""
    environment = Environment(
        loader=FileSystemLoader(
            [Path(__file__).with_name("templates"), Path(chestct.audit.__file__).parent]
        ),  # shared style sheet
        autoescape=True,  # file names come from strangers
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"called": called, "interval": interval, "known": known}
    environment.globals |= {"cancer": cancer, "counted": counted}
    figures = plots.figures(found) if figures is None else figures
    return environment.get_template("report.html.j2").render(
        found=found,
        cfg=found.cfg,
        about=found.about,
        point=found.point,
        sections=sections(found) | plain({name: found.sections.get(name) for name in ("robustness", "shift")}),
        headline=headline(found),
        doubts=doubts(found),
        figures={n: f if isinstance(f, str) else svg(f, n) for n, f in figures.items()},
        undefined={name for name, figure in figures.items() if isinstance(figure, str)},
        calibration=calibration_errors(found),
        confusion=plots.confusion_table(found).tolist(),
        decided=decided_table(found),
        classes=classes_of(found.cfg.task),
        beside=beside(found),
        uncertain=int((found.test["decision"] == "uncertain").sum()),
        refused=refused(found),
        made=facts(found),
        splits=[name for name in ("test", "valid", "train") if name in found.metrics],
        operating=operating_points(found),
        counts=counts(found),
        galleries=gallery(found),
    )


def counts(found: Evaluation) -> list[dict[str, Any]]:
    """Slices and groups of every split and class; train too where the data is at hand."""
    columns = ["split", "label", "subtype", "group"]
    table = found.table if found.data is None else found.data.manifest
    grouped = table[columns].groupby(["split", "label", "subtype"], sort=False)["group"]
    rows = [
        {"split": split, "label": label, "subtype": subtype, "slices": len(group), "groups": group.nunique()}
        for (split, label, subtype), group in grouped
    ]
    order = ("train", "valid", "test", "normal", "cancer")
    return sorted(rows, key=lambda row: (order.index(row["split"]), order.index(row["label"]), row["subtype"]))


def facts(found: Evaluation) -> dict[str, Any]:
    """How the numbers came about, by what a person calls it."""
    about = {key: value for key, value in found.about.items() if key in ("checkpoint", "bundle", "data_hash", "task")}
    return {
        **found.sections.get("made", {"command": "not recorded"}),
        **{key.replace("_", " "): value for key, value in about.items()},
        "split": ", ".join(f"{key} {value}" for key, value in found.about.get("splitting", {}).items())
        or found.about["split"],
        "seed": found.cfg.seed,
    }


def refused(found: Evaluation) -> list[dict[str, Any]]:
    """How many slices of each split and class are novel, and how often the model errs on them and on others."""
    rows = []
    for (split, label), part in found.table.groupby(["split", "label"], sort=False):
        novel, groups = (part["novelty"] > 1).to_numpy(), part["group"].to_numpy()
        wrong = ((1 - part["probability_normal"] >= found.point.threshold) != (part["label"] == "cancer")).to_numpy()
        share = _share(novel, groups, np.ones(len(part), bool))
        errors = {
            "inside": (int(wrong[novel].sum()), int(novel.sum())),
            "outside": (int(wrong[~novel].sum()), int((~novel).sum())),
        }
        beyond = int((part["novelty"] > FOREIGN).sum())
        rows.append({"split": split, "label": label, "share": share, "refused": beyond, **errors})
    return rows


def decided_table(found: Evaluation) -> list[dict[str, Any]]:
    """What became of the test slices of each class when the unsure ones are left to a person."""
    test = found.test
    names = np.array(classes_of(found.cfg.task))[test["target"]]
    held = np.array([name in held.split(" or ") for name, held in zip(names, test["set"], strict=True)])
    return [
        {
            "truth": name,
            "covered": int(held[test["label"] == name].sum()),
            **{decision: int((part["decision"] == decision).sum()) for decision in DECISIONS},
        }
        for name in ("normal", "cancer")
        if len(part := test[test["label"] == name])
    ]


DECISIONS = ("normal", "uncertain", "cancer")


def calibration_errors(found: Evaluation) -> dict[str, dict[str, float]]:
    """ECE with bins of equal width and of equal count, of test scores before and after calibration."""
    truth = (found.test["label"] == "cancer").to_numpy(int)
    return {
        when: {
            "ece": expected_calibration_error(score, truth),
            "adaptive": expected_calibration_error(score, truth, adaptive=True),
        }
        for when, score in plots.before_after(found)
    }


def operating_points(found: Evaluation) -> dict[str, Any]:
    """What thresholds do on validation and test, as text: the columns, the rows, and the row of the frozen threshold.

    A row holds the threshold and, for each split, sensitivity and specificity (Wilson's interval with the effective
    number of slices), then PPV and NPV at each prevalence, between what the ends of both intervals would give.
    """
    splits = [name for name in ("valid", "test") if name in found.metrics]
    tables = {name: found.table[found.table["split"] == name] for name in splits}
    scores = np.concatenate([1 - table["probability_normal"].to_numpy() for table in tables.values()])
    # From neighbour to neighbour something changes; even steps would jump over where scores are dense.
    grid = np.unique(np.quantile(scores, np.linspace(0, 1, STEPS), method="nearest"))
    thresholds = np.unique(np.append(grid, found.point.threshold))
    prevalences = [f"{100 * p:g} % cancer" for p in found.cfg.evaluation.prevalences]
    labels = ["Sensitivity", "Specificity", *(f"{name} at {p}" for p in prevalences for name in ("PPV", "NPV"))]
    return {
        "splits": splits,
        "labels": labels,
        "rows": [[known(float(t)), *(_rates(tables[name], float(t), found) for name in splits)] for t in thresholds],
        "frozen": int(np.searchsorted(thresholds, found.point.threshold)),
    }


def _rates(table: pd.DataFrame, threshold: float, found: Evaluation) -> list[str]:
    flagged = 1 - table["probability_normal"].to_numpy() >= threshold
    truth, group = (table["label"] == "cancer").to_numpy(), table["group"].to_numpy()
    sensitivity, specificity = _share(flagged, group, truth), _share(~flagged, group, ~truth)
    values = predictive(sensitivity, specificity, found.cfg.evaluation.prevalences)
    at_prevalence = [interval(row[name]) for row in values for name in ("ppv", "npv")]
    missing = ["n/a"] * (2 * len(found.cfg.evaluation.prevalences))
    return [interval(sensitivity), interval(specificity), *(at_prevalence or missing)]


def _share(hit: np.ndarray, group: np.ndarray, base: np.ndarray) -> Estimate:
    if not base.any():
        return Estimate(None, None, None, 0, 0)
    n = effective_size(hit[base], group[base])
    return Estimate(float(hit[base].mean()), *wilson(hit[base].mean() * n, n), int(base.sum()), 0)
