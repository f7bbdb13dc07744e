"""Pictures of predictions and of training, each with the numbers it was drawn from (for DVC and for your own plots).

One figure serves two: as PNG for MLflow, and as SVG in the report, where it takes its colours and its font from the
page, so that it follows light and dark. A curve that these slices do not define is a sentence that says why.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from sklearn import metrics as sk

from chestct.config.schema import classes_of
from chestct.evaluation.evaluate import Evaluation, calibrated
from chestct.reporting.canvas import CANCER, INK, NORMAL, PLAIN, SOFT, TEST, VALID, canvas
from chestct.reporting.text import cancer, interval, known
from chestct.stats.calibration import decision_curve, expected_calibration_error, reliability_table, risk_coverage
from chestct.stats.metrics import Estimate, confusion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUBTYPES = (PLAIN, "#0072B2", "#D55E00", "#009E73")
"""One hue a class, distinguishable with every common colour vision (Okabe and Ito 2008)."""

LOG_ODDS = 7.0
"""Calibrated scores are drawn up to these log odds, 0.0009 to 0.9991; more extreme ones stand at the edge."""

THRESHOLDS = np.linspace(0.01, 0.99, 99)


def figures(found: Evaluation) -> "dict[str, Figure | str]":
    """The report's figures of the test slices by name; a sentence where one is undefined."""
    one_class = _one_class(found.test)
    drawn: dict[str, Figure | str] = {"scores": _scores(found)}
    for name, draw in {
        "roc": _roc,
        "precision_recall": _precision_recall,
        "reliability": _reliability,
        "decision_curve": _decision_curve,
        "risk_coverage": _risk_coverage,
    }.items():
        drawn[name] = draw(found) if not one_class or name in ("reliability", "risk_coverage") else one_class
    return drawn


def data(found: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """The points of the plots that `dvc plots` draws, by file name."""
    names = classes_of(found.cfg.task)
    table, test = confusion_table(found), curves(found)
    columns = {"roc": ("fpr", "tpr"), "precision_recall": ("recall", "precision")}
    points: dict[str, list[dict[str, Any]]] = {
        kind: [{"class": n, x: a, y: b} for n, c in test.items() for a, b in zip(c[x], c[y], strict=True)]
        for kind, (x, y) in columns.items()
    }
    points["confusion"] = [
        {"actual": names[a], "predicted": names[p]} for (a, p), n in np.ndenumerate(table) for _ in range(n)
    ]
    points["reliability"] = [
        {"when": when} | row for when, score in before_after(found) for row in reliability_table(score, _truth(found))
    ]
    return points


def curves(found: Evaluation) -> dict[str, dict[str, list[float]]]:
    """Points of the ROC and precision-recall curves on test for each class that has both sides: fpr, tpr, ..."""
    names = classes_of(found.cfg.task)
    scores, target = calibrated(found.test, found.cfg.task), found.test["target"].to_numpy()
    positives = {"cancer": 1} if found.cfg.task == "binary" else {name: k for k, name in enumerate(names)}
    drawn = {}
    for column, (name, k) in enumerate(positives.items()):
        if 0 < (target == k).sum() < len(target):
            fpr, tpr, _ = sk.roc_curve(target == k, scores[:, column])
            precision, recall, _ = sk.precision_recall_curve(target == k, scores[:, column])
            values = {"fpr": fpr, "tpr": tpr, "precision": precision, "recall": recall}
            drawn[name] = {key: value.tolist() for key, value in values.items()}
    return drawn


def draw_history(history: pd.DataFrame, path: Path) -> None:
    """Loss and AUROC by epoch. history: the table that training keeps (history.csv)."""
    with canvas((9, 3.2), columns=2) as (figure, axes):
        for axis, metric, title in zip(axes, ("loss", "auroc"), ("Loss", "AUROC"), strict=True):
            for stage, colour in (("train", PLAIN), ("valid", VALID)):
                if f"{stage}/{metric}" in history:
                    axis.plot(history["epoch"], history[f"{stage}/{metric}"], color=colour, label=stage)
            axis.set(title=title, xlabel="Epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].legend()
        figure.savefig(path)


def draw_confusion(found: Evaluation) -> "Figure":
    """Counts of test slices, actual by decided class; shades are shares of the actual class."""
    names = [name.replace("_", " ") for name in classes_of(found.cfg.task)]
    matrix = confusion_table(found)
    with canvas((1.6 + len(names), 1.2 + len(names))) as (figure, axis):
        axis.grid(False)
        axis.imshow(matrix / np.maximum(1, matrix.sum(1, keepdims=True)), cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(matrix):
            dark = count > 0.5 * matrix[row].sum()
            axis.text(column, row, str(count), ha="center", va="center", color="white" if dark else INK)
        axis.set_xticks(range(len(names)), names, rotation=30 if len(names) > 2 else 0)
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="Predicted", ylabel="Actual")
    return figure


def _roc(found: Evaluation) -> "Figure":
    estimates = found.metrics["test"]
    with canvas() as (figure, axis):
        axis.plot([0, 1], [0, 1], color=PLAIN, linewidth=1, linestyle=":")
        for name, curve, colour in _coloured(curves(found)):
            key = "auroc" if name == "cancer" else f"auroc/{name}"
            label = f"{name.replace('_', ' ')}: {interval(estimates[key])}"
            axis.step(curve["fpr"], curve["tpr"], where="post", color=colour, label=label, clip_on=False)
        up, right = _ends(cancer(estimates, "sensitivity")), _ends(cancer(estimates, "specificity"))
        if up and right:
            spread = {
                "xerr": [[right[2] - right[0]], [right[0] - right[1]]],
                "yerr": [[up[0] - up[1]], [up[2] - up[0]]],
            }
            axis.errorbar(
                1 - right[0], up[0], **spread, fmt="o", color=INK, ms=5, elinewidth=1.2, label="operating point"
            )
        _square(axis, "1 - specificity", "Sensitivity")
        axis.legend(loc="lower right", title="AUROC [95 %]", alignment="left")
    return figure


def _precision_recall(found: Evaluation) -> "Figure":
    share = float(_truth(found).mean())
    with canvas() as (figure, axis):
        if found.cfg.task == "binary":
            axis.axhline(share, color=PLAIN, linewidth=1, linestyle=":", label=f"chance: {known(share)} are cancer")
        for name, curve, colour in _coloured(curves(found)):
            value = f": {interval(found.metrics['test']['average_precision'])}" if name == "cancer" else ""
            axis.step(
                curve["recall"], curve["precision"], where="post", color=colour, label=name.replace("_", " ") + value,
                clip_on=False,
            )  # fmt: skip
        _square(axis, "Recall", "Precision")
        title = "Average precision [95 %]" if found.cfg.task == "binary" else None
        axis.legend(loc="lower left", title=title, alignment="left")
    return figure


def _scores(found: Evaluation) -> "Figure":
    score, truth = _score(found), _truth(found)
    bins = np.linspace(-LOG_ODDS, LOG_ODDS, 29)
    width = bins[1] - bins[0]
    with canvas() as (figure, axis):
        top = 0.05
        for side, name, colour in ((1, "cancer", CANCER), (-1, "normal", NORMAL)):
            part = _log_odds(score[truth == max(side, 0)])
            if len(part):
                heights = np.histogram(part, bins)[0] / len(part)
                axis.bar(bins[:-1] + width / 2, side * heights, width * 0.86, color=colour, linewidth=0)
                top = max(top, heights.max())
            where = {"ha": "left", "va": "top" if side == 1 else "bottom", "transform": axis.transAxes}
            axis.text(0.02, 0.98 if side == 1 else 0.02, f"{name}, {len(part)} slices", color=colour, **where)
        axis.axhline(0, color=SOFT, linewidth=0.8)
        threshold = _log_odds(np.array([found.point.threshold]))[0]
        axis.axvline(threshold, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        corner = {"ha": "right", "va": "top", "transform": axis.transAxes}
        axis.text(0.99, 0.98, f"threshold {known(found.point.threshold)}", **corner)
        ticks = np.array([0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
        axis.set_xticks(_log_odds(ticks), [f"{tick:g}" for tick in ticks])
        step = 0.5 if top > 0.6 else 0.2 if top > 0.25 else 0.1
        marks = np.arange(-int(1.3 * top / step), int(1.3 * top / step) + 1) * step
        axis.set_yticks(marks, [f"{100 * abs(mark):.0f} %" for mark in marks])
        axis.set(xlabel="Calibrated P(cancer), log odds", ylabel="Share of the class", ylim=(-1.35 * top, 1.35 * top))
    return figure


def _reliability(found: Evaluation) -> "Figure":
    truth = _truth(found)
    with canvas() as (figure, axis):
        axis.plot([0, 1], [0, 1], color=PLAIN, linewidth=1, linestyle=":")
        for (when, score), (colour, dashes) in zip(before_after(found), ((PLAIN, "--"), (TEST, "-")), strict=True):
            rows = pd.DataFrame(reliability_table(score, truth))
            label = f"{when}: {known(expected_calibration_error(score, truth))}"
            axis.plot(rows["score"], rows["observed"], dashes, color=colour, linewidth=1.2, label=label)
            axis.scatter(rows["score"], rows["observed"], 14 + 90 * rows["n"] / len(truth), color=colour, linewidth=0)
            if when == "after":
                axis.vlines(rows["score"], rows["low"], rows["high"], color=colour, linewidth=1, alpha=0.6)
        _square(axis, "P(cancer)", "Share that is cancer")
        axis.legend(loc="upper left", title="ECE, calibration", alignment="left")
    return figure


def _decision_curve(found: Evaluation) -> "Figure":
    truth = _truth(found)
    rows = decision_curve(_score(found), truth, THRESHOLDS)
    with canvas() as (figure, axis):
        lines = {"treat_none": ("call none", PLAIN, ":"), "treat_all": ("call all", PLAIN, "-")}
        for column, (label, colour, dashes) in (lines | {"model": ("model", TEST, "-")}).items():
            axis.plot(rows["threshold"], rows[column], color=colour, linestyle=dashes, label=label)
        share = float(truth.mean())
        axis.axvline(found.point.threshold, color=INK, linewidth=1, linestyle=(0, (4, 2)))
        axis.set(xlim=(0, 1), ylim=(-0.15 * share, 1.08 * share), xlabel="Threshold", ylabel="Net benefit a slice")
        axis.legend(loc="best")
    return figure


def _risk_coverage(found: Evaluation) -> "Figure":
    coverage, risk = risk_coverage(_score(found), _truth(found), found.point.threshold)
    decided = (found.test["decision"] != "uncertain").mean()
    with canvas() as (figure, axis):
        axis.step(coverage, risk, where="post", color=TEST)
        axis.axvline(decided, color=INK, linewidth=1, linestyle=(0, (4, 2)))
        place = {"ha": "right", "va": "top", "transform": axis.get_xaxis_transform()}
        axis.text(decided - 0.015, 0.97, f"{100 * decided:.0f} % decided", **place)
        axis.set(xlim=(0, 1.01), ylim=(0, max(0.05, 1.15 * float(risk.max()))))
        axis.set(xlabel="Share of slices decided, surest first", ylabel="Share of wrong decisions")
    return figure


def confusion_table(found: Evaluation) -> np.ndarray:
    return confusion(found.test, found.cfg.task, calibrated(found.test, found.cfg.task), found.point.threshold)


def _score(found: Evaluation) -> np.ndarray:
    """Calibrated P(cancer) of the test slices, float [N], for both tasks."""
    return 1 - found.test["probability_normal"].to_numpy()


def _truth(found: Evaluation) -> np.ndarray:
    return (found.test["label"] == "cancer").to_numpy(int)


def before_after(found: Evaluation) -> list[tuple[str, np.ndarray]]:
    test = found.test
    raw = test["score_cancer"] if "score_cancer" in test else 1 - test["score_normal"]
    return [("before", raw.to_numpy()), ("after", _score(found))]


def _log_odds(score: np.ndarray) -> np.ndarray:
    clipped = score.clip(1e-9, 1 - 1e-9)
    return np.log(clipped / (1 - clipped)).clip(-LOG_ODDS + 1e-6, LOG_ODDS - 1e-6)


def _ends(estimate: Estimate) -> tuple[float, float, float] | None:
    """Value, lower and upper end; None where one of them is undefined."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return None
    return estimate.value, estimate.low, estimate.high


def _one_class(test: pd.DataFrame) -> str:
    """Why curves over both classes are undefined, or ""."""
    missing = [name for name in ("normal", "cancer") if not (test["label"] == name).any()]
    return f"n/a: no {missing[0]} slices in test" if missing else ""


def _coloured(drawn: dict[str, Any]) -> Iterator[tuple[str, dict[str, list[float]], str]]:
    names = list(drawn)
    for name in names:
        yield name, drawn[name], TEST if name == "cancer" else SUBTYPES[classes_of("subtype").index(name)]


def _square(axis: "Axes", xlabel: str, ylabel: str) -> None:
    axis.set(xlabel=xlabel, ylabel=ylabel, xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
