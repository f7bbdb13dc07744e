"""Figures of predictions and of training as SVG, the points behind them for `dvc plots`, and the gallery of slices."""

import dataclasses
import io
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import RocCurveDisplay, roc_curve

from chestct.config.schema import classes_of
from chestct.evaluation.evaluate import Evaluation
from chestct.models.bundle import Bundle
from chestct.models.saliency import blend, heat_to_square
from chestct.reporting.environment import as_text
from chestct.reporting.text import called
from chestct.serving.prediction import data_uri
from chestct.stats.calibration import reliability_table

COLOURS = {"normal": "#8a96a3", "cancer": "#0b5cad"}
STYLE = {
    "axes.facecolor": "#fcfbf8",
    "figure.facecolor": "#fcfbf8",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ddd9d1",
    "text.parse_math": False,  # names of sources are no formulas
    "svg.hashsalt": "chestct",  # the same evaluation gives the same bytes
}


def figures(evaluation: Evaluation) -> dict[str, bytes | str]:
    """The figures by name; where one is undefined, the reason. The report's style sheet turns them dark."""
    drawn: dict[str, bytes | str] = {}
    for draw in (_roc, _scores, _reliability, _curves, _held_out):
        with matplotlib.rc_context(STYLE):
            figure, buffer = Figure((4.4, 3.5), layout="constrained"), io.BytesIO()
            reason = draw(figure, evaluation)
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        drawn[draw.__name__[1:]] = f"n/a: {reason}" if reason else buffer.getvalue()
    return drawn


def points(evaluation: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """The points of the plots that `dvc plots` draws, by file name."""
    names, target = classes_of(evaluation.cfg.task), evaluation.test["target"]
    return {
        "roc": [
            {"class": name, "fpr": x, "tpr": y}
            for name, positive, score in _one_against_rest(evaluation)
            for x, y in zip(*roc_curve(positive, score)[:2], strict=True)
        ],
        "confusion": [
            {"actual": names[a], "predicted": names[p]} for a, p in zip(target, called(evaluation), strict=True)
        ],
        "reliability": _bins(evaluation),
    }


def _roc(figure: Figure, evaluation: Evaluation) -> str:
    axis, estimates = figure.subplots(), evaluation.metrics["test"]
    for i, (name, positive, score) in enumerate(_one_against_rest(evaluation)):
        fpr, tpr, _ = roc_curve(positive, score)
        area = dataclasses.replace(estimates.get(f"auroc/{name}", estimates["auroc"]), reason="")
        label = f"{name.replace('_', ' ')} {as_text(area)}"
        RocCurveDisplay(fpr=fpr, tpr=tpr, name=label).plot(axis, plot_chance_level=i == 0)
    axis.set(xlabel="1 - specificity", ylabel="Sensitivity", aspect="auto")
    absent = {"normal", "cancer"} - set(evaluation.test["label"])
    return f"no {absent.pop()} slices in test" if absent else ""


def _scores(figure: Figure, evaluation: Evaluation) -> str:
    return _by_source(figure, evaluation.test.assign(threshold=evaluation.point.threshold))


def _held_out(figure: Figure, evaluation: Evaluation) -> str:
    return "no source was left out" if evaluation.held_out is None else _by_source(figure, evaluation.held_out)


def _by_source(figure: Figure, table: pd.DataFrame) -> str:
    """A panel for each source below those of the others, so that a shift of one of them is seen."""
    parts = table.groupby("source")
    figure.set_size_inches(4.4, max(3.5, 1.5 * len(parts)))
    axes = figure.subplots(len(parts), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    keys: dict[str, Any] = {}
    for axis, (source, part) in zip(axes, parts, strict=True):
        for name, own in part.groupby("label"):
            score, weights = 1 - own["probability_normal"], np.full(len(own), 1 / len(own))
            style: dict[str, Any] = {"color": COLOURS[str(name)], "alpha": 0.7, "weights": weights}
            *_, keys[str(name)] = axis.hist(score, np.linspace(0, 1, 21).tolist(), **style)
        keys["threshold"] = axis.axvline(part["threshold"].iloc[0], color="black", linestyle="--", linewidth=1)
        slices = "; ".join(f"{name}, {n} slices" for name, n in part.groupby("label").size().items())
        axis.set_title(textwrap.fill(f"{source}: {slices}".replace("_", " "), 56), loc="left", fontsize=8)
    figure.legend(keys.values(), keys.keys(), loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    axes[-1].set(xlabel="Calibrated P(cancer)", xlim=(0, 1))
    figure.supylabel("Share of the class", fontsize=10)
    return ""


def _reliability(figure: Figure, evaluation: Evaluation) -> str:
    axis, bins = figure.subplots(), pd.DataFrame(_bins(evaluation))
    CalibrationDisplay(bins["observed"], bins["score"], None).plot(ax=axis, name="model", color=COLOURS["cancer"])
    axis.vlines(bins["score"], bins["low"], bins["high"], color=COLOURS["cancer"], linewidth=1)
    for row in bins.itertuples():
        axis.annotate(str(row.n), (row.score, row.observed), (4, -10), textcoords="offset points", fontsize=7)
    axis.legend(loc="upper left")
    axis.set(xlabel="Calibrated P(cancer), mean of the bin", ylabel="Share that is cancer")
    return ""


def _bins(evaluation: Evaluation) -> list[dict[str, float]]:
    """The reliability diagram of the test slices, cancer against normal."""
    test = evaluation.test
    return reliability_table(1 - test["probability_normal"].to_numpy(), (test["label"] == "cancer").to_numpy())


def _curves(figure: Figure, evaluation: Evaluation) -> str:
    history = Path(evaluation.cfg.ckpt or "").parent.parent / "history.csv"
    if not evaluation.cfg.ckpt or not history.is_file():
        return "the history of the training is not at hand"
    table = pd.read_csv(history).set_index("epoch")
    for axis, metric in zip(figure.subplots(2, 1, sharex=True), ("loss", "auroc"), strict=True):
        curves = [f"{stage}/{metric}" for stage in ("train", "valid") if f"{stage}/{metric}" in table]
        axis.plot(table[curves], label=curves)
        axis.set(xlabel="Epoch", ylabel={"loss": "Loss", "auroc": "AUROC"}[metric])
        axis.legend()
    return ""


def _one_against_rest(evaluation: Evaluation) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(class, positive bool [N], score float [N]) of each class that test slices are on both sides of."""
    task, target = evaluation.cfg.task, evaluation.test["target"].to_numpy()
    classes = {"cancer": 1} if task == "binary" else {name: k for k, name in enumerate(classes_of(task))}
    for name, k in classes.items():
        if 0 < (target == k).sum() < len(target):
            yield name, target == k, evaluation.test[f"probability_{name}"].to_numpy()


def gallery(evaluation: Evaluation) -> dict[str, list[dict[Any, Any]]]:
    """cfg.evaluation.gallery test slices, one of a group: `errors`, the surest first, and `right` ones at random.

    Of each its columns, `truth`, `called`, `plain` and `heat` (JPEGs as data URIs) and `silent`: whether nothing in it
    speaks for cancer. Nothing where there is no network.
    """
    if not evaluation.cfg.evaluation.gallery:
        return {}
    test, names, calls = evaluation.test, np.array(classes_of(evaluation.cfg.task)), called(evaluation)
    sureness = test[[f"probability_{name}" for name in names]].to_numpy()[np.arange(len(test)), calls]
    test = test.assign(truth=names[test["target"]], called=names[calls], sureness=sureness)
    wrong = test["called"] != test["truth"]
    kinds = {
        "errors": test[wrong].sort_values("sureness", ascending=False),
        "right": test[~wrong].sample(frac=1, random_state=evaluation.cfg.data.split_seed),
    }
    places = evaluation.manifest.set_index(["source", "path"])["row"]
    shown: dict[str, list[dict[Any, Any]]] = {}
    for kind, part in kinds.items():
        shown[kind] = part.drop_duplicates("group").head(evaluation.cfg.evaluation.gallery).to_dict("records")
        for row in shown[kind]:
            square = np.array(evaluation.images[places[row["source"], row["path"]]])
            row |= _pictures(square, evaluation.bundle)
    return shown


def _pictures(gray: np.ndarray, bundle: Bundle) -> dict[str, Any]:
    """A square uint8 [S, S] without and with the heat of what speaks for cancer, which is also what the page shows."""
    heat = bundle.predict(gray[None], explain=True).heat
    assert heat is not None
    over = blend(gray, heat_to_square(heat[0], len(gray)))
    plain, hot = (data_uri(Image.fromarray(pixels), "JPEG", 192, quality=82) for pixels in (gray, over))
    return {"plain": plain, "heat": hot, "silent": not heat.any()}
