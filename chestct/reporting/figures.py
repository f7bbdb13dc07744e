"""Figures of predictions and of training, by scikit-learn's displays and matplotlib, with their points for `dvc plots`.

Each is drawn once, as SVG; the report and MLflow get the same bytes, and the report's style sheet turns them dark. A
curve that these slices do not define is a sentence that says why.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn import metrics as sk
from sklearn.calibration import CalibrationDisplay

from chestct.config.schema import classes_of
from chestct.evaluation.evaluate import Evaluation, calibrated
from chestct.reporting.environment import format_number, interval
from chestct.reporting.text import cancer
from chestct.stats.calibration import decision_curve, expected_calibration_error, reliability_table, risk_coverage
from chestct.stats.metrics import confusion

INK, SOFT, LINE, PAPER = "#1c2126", "#59626b", "#ddd9d1", "#fcfbf8"
MODEL, VALID, PLAIN, CANCER, NORMAL = "#0b5cad", "#d97c00", "#8a96a3", "#a8201a", "#3a5a78"
CLASSES = {
    "cancer": MODEL,
    "normal": PLAIN,
    "adenocarcinoma": "#0072B2",
    "large_cell": "#D55E00",
    "squamous": "#009E73",
}
"""One hue a class, distinguishable with every common colour vision (Okabe and Ito 2008)."""

STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.8,
    "figure.dpi": 150,
    "svg.hashsalt": "chestct",  # the same evaluation gives the same bytes
}
DOTTED: dict[str, Any] = {"color": PLAIN, "linewidth": 1, "linestyle": ":"}
DASHED: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": (0, (4, 2))}
SQUARE: dict[str, Any] = {"xlim": (-0.01, 1.01), "ylim": (-0.01, 1.02), "aspect": "auto"}
LOG_ODDS = 7.0
"""Calibrated scores are drawn up to these log odds, 0.0009 to 0.9991; more extreme ones stand at the edge."""


def figures(evaluation: Evaluation) -> dict[str, bytes | str]:
    """The figures of the test slices by name, as SVG; a sentence where one is undefined."""
    missing = [name for name in ("normal", "cancer") if not (evaluation.test["label"] == name).any()]
    drawn: dict[str, bytes | str] = {}
    for draw in (_scores, _roc, _precision_recall, _reliability, _decision_curve, _risk_coverage, _confusion):
        if missing and draw in (_roc, _precision_recall, _decision_curve):
            drawn[draw.__name__[1:]] = f"n/a: no {missing[0]} slices in test"
            continue
        with _canvas(_confusion_size(evaluation) if draw is _confusion else (4.4, 3.5)) as (figure, axis):
            draw(axis, evaluation)
            drawn[draw.__name__[1:]] = _svg(figure)
    return drawn


def points(evaluation: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """The points of the plots that `dvc plots` draws, by file name."""
    names, truth = classes_of(evaluation.cfg.task), _truth(evaluation)
    kept: dict[str, list[dict[str, Any]]] = {"roc": [], "precision_recall": []}
    for name, positive, score in _one_against_rest(evaluation):
        fpr, tpr, _ = sk.roc_curve(positive, score)
        precision, recall, _ = sk.precision_recall_curve(positive, score)
        kept["roc"] += [{"class": name, "fpr": x, "tpr": y} for x, y in zip(fpr, tpr, strict=True)]
        kept["precision_recall"] += [
            {"class": name, "recall": x, "precision": y} for x, y in zip(recall, precision, strict=True)
        ]
    kept["confusion"] = [
        {"actual": names[a], "predicted": names[p]}
        for (a, p), n in np.ndenumerate(confusion_table(evaluation))
        for _ in range(n)
    ]
    kept["reliability"] = [
        {"when": when} | row for when, score in before_after(evaluation) for row in reliability_table(score, truth)
    ]
    return kept


def draw_history(history: pd.DataFrame, path: Path) -> None:
    """Loss and AUROC by epoch. history: the table that training keeps (history.csv)."""
    with _canvas((9, 3.2), columns=2) as (figure, axes):
        for axis, metric, title in zip(axes, ("loss", "auroc"), ("Loss", "AUROC"), strict=True):
            for stage, colour in (("train", PLAIN), ("valid", VALID)):
                if f"{stage}/{metric}" in history:
                    axis.plot(history["epoch"], history[f"{stage}/{metric}"], color=colour, label=stage)
            axis.set(title=title, xlabel="Epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].legend()
        figure.savefig(path)


def confusion_table(evaluation: Evaluation) -> np.ndarray:
    """Test slices, int [K, K]: actual by decided class."""
    task = evaluation.cfg.task
    return confusion(evaluation.test, task, calibrated(evaluation.test, task), evaluation.point.threshold)


def before_after(evaluation: Evaluation) -> list[tuple[str, np.ndarray]]:
    """P(cancer) of the test slices before and after calibration."""
    test = evaluation.test
    raw = test["score_cancer"] if "score_cancer" in test else 1 - test["score_normal"]
    return [("before", raw.to_numpy()), ("after", _score(evaluation))]


def _roc(axis: Axes, evaluation: Evaluation) -> None:
    estimates = evaluation.metrics["test"]
    axis.plot([0, 1], [0, 1], **DOTTED)
    for name, positive, score in _one_against_rest(evaluation):
        fpr, tpr, _ = sk.roc_curve(positive, score)
        label = f"{name.replace('_', ' ')}: {interval(estimates['auroc' if name == 'cancer' else f'auroc/{name}'])}"
        sk.RocCurveDisplay(fpr=fpr, tpr=tpr).plot(axis).line_.set(color=CLASSES[name], label=label, clip_on=False)
    up, right = cancer(estimates, "sensitivity"), cancer(estimates, "specificity")
    ends = [(e.value, e.low, e.high) for e in (right, up) if e.value is not None and e.low is not None]
    if len(ends) == 2:
        (x, x_low, x_high), (y, y_low, y_high) = np.array(ends, float)
        across, up_down = [[x_high - x], [x - x_low]], [[y - y_low], [y_high - y]]
        axis.errorbar(1 - x, y, up_down, across, "o", color=INK, ms=5, elinewidth=1.2, label="operating point")
    axis.set(xlabel="1 - specificity", ylabel="Sensitivity", **SQUARE)
    axis.legend(loc="lower right", title="AUROC [95 %]", alignment="left")


def _precision_recall(axis: Axes, evaluation: Evaluation) -> None:
    binary, share = evaluation.cfg.task == "binary", float(_truth(evaluation).mean())
    for name, positive, score in _one_against_rest(evaluation):
        precision, recall, _ = sk.precision_recall_curve(positive, score)
        value = f": {interval(evaluation.metrics['test']['average_precision'])}" if binary else ""
        line = sk.PrecisionRecallDisplay(precision=precision, recall=recall).plot(axis).line_
        line.set(color=CLASSES[name], label=name.replace("_", " ") + value, clip_on=False)
    if binary:
        axis.axhline(share, **DOTTED, label=f"chance: {format_number(share)} are cancer")
    axis.set(xlabel="Recall", ylabel="Precision", **SQUARE)
    axis.legend(loc="lower left", title="Average precision [95 %]" if binary else None, alignment="left")


def _scores(axis: Axes, evaluation: Evaluation) -> None:
    score, truth = _score(evaluation), _truth(evaluation)
    bins = np.linspace(-LOG_ODDS, LOG_ODDS, 29)
    width = bins[1] - bins[0]
    top = 0.05
    for side, name, colour in ((1, "cancer", CANCER), (-1, "normal", NORMAL)):
        part = _log_odds(score[truth == max(side, 0)])
        if len(part):
            heights = np.histogram(part, bins)[0] / len(part)
            axis.bar(bins[:-1] + width / 2, side * heights, width * 0.86, color=colour, linewidth=0)
            top = max(top, heights.max())
        place: dict[str, Any] = {"ha": "left", "va": "top" if side == 1 else "bottom", "transform": axis.transAxes}
        axis.text(0.02, 0.98 if side == 1 else 0.02, f"{name}, {len(part)} slices", color=colour, **place)
    axis.axhline(0, color=SOFT, linewidth=0.8)
    axis.axvline(_log_odds(np.array([evaluation.point.threshold]))[0], **DASHED)
    words = f"threshold {format_number(evaluation.point.threshold)}"
    axis.text(0.99, 0.98, words, ha="right", va="top", transform=axis.transAxes)
    ticks = np.array([0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
    axis.set_xticks(_log_odds(ticks), [f"{tick:g}" for tick in ticks])
    axis.yaxis.set_major_formatter(lambda share, _: f"{100 * abs(share):.0f} %")
    axis.set(xlabel="Calibrated P(cancer), log odds", ylabel="Share of the class", ylim=(-1.35 * top, 1.35 * top))


def _reliability(axis: Axes, evaluation: Evaluation) -> None:
    truth = _truth(evaluation)
    for (when, score), colour, dashes in zip(before_after(evaluation), (PLAIN, MODEL), ("--", "-"), strict=True):
        rows = pd.DataFrame(reliability_table(score, truth))
        label = f"{when}: {format_number(expected_calibration_error(score, truth))}"
        display = CalibrationDisplay(rows["observed"], rows["score"], score)
        display.plot(ax=axis, ref_line=False, color=colour, linestyle=dashes, linewidth=1.2, marker="", label=label)
        axis.scatter(rows["score"], rows["observed"], 14 + 90 * rows["n"] / len(truth), color=colour, linewidth=0)
        if when == "after":
            axis.vlines(rows["score"], rows["low"], rows["high"], color=colour, linewidth=1, alpha=0.6)
    axis.plot([0, 1], [0, 1], **DOTTED)
    axis.set(xlabel="P(cancer)", ylabel="Share that is cancer", **SQUARE)
    axis.legend(loc="upper left", title="ECE, calibration", alignment="left")


def _decision_curve(axis: Axes, evaluation: Evaluation) -> None:
    truth = _truth(evaluation)
    rows = decision_curve(_score(evaluation), truth, np.linspace(0.01, 0.99, 99))
    lines = {
        "treat_none": ("call none", PLAIN, ":"),
        "treat_all": ("call all", PLAIN, "-"),
        "model": ("model", MODEL, "-"),
    }
    for column, (label, colour, dashes) in lines.items():
        axis.plot(rows["threshold"], rows[column], color=colour, linestyle=dashes, label=label)
    share = float(truth.mean())
    axis.axvline(evaluation.point.threshold, **DASHED)
    axis.set(xlim=(0, 1), ylim=(-0.15 * share, 1.08 * share), xlabel="Threshold", ylabel="Net benefit a slice")
    axis.legend(loc="best")


def _risk_coverage(axis: Axes, evaluation: Evaluation) -> None:
    coverage, risk = risk_coverage(_score(evaluation), _truth(evaluation), evaluation.point.threshold)
    decided = (evaluation.test["decision"] != "uncertain").mean()
    axis.step(coverage, risk, where="post", color=MODEL)
    axis.axvline(decided, **DASHED)
    words = f"{100 * decided:.0f} % decided"
    axis.text(decided - 0.015, 0.97, words, ha="right", va="top", transform=axis.get_xaxis_transform())
    axis.set(xlim=(0, 1.01), ylim=(0, max(0.05, 1.15 * float(risk.max()))))
    axis.set(xlabel="Share of slices decided, surest first", ylabel="Share of wrong decisions")


def _confusion(axis: Axes, evaluation: Evaluation) -> None:
    names = [name.replace("_", " ") for name in classes_of(evaluation.cfg.task)]
    axis.grid(False)
    sk.ConfusionMatrixDisplay(confusion_table(evaluation), display_labels=names).plot(
        ax=axis, cmap="Blues", colorbar=False, xticks_rotation=30 if len(names) > 2 else "horizontal"
    )
    axis.set(xlabel="Predicted", ylabel="Actual")


def _confusion_size(evaluation: Evaluation) -> tuple[float, float]:
    classes = len(classes_of(evaluation.cfg.task))
    return 1.6 + classes, 1.2 + classes


def _one_against_rest(evaluation: Evaluation) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(class, positive bool [N], score float [N]) of each class that test slices are on both sides of."""
    task, target = evaluation.cfg.task, evaluation.test["target"].to_numpy()
    classes = {"cancer": 1} if task == "binary" else {name: k for k, name in enumerate(classes_of(task))}
    for (name, k), score in zip(classes.items(), calibrated(evaluation.test, task).T, strict=True):
        if 0 < (target == k).sum() < len(target):
            yield name, target == k, score


def _score(evaluation: Evaluation) -> np.ndarray:
    """Calibrated P(cancer) of the test slices, float [N], for both tasks."""
    return 1 - evaluation.test["probability_normal"].to_numpy()


def _truth(evaluation: Evaluation) -> np.ndarray:
    return (evaluation.test["label"] == "cancer").to_numpy(int)


def _log_odds(score: np.ndarray) -> np.ndarray:
    clipped = score.clip(1e-9, 1 - 1e-9)
    return np.log(clipped / (1 - clipped)).clip(-LOG_ODDS + 1e-6, LOG_ODDS - 1e-6)


@contextmanager
def _canvas(size: tuple[float, float], columns: int = 1) -> Iterator[tuple[Figure, Any]]:
    """A figure and its axes in the house style, without a display and without pyplot's global state."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        yield figure, figure.subplots(1, columns)


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
