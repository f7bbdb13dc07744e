"""The rows next to the headline: the same recipe under other split policies, over folds, and on permuted labels.

A model belongs to the split it was trained on; showing it on another policy's test set would show it slices that it
has learned. With frozen convolutions a new head costs seconds, so every row gets a model of its own.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from chestct.config.schema import Config
from chestct.data.datamodule import SliceModule
from chestct.errors import ChestCTError
from chestct.evaluation.evaluate import Row, decided, logits_of, measured, row
from chestct.models.operating_point import OperatingPoint
from chestct.stats.metrics import auroc, measure

POLICIES = ("official", "official_clean", "grouped")

Train = Callable[[str, Config, SliceModule], pd.DataFrame]
"""(name, settings, data) -> predictions of the model trained so, on its valid and test slices."""

OF_DECISIONS = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "precision", "npv", "f1")


def refits(cfg: Config, train: Train) -> Iterator[Row]:
    """The rows that cfg.evaluation asks for. Raises ChestCTError unless the convolutions are frozen throughout."""
    wanted = cfg.evaluation
    if (wanted.policies or wanted.folds or wanted.permuted or wanted.sources) and not cfg.always_frozen:
        raise ChestCTError(
            "Only heads on frozen convolutions are trained again for a comparison: others take hours. Leave out "
            "evaluation.policies, .folds, .permuted and .sources, or train those runs one by one."
        )
    if wanted.policies:
        for policy in POLICIES:
            if policy != cfg.data.split:
                yield _policy(cfg, policy, train, split=policy, allow_leakage=policy == "official", holdout=[])
    if wanted.sources:
        if len(cfg.data.sources) < 2:
            raise ChestCTError("evaluation.sources holds out one source after the other: give several, data.sources.")
        yield from _sources(cfg, train)
    if wanted.folds:
        yield _folds(cfg, wanted.folds, train)
    if wanted.permuted:
        yield _permuted(cfg, train)


def _policy(cfg: Config, name: str, train: Train, **changes: object) -> Row:
    """The recipe under another policy, with its own operating point; a row with the reason where that cannot be."""
    cfg = _anew(cfg, folds=0, fold=0, **changes)
    data = SliceModule(cfg)
    try:
        test, threshold = _tested(train(name, cfg, data), cfg)
    except ChestCTError as error:
        return Row(name, {}, {}, 0, 0, note=f"not available: {error}")
    return row(cfg, name, test, measured(test, cfg, threshold), data)


def _sources(cfg: Config, train: Train) -> Iterator[Row]:
    """Leave one source out (docs/protocol.md): each is tested by a model, and at a threshold, of the others alone."""
    scores = []
    for source in cfg.data.sources:
        held = {"split": "grouped", "allow_leakage": False, "holdout": [source]}
        line = _policy(cfg, f"without {source}", train, **held)
        estimate = line.estimates.get("auroc") or line.estimates.get("cancer/auroc")
        if estimate and estimate.value is not None:
            scores.append(estimate.value)
        yield line
    if scores:
        note = f"mean AUROC of {len(scores)} held-out sources {np.mean(scores):.3f}, worst {min(scores):.3f}"
        yield Row("held-out sources", {}, {}, 0, 0, note=note)


def _folds(cfg: Config, folds: int, train: Train) -> Row:
    """Cross-validation: every slice scored by a model that has not seen its group, all folds together.

    Each fold has its own calibration and threshold. The note gives the spread over folds, which one split cannot show.
    """
    tests = []
    for fold in range(folds):
        changed = _anew(cfg, split="grouped", allow_leakage=False, holdout=[], folds=folds, fold=fold)
        tests.append(_tested(train(f"fold-{fold}", changed, SliceModule(changed)), changed)[0])
    pooled = pd.concat(tests, ignore_index=True)
    estimates = measured(pooled, cfg, 0.5)
    # Thresholds differ between folds, so what rests on decisions is measured on the decisions themselves.
    truth, decisions = (pooled["label"] == "cancer").astype(int), pooled[["flagged"]].to_numpy(float)
    settings = {"resamples": cfg.evaluation.resamples, "seed": cfg.data.split_seed}
    on_decisions = measure(pooled.assign(target=truth), "binary", decisions, 0.5, **settings)
    prefix = "" if cfg.task == "binary" else "cancer/"
    estimates |= {prefix + name: on_decisions[name] for name in OF_DECISIONS if prefix + name in estimates}
    single = [
        auroc(1 - test["probability_normal"].to_numpy(), (test["label"] == "cancer").to_numpy()) for test in tests
    ]
    spread = f"AUROC of single folds {np.nanmean(single):.3f} ± {np.nanstd(single, ddof=1):.3f}"
    return dataclasses.replace(row(cfg, f"{folds} folds", pooled, estimates, None), note=spread)


def _permuted(cfg: Config, train: Train) -> Row:
    """The recipe on labels dealt out at random within train and within valid; the labels of test are the true ones.

    What it reaches is what chance, or a leak that no label explains, is worth.
    """
    cfg = _anew(cfg)
    data = SliceModule(cfg)
    data.prepare_data()
    data.setup()
    rng = np.random.default_rng(cfg.seed)
    for split in ("train", "valid"):
        rows = data.manifest.index[data.manifest["split"] == split]
        data.manifest.loc[rows, "target"] = rng.permutation(data.manifest.loc[rows, "target"].to_numpy())
    test, threshold = _tested(train("permuted", cfg, data), cfg)
    line = row(cfg, "permuted labels", test, measured(test, cfg, threshold), None)
    return dataclasses.replace(line, note="trained on random labels; its AUROC is chance, near 0.5")


def _anew(cfg: Config, **data: object) -> Config:
    """The settings for another training, with changes to cfg.data."""
    quiet = dataclasses.replace(cfg.trainer, progress=False)
    changed = dataclasses.replace(cfg.data, **data)  # type: ignore[arg-type]
    # A job of a search looks at validation alone, and the settings of its checkpoint say so.
    evaluation = dataclasses.replace(cfg.evaluation, report=True)
    return dataclasses.replace(cfg, ckpt=None, trainer=quiet, data=changed, evaluation=evaluation)


def _tested(predictions: pd.DataFrame, cfg: Config) -> tuple[pd.DataFrame, float]:
    """The test slices with decisions by the operating point of these valid slices, and its threshold."""
    valid = predictions[predictions["split"] == "valid"]
    point = OperatingPoint.fit(logits_of(valid), valid["target"].to_numpy(), cfg.evaluation)
    table = decided(predictions, point, np.zeros(len(predictions)), cfg.task)
    return table[table["split"] == "test"], point.threshold
