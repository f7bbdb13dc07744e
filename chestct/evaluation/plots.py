"""Pictures of predictions and of training, each with the numbers it was drawn from (for DVC and for your own plots)."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from sklearn import metrics as sk

from chestct.data.splits import classes_of

# One hue a class, distinguishable with every common colour vision (Okabe and Ito 2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
}


def draw_all(test: pd.DataFrame, task: str, out: Path) -> None:
    """ROC and precision-recall curves and the confusion matrix of the test slices, into `out`."""
    names = classes_of(task)
    y = test["target"].to_numpy()
    positives = {"cancer": 1} if task == "binary" else {name: i for i, name in enumerate(names)}
    curves = {
        name: _curves(y == i, test[f"score_{name}"].to_numpy())
        for name, i in positives.items()
        if 0 < (y == i).sum() < len(y)
    }
    for kind, (x, v, xlabel, ylabel) in {
        "roc": ("fpr", "tpr", "1 - specificity", "Sensitivity"),
        "precision_recall": ("recall", "precision", "Recall", "Precision"),
    }.items():
        points = [{"class": n, x: a, v: b} for n, c in curves.items() for a, b in zip(c[x], c[v], strict=True)]
        _write_json(out / f"{kind}.json", points)
        _draw_curves(curves, x, v, xlabel, ylabel, f"{len(test)} test slices", out / f"{kind}.png")
    decision = _decisions(test, task, names)
    pairs = [{"actual": names[a], "predicted": names[b]} for a, b in zip(y, decision, strict=True)]
    _write_json(out / "confusion.json", pairs)
    _draw_confusion(sk.confusion_matrix(y, decision, labels=range(len(names))), names, out / "confusion.png")


def draw_history(history: pd.DataFrame, path: Path) -> None:
    """Loss and AUROC by epoch. history: the table that training keeps (history.csv)."""
    with _figure(1, 2, (9, 3.2)) as (figure, axes):
        for axis, metric, title in zip(axes, ("loss", "auroc"), ("Loss", "AUROC"), strict=True):
            for stage, color in zip(("train", "valid"), COLORS, strict=False):
                if f"{stage}/{metric}" in history:
                    axis.plot(history["epoch"], history[f"{stage}/{metric}"], color=color, label=stage)
            axis.set(title=title, xlabel="Epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].legend(frameon=False)
        figure.savefig(path)


def _curves(positive: np.ndarray, score: np.ndarray) -> dict[str, Any]:
    fpr, tpr, _ = sk.roc_curve(positive, score)
    precision, recall, _ = sk.precision_recall_curve(positive, score)
    curves = {"fpr": fpr, "tpr": tpr, "precision": precision, "recall": recall}
    return {name: values.tolist() for name, values in curves.items()} | {"auroc": sk.auc(fpr, tpr)}


def _decisions(test: pd.DataFrame, task: str, names: tuple[str, ...]) -> np.ndarray:
    if task == "binary":
        return (test["score_cancer"] >= 0.5).to_numpy(int)
    return test[[f"score_{name}" for name in names]].to_numpy().argmax(1)


def _draw_curves(curves: dict, x: str, y: str, xlabel: str, ylabel: str, title: str, path: Path) -> None:
    with _figure(1, 1, (4.2, 4)) as (figure, axis):
        for (name, curve), color in zip(curves.items(), COLORS, strict=False):
            label = f"{name} (AUROC {curve['auroc']:.3f})" if x == "fpr" else name
            axis.step(curve[x], curve[y], color=color, where="post", label=label)
        if x == "fpr":
            axis.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=":")
        if not curves:
            axis.text(0.5, 0.5, "n/a: only one class in test", ha="center")
        axis.set(xlabel=xlabel, ylabel=ylabel, title=title, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        if curves:
            axis.legend(frameon=False, loc="lower center")
        figure.savefig(path)


def _draw_confusion(matrix: np.ndarray, names: tuple[str, ...], path: Path) -> None:
    with _figure(1, 1, (1.6 + len(names), 1.2 + len(names))) as (figure, axis):
        axis.grid(False)
        axis.imshow(matrix / np.maximum(1, matrix.sum(1, keepdims=True)), cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(matrix):
            dark = count > 0.5 * matrix[row].sum()
            axis.text(column, row, str(count), ha="center", va="center", color="white" if dark else "black")
        ticks = range(len(names))
        axis.set_xticks(ticks, names, rotation=30 if len(names) > 2 else 0)
        axis.set_yticks(ticks, names)
        axis.set(xlabel="Predicted", ylabel="Actual")
        figure.savefig(path)


@contextmanager
def _figure(rows: int, columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes in the house style, without a display and without pyplot's global state."""
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        yield figure, figure.subplots(rows, columns)


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values) + "\n")
