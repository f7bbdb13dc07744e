"""The report of an evaluation: one HTML file for people, JSON and Parquet for machines, figures, the model card.

Everything is written from the Evaluation alone; nothing is measured here that the JSON does not hold too. Each number
stands with its interval and what it rests on, or as n/a with the reason.
"""

import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from chestct.audit import inventory
from chestct.config.schema import classes_of
from chestct.evaluation.evaluate import Evaluation
from chestct.files import write_atomic
from chestct.models.novelty import FOREIGN
from chestct.reporting import environment, figures
from chestct.reporting.environment import format_number, interval
from chestct.reporting.gallery import gallery
from chestct.reporting.text import HEADLINE, cancer, caveats, comparison, covered, headline, rate, sections
from chestct.stats.calibration import expected_calibration_error
from chestct.stats.metrics import Estimate, predictive_values

COLUMNS = {
    "test": ("auroc", "auroc_low", "auroc_high", "accuracy", "sensitivity", "specificity", "ece", "margin"),
    "valid": ("auroc", "log_loss"),
}
"""Split -> metrics of metrics.json."""

STEPS = 120
"""Positions of the report's threshold slider."""


def write(evaluation: Evaluation, out: Path) -> None:
    """Writes everything that an evaluation leaves behind into the folder `out`, each file whole or not at all.

    metrics.json (the columns of `dvc exp show`), evaluation.json (all, with reasons), predictions.parquet, the points
    of `dvc plots`, figures as SVG, report.html and MODEL_CARD.md.
    """
    values = flat(evaluation)
    columns = {
        split: {name: values[split].get(name) for name in COLUMNS[split]} for split in COLUMNS if split in values
    }
    write_atomic(out / "metrics.json", _json(columns))
    write_atomic(out / "evaluation.json", _json(to_json(evaluation)))
    table = io.BytesIO()
    evaluation.table.to_parquet(table, index=False)
    write_atomic(out / "predictions.parquet", table.getvalue())
    for name, points in figures.points(evaluation).items():
        write_atomic(out / f"{name}.json", _json(points, indent=None))
    drawn = figures.figures(evaluation)
    for name, figure in drawn.items():
        if isinstance(figure, bytes):
            write_atomic(out / f"{name}.svg", figure)
    write_atomic(out / "MODEL_CARD.md", model_card(evaluation))
    write_atomic(out / "report.html", html(evaluation, drawn))


def flat(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """The headline values of each split as plain numbers, `NAME`, `NAME_low`, `NAME_high`; None where undefined."""
    result: dict[str, dict[str, Any]] = {}
    for split, estimates in evaluation.metrics.items():
        part = evaluation.table[evaluation.table["split"] == split]
        values: dict[str, Any] = {"slices": len(part), "groups": int(part["group"].nunique())}
        for name in (name for name in HEADLINE if name in estimates):
            values |= _ends(name, estimates[name])
        result[split] = values
    row = evaluation.headline
    if row.margin is not None:
        result["test"] |= {"shortcut_auroc": row.shortcut_auroc, **_ends("margin", row.margin)}
    return plain(result | {"about": evaluation.about})


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """The whole evaluation as plain values; undefined numbers are None with a reason next to them."""
    return plain(
        {
            "headline": headline(evaluation),
            "caveats": caveats(evaluation),
            "about": evaluation.about,
            "operating_point": evaluation.point.to_dict(),
            "metrics": evaluation.metrics,
            "side_by_side": evaluation.rows,
            "operating_points": operating_points(evaluation),
            "sections": {name: section for name, section in evaluation.sections.items() if name != "audit"},
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


def html(evaluation: Evaluation, drawn: Mapping[str, bytes | str] | None = None) -> str:
    """The report for people: one file that fetches nothing, light and dark, for screen, phone and paper."""
    drawn = figures.figures(evaluation) if drawn is None else drawn
    return environment.render(
        "evaluation.html.j2",
        **_common(evaluation),
        figures={n: environment.data_uri(f, "image/svg+xml") for n, f in drawn.items() if isinstance(f, bytes)},
        undefined={name: reason for name, reason in drawn.items() if isinstance(reason, str)},
        calibration=calibration_errors(evaluation),
        confusion=figures.confusion_table(evaluation).tolist(),
        decided=decided_table(evaluation),
        refused=refused(evaluation),
        made=facts(evaluation),
        operating=operating_points(evaluation),
        counts=counts(evaluation),
        galleries=gallery(evaluation),
    )


def model_card(evaluation: Evaluation) -> str:
    """The card as Markdown, with the metadata that model hubs read at its head."""
    test, novelty = evaluation.metrics["test"], evaluation.test["novelty"]
    prevalences = evaluation.cfg.evaluation.prevalences
    return environment.render(
        "model_card.md.j2",
        **_common(evaluation),
        values=predictive(cancer(test, "sensitivity"), cancer(test, "specificity"), prevalences),
        novel=int((novelty > 1).sum()),
        refused=int((novelty > FOREIGN).sum()),
        foreign=FOREIGN,
    )


def predictive(sensitivity: Estimate, specificity: Estimate, prevalences: Sequence[float]) -> list[dict[str, Any]]:
    """PPV and NPV at each prevalence, as Estimates: `prevalence`, `ppv`, `npv`; none where a class is missing.

    Both rise with sensitivity and with specificity: low and high are what both lower, both upper ends would give.
    """
    ends = [(getattr(sensitivity, end), getattr(specificity, end)) for end in ("value", "low", "high")]
    if any(None in pair for pair in ends):
        return []
    at = [predictive_values(*pair, prevalences) for pair in ends]

    def estimate(p: float, name: str) -> Estimate:
        value, low, high = (values[p][name] for values in at)
        return Estimate(value, low, high, 0, 0, "" if value is not None else "nothing is called so")

    return [{"prevalence": p, "ppv": estimate(p, "ppv"), "npv": estimate(p, "npv")} for p in prevalences]


def counts(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Slices and groups of every split and class; train too where the data is at hand."""
    table = evaluation.table if evaluation.data is None else evaluation.data.manifest
    return inventory.counts(table, table["split"])


def facts(evaluation: Evaluation) -> dict[str, Any]:
    """How the numbers came about, by what a person calls it."""
    about = evaluation.about
    kept = {key.replace("_", " "): about[key] for key in ("checkpoint", "bundle", "data_hash", "task") if key in about}
    splitting = ", ".join(f"{key} {value}" for key, value in about.get("splitting", {}).items())
    made = evaluation.sections.get("made", {"command": "not recorded"})
    return {**made, **kept, "split": splitting or about["split"], "seed": evaluation.cfg.seed}


def refused(evaluation: Evaluation) -> list[dict[str, Any]]:
    """How many slices of each split and class are novel, and how often the model errs on them and on others."""
    rows = []
    for (split, label), part in evaluation.table.groupby(["split", "label"], sort=False):
        novel = (part["novelty"] > 1).to_numpy()
        flagged = (1 - part["probability_normal"] >= evaluation.point.threshold).to_numpy()
        wrong = flagged != (part["label"] == "cancer").to_numpy()
        row = {"split": split, "label": label, "share": rate(novel, part["group"].to_numpy())}
        row |= {"refused": int((part["novelty"] > FOREIGN).sum())}
        row |= {"inside": (int(wrong[novel].sum()), int(novel.sum()))}
        rows.append(row | {"outside": (int(wrong[~novel].sum()), int((~novel).sum()))})
    return rows


def decided_table(evaluation: Evaluation) -> list[dict[str, Any]]:
    """What became of the test slices of each class when the unsure ones are left to a person."""
    table = evaluation.test.assign(covered=covered(evaluation))
    return [
        {"truth": name, "covered": int(part["covered"].sum())}
        | {decision: int((part["decision"] == decision).sum()) for decision in ("normal", "uncertain", "cancer")}
        for name in ("normal", "cancer")
        if len(part := table[table["label"] == name])
    ]


def calibration_errors(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """ECE with bins of equal width and of equal count, of test scores before and after calibration."""
    truth = (evaluation.test["label"] == "cancer").to_numpy(int)
    return {
        when: {
            "ece": expected_calibration_error(score, truth),
            "adaptive": expected_calibration_error(score, truth, adaptive=True),
        }
        for when, score in figures.before_after(evaluation)
    }


def operating_points(evaluation: Evaluation) -> dict[str, Any]:
    """What thresholds do on validation and test, as text: the columns, the rows, and the row of the frozen threshold.

    A row holds the threshold and, for each split, sensitivity and specificity (Wilson's interval with the effective
    number of slices), then PPV and NPV at each prevalence, between what the ends of both intervals would give.
    """
    splits = [name for name in ("valid", "test") if name in evaluation.metrics]
    tables = {name: evaluation.table[evaluation.table["split"] == name] for name in splits}
    scores = np.concatenate([1 - table["probability_normal"].to_numpy() for table in tables.values()])
    # From neighbour to neighbour something changes; even steps would jump over where scores are dense.
    grid = np.unique(np.quantile(scores, np.linspace(0, 1, STEPS), method="nearest"))
    thresholds = np.unique(np.append(grid, evaluation.point.threshold))
    prevalences = evaluation.cfg.evaluation.prevalences
    labels = [f"{name} at {100 * p:g} % cancer" for p in prevalences for name in ("PPV", "NPV")]
    rows = [
        [format_number(float(t)), *(_rates(tables[name], float(t), prevalences) for name in splits)] for t in thresholds
    ]
    return {
        "splits": splits,
        "labels": ["Sensitivity", "Specificity", *labels],
        "rows": rows,
        "frozen": int(np.searchsorted(thresholds, evaluation.point.threshold)),
    }


def _rates(table: pd.DataFrame, threshold: float, prevalences: Sequence[float]) -> list[str]:
    flagged = 1 - table["probability_normal"].to_numpy() >= threshold
    truth, group = (table["label"] == "cancer").to_numpy(), table["group"].to_numpy()
    sensitivity, specificity = rate(flagged[truth], group[truth]), rate(~flagged[~truth], group[~truth])
    values = predictive(sensitivity, specificity, prevalences)
    at_prevalence = [interval(row[name]) for row in values for name in ("ppv", "npv")]
    return [interval(sensitivity), interval(specificity), *(at_prevalence or ["n/a"] * (2 * len(prevalences)))]


def _common(evaluation: Evaluation) -> dict[str, Any]:
    """What report and model card both show."""
    tables = {name: plain(evaluation.sections.get(name)) for name in ("robustness", "shift")}
    return {
        "evaluation": evaluation,
        "cfg": evaluation.cfg,
        "about": evaluation.about,
        "point": evaluation.point,
        "sections": sections(evaluation) | tables,
        "headline": headline(evaluation),
        "caveats": caveats(evaluation),
        "rows": comparison(evaluation),
        "classes": classes_of(evaluation.cfg.task),
        "splits": [name for name in ("test", "valid", "train") if name in evaluation.metrics],
        "uncertain": int((evaluation.test["decision"] == "uncertain").sum()),
        "cancer": cancer,
    }


def _ends(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _json(value: Any, indent: int | None = 1) -> str:
    # allow_nan=False: an undefined number has to be None with a reason, and a NaN that slips through is a bug.
    return json.dumps(value, indent=indent, allow_nan=False) + "\n"
