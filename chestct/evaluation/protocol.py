"""The protocol across hospitals (docs/protocol.md): what a recipe reaches on sources that it has never seen.

Each figure is of heads trained anew on cached features (of convolutions, too, where a GPU trains them), with `seeds`
seeds: the logits of a slice are averaged over seeds, and what single seeds reach stands next to it. Phantoms may be
trained on; no figure is measured on them.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from chestct.config.schema import Config, of_patients
from chestct.data.datamodule import SliceModule
from chestct.data.prepare import prepare_store
from chestct.data.sources import sources_of
from chestct.data.splits import SPLITS
from chestct.errors import ChestCTError
from chestct.evaluation.evaluate import Evaluation, fit_marks
from chestct.evaluation.pointing import DRAWN, TOLERANCE, pointing
from chestct.evaluation.split_policies import Train, anew, averaging, on_test
from chestct.evaluation.subgroups import of_cancer
from chestct.models import features
from chestct.models.operating_point import CANCER, NORMAL
from chestct.models.vgg16 import VGG16
from chestct.stats.bootstrap import MIN_GROUPS
from chestct.stats.metrics import Estimate, auroc

FOLDS = 5
"""Of cross-validation."""

Table = list[dict[str, Any]]

FEWEST_UNITS = 3
"""Units (groups) of a source without which an interval over them means nothing, and none is given."""


@dataclass(frozen=True)
class Part:
    """A table of the protocol; cells are text, numbers, Estimates and Spreads, None where a figure is not available."""

    title: str
    rows: Table
    notes: list[str]


@dataclass(frozen=True)
class Spread:
    """The same figure of each single seed."""

    values: list[float]

    def __str__(self) -> str:
        sd = f" ± {np.std(self.values, ddof=1):.3f}" if len(self.values) > 1 else ""
        return f"{np.mean(self.values):.3f}{sd}"


def protocol(evaluation: Evaluation, train: Train) -> dict[str, Part]:
    """The parts that cfg.evaluation.protocol asks for; `check_anew` has seen that they can be measured.

    Where all sources are phantoms, `within` is measured on them. Where sources were left out, `evaluation.held_out` is
    set: the table of their slices, each with the decision and the `threshold` of the others.
    """
    cfg, wanted = evaluation.cfg, evaluation.cfg.evaluation.protocol
    if not wanted:
        return {}
    sources = list(sources_of(cfg.data))
    real = list(filter(of_patients, sources))
    assert evaluation.data is not None
    net, several = evaluation.bundle.net, averaging(train, cfg.seeds)
    parts: dict[str, Part] = {}
    # Nothing is trained for the probe: what might fail there fails before hours of training.
    probe = {"probe": _probe(evaluation.data, net, real)} if "probe" in wanted else {}
    if "loso" in wanted:
        tests: list[pd.DataFrame] = []
        parts |= _leave_one_out(cfg, net, several, real, tests)
        evaluation.held_out = pd.concat(tests, ignore_index=True) if tests else None
    if "matrix" in wanted:
        parts |= _matrix(cfg, several, real)
    if "within" in wanted:
        parts["within"] = _within(cfg, several, real or sources)
    return parts | probe


def _leave_one_out(
    cfg: Config, net: VGG16, train: Train, real: Sequence[str], tests: list[pd.DataFrame]
) -> dict[str, Part]:
    """Each source tested by a model, and at a threshold, of the others alone; its slices are added to `tests`."""
    ranked: Table = []
    called: Table = []
    pointed: Table = []
    notes = []
    for source in real:
        held = anew(cfg, holdout=[source])
        data = SliceModule(held)
        try:
            predictions, checkpoints = train(f"without-{source}", held, data)
            # Fine-tuned, this network knows the source that is held out: it judges no novelty there.
            novelty = _novelty(net, data) if cfg.always_frozen else 0.0
            test, threshold = on_test(predictions, held, novelty)
            figures, points = without_weak_intervals(of_cancer(test, held)), pointing(held, data, checkpoints)
        except ChestCTError as error:
            notes.append(f"{source}: not available: {error}")
            ranked.append({"held out": source, "AUROC": None})
            called.append({"held out": source, "sensitivity": None, "specificity": None})
            continue
        tests.append(test.assign(threshold=threshold))
        answered = test[test["decision"].isin((CANCER, NORMAL))]
        of_these = {} if answered.empty else without_weak_intervals(of_cancer(answered, held))
        slices = " / ".join(str((test["label"] == label).sum()) for label in ("normal", "cancer"))
        for kind, row in points.items():
            pointed.append({"held out": source, "lesions": kind} | without_weak_intervals(row))
        counts = {"held out": source, "normal / cancer": slices, "groups": test["group"].nunique()}
        ranked.append(counts | {"AUROC": figures["auroc"], "single seeds": _by_seed([test])})
        row = {"held out": source, "threshold": threshold}
        row |= {"sensitivity": figures["sensitivity"], "specificity": figures["specificity"]}
        row |= {"answered": len(answered) / len(test)}
        row |= {f"{name} of these": of_these.get(name) for name in ("sensitivity", "specificity")}
        called.append(row | {"ECE": figures["ece"]})
    near = (
        f"{TOLERANCE} pixels of the original slice are allowed. Known: boxes and masks. Drawn: a lesion in each of up "
        f"to {DRAWN} normal slices, from all groups in turn. Usual place: of the lesions that training was shown."
    )
    rule = f"Threshold by {cfg.evaluation.threshold} on validation slices of the other sources, each counting alike"
    unsure = "Answered: neither uncertain nor refused; the next two columns are of these slices."
    unsure += "" if cfg.always_frozen else " None is refused: novelty was not judged."
    (of_ranked, fewer), (of_called, fewer_called) = mean_and_worst(ranked), mean_and_worst(called)
    called_notes = [f"{rule}. {unsure}", *fewer_called]
    return {
        "loso": Part("Leave one source out", filled([*ranked, *of_ranked]), [*notes, *fewer]),
        "threshold": Part("At the threshold of the others", filled([*called, *of_called]), called_notes),
        "pointing": Part("Hottest place in a known lesion", pointed, [near]),
    }


def _matrix(cfg: Config, train: Train, real: Sequence[str]) -> dict[str, Part]:
    """AUROC on each source of a model that was trained on one other alone."""
    rows, single, notes = [], [], []
    for source in real:
        others = [name for name in cfg.data.sources if name != source]
        alone = anew(cfg, holdout=others)
        row: dict[str, Any] = {"trained on": source} | {other: "–" if other == source else None for other in real}
        spread = row.copy()
        try:
            test, _ = on_test(train(f"only-{source}", alone, SliceModule(alone))[0], alone)
            for other in (other for other in real if other != source):
                part = test[test["source"] == other]
                row[other] = without_weak_intervals(of_cancer(part, alone))["auroc"]
                spread[other] = _by_seed([part])
        except ChestCTError as error:
            notes.append(f"{source}: not available: {error}")
        rows.append(row)
        single.append(spread)
    title = "AUROC by the source trained on, and the source tested on"
    every = {"seeds": Part(f"{title}, single seeds", single, [])} if cfg.seeds > 1 else {}
    return {"matrix": Part(title, rows, notes)} | every


def _within(cfg: Config, train: Train, real: Sequence[str]) -> Part:
    """Cross-validation over the groups of each source that has enough of them."""
    rows, notes = [], []
    for source in real:
        row: dict[str, Any] = {"source": source, "groups": "", "AUROC": None}
        one_of_several = len(cfg.data.sources) > 1
        alone = anew(cfg, sources={source: cfg.data.sources[source]}, store=None) if one_of_several else anew(cfg)
        try:
            # Of the source alone, as the folds are: next to others, other slices may be joined.
            groups = groups_by_class(prepare_store(alone).manifest)
            row["groups"] = " / ".join(map(str, groups))
            if min(groups) < MIN_GROUPS:
                raise ChestCTError(f"{min(groups)} groups of a class, needs {MIN_GROUPS}.")
            tests = []
            for fold in range(FOLDS):
                part = anew(alone, folds=FOLDS, fold=fold)
                tests.append(on_test(train(f"within-{source}/fold-{fold}", part, SliceModule(part))[0], part)[0])
            pooled = pd.concat(tests, ignore_index=True)
            row["groups"] = " / ".join(map(str, groups_by_class(pooled)))
            measured = of_cancer(pooled, alone)
            row |= {"AUROC": without_weak_intervals(measured)["auroc"], "single seeds": _by_seed(tests)}
            row |= {name: measured[name] for name in ("sensitivity", "specificity")}
        except ChestCTError as error:
            notes.append(f"{source}: not available: {error}")
        rows.append(row)
    notes.append("Groups: normal / cancer. Single seeds: mean of the folds' AUROCs. Each fold has its own threshold.")
    return Part(f"{FOLDS} folds within a source", filled(rows), notes)


def _probe(data: SliceModule, net: VGG16, real: Sequence[str]) -> Part:
    """How well a linear model tells the source of *normal* slices from mean-pooled features.

    Logistic regression on standardised features, tested by cross-validation over groups, in fewer folds where there are
    few. A source with normal slices of one group is left out: tested, there would be none to learn from.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    title = "Source of normal slices, told from the pooled features"
    pooled = torch.cat([_pooled(net, data, split) for split in SPLITS]).numpy()
    table = pd.concat([data.manifest[data.manifest["split"] == split] for split in SPLITS])
    normal = (table["label"] == "normal") & table["source"].isin(real)
    groups = table[normal].groupby("source")["group"].nunique()
    groups = groups[groups > 1]
    if len(groups) < 2:
        return Part(title, [], ["not available: fewer than two sources have normal slices in two groups."])
    used = (normal & table["source"].isin(groups.index)).to_numpy()
    source, group = (table[column].to_numpy()[used] for column in ("source", "group"))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    number = min(FOLDS, len(np.unique(group)), np.unique(source, return_counts=True)[1].max())
    folds = StratifiedGroupKFold(number, shuffle=True, random_state=data.cfg.data.split_seed)
    right = cross_val_predict(model, pooled[used], source, groups=group, cv=folds) == source
    rows: Table = [
        {"source": name, "normal slices": int((source == name).sum()), "groups": int(count)}
        | {"told right": float(right[source == name].mean())}
        for name, count in groups.items()
    ]
    rows.append({"source": "balanced accuracy", "told right": float(np.mean([row["told right"] for row in rows]))})
    how = f"Linear model on standardised features, cross-validation over groups in {number} folds."
    return Part(title, filled(rows), [f"Chance: {1 / len(groups):.3f}. {how}"])


def _novelty(net: VGG16, data: SliceModule) -> np.ndarray:
    """Of valid and test slices, how unlike train they are, float [N]."""
    train, valid, test = (_pooled(net, data, split) for split in SPLITS)
    return fit_marks(data.manifest, train, valid).distance(torch.cat([valid, test])).numpy()


def _pooled(net: VGG16, data: SliceModule, split: str) -> torch.Tensor:
    """Mean-pooled features [N, C] of a split's plain slices, from what `data` holds, else by the convolutions."""
    return features.outputs(net, data.dataset(split), data.cfg.data.batch_size)[1]


def groups_by_class(table: pd.DataFrame) -> list[int]:
    """How many groups have normal slices, and how many have slices with cancer."""
    return [table["group"][table["label"] == label].nunique() for label in ("normal", "cancer")]


def _by_seed(tests: Sequence[pd.DataFrame]) -> Spread | None:
    """AUROC of each single seed, mean over the tables; None where a table has one class."""
    columns = [column for column in tests[0] if str(column).startswith("seed_")]
    cancer = [(test["label"] == "cancer").to_numpy() for test in tests]
    if any(y.all() or not y.any() for y in cancer):
        return None
    pairs = list(zip(tests, cancer, strict=True))
    return Spread([float(np.mean([auroc(test[seed].to_numpy(), y)[0] for test, y in pairs])) for seed in columns])


def without_weak_intervals(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the intervals that rest on fewer than FEWEST_UNITS groups; the reason stands there instead."""
    cells = row.copy()
    for name, cell in row.items():
        if isinstance(cell, Estimate) and cell.low is not None and cell.groups < FEWEST_UNITS:
            reason = f"no interval over {cell.groups} groups"
            cells[name] = dataclasses.replace(cell, low=None, high=None, reason=reason)
    return cells


def mean_and_worst(rows: Table) -> tuple[Table, list[str]]:
    """Mean and worst of each column of figures, and a note of the columns in which not all sources have one."""
    fewer = []
    mean: dict[str, Any] = {"held out": "mean"}
    worst: dict[str, Any] = {"held out": "worst"}
    columns = dict.fromkeys(name for row in rows for name in row if name not in ("threshold", "groups"))
    for column in columns:
        cells = [row.get(column) for row in rows]
        spreads = np.array([cell.values for cell in cells if isinstance(cell, Spread)])
        values = [cell.value if isinstance(cell, Estimate) else cell for cell in cells]
        figures = [value for value in values if isinstance(value, float)]
        if 0 < (known := len(spreads) or len(figures)) < len(rows):
            fewer.append(f"{column} of {known}")
        if len(spreads):
            mean[column], worst[column] = Spread(spreads.mean(0).tolist()), Spread(spreads.min(0).tolist())
        elif figures:
            mean[column] = float(np.mean(figures))
            worst[column] = max(figures) if column == "ECE" else min(figures)
    return [mean, worst], [f"Mean and worst are not of all {len(rows)} sources: {', '.join(fewer)}."] if fewer else []


def filled(rows: Table) -> Table:
    """Rows with all columns in one order; what single seeds reach is left out where there is one."""
    columns = dict.fromkeys(name for row in rows for name in row)
    single = {name for row in rows for name, cell in row.items() if isinstance(cell, Spread) and len(cell.values) == 1}
    return [{name: row.get(name, "") for name in columns if name not in single} for row in rows]
