"""The rows next to the headline: the same recipe under other split policies; and what trains a head again.

A model belongs to the split it was trained on; showing it on another policy's test set would show it slices that it
has learned. With frozen convolutions a new head costs seconds, so every row gets a model of its own.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from chestct.config.schema import Config, of_patients
from chestct.data.datamodule import SliceModule
from chestct.data.sources import sources_of
from chestct.errors import ChestCTError
from chestct.evaluation.evaluate import Row, fit_point, logits_of, metrics_of, row, with_decisions
from chestct.models.vgg16 import pick_device
from chestct.stats.calibration import to_scores

Train = Callable[[str, Config, SliceModule], tuple[pd.DataFrame, list[Path]]]
"""(name, settings, data) -> predictions of the valid and test slices of the model trained so, and its checkpoints."""


def check_anew(cfg: Config) -> None:
    """Raises ChestCTError where evaluation.policies and .protocol ask for what cannot be trained or measured here.

    That is convolutions on a processor, and parts of the protocol across sources where fewer than two are of patients.
    """
    protocol = cfg.evaluation.protocol
    if not (cfg.evaluation.policies or protocol):
        return
    if not cfg.always_frozen and pick_device(cfg.trainer.accelerator).type == "cpu":
        raise ChestCTError(
            "Without a GPU only heads on frozen convolutions are trained again for a comparison: others take hours. "
            "Leave out evaluation.policies and .protocol, or train those runs one by one."
        )
    real = list(filter(of_patients, sources_of(cfg.data)))
    if len(real) < 2 and protocol not in ([], ["within"]):
        raise ChestCTError(
            f"evaluation.protocol measures on one source what was learned from others; of patients there "
            f"{f'is only {real[0]}' if real else 'is none'}. Give two or more with data.sources, or data=hospitals. "
            "One is enough for 'evaluation.protocol=[within]'."
        )


def policy_row(cfg: Config, policy: str, train: Train) -> Row:
    """The recipe under another policy, with its own operating point; a row with the reason where that cannot be."""
    cfg = anew(cfg, split=policy, allow_leakage=policy == "official")
    data = SliceModule(cfg)
    try:
        test, _ = on_test(train(policy, cfg, data)[0], cfg)
    except ChestCTError as error:
        return Row(policy, {}, {}, 0, 0, note=f"not available: {error}")
    return row(cfg, policy, test, metrics_of(test, cfg), data)


def averaging(train: Train, seeds: int) -> Train:
    """`train` with so many seeds from cfg.seed on, all on one split: predictions by their mean logits, with each seed's
    ranking in a column `seed_N`. `data` keeps the features of the last one.
    """

    def run(name: str, cfg: Config, data: SliceModule) -> tuple[pd.DataFrame, list[Path]]:
        tables, checkpoints = [], []
        for seed in range(cfg.seed, cfg.seed + seeds):
            data.cfg = dataclasses.replace(cfg, seed=seed, seeds=1)
            predictions, trained = train(f"{name}/seed-{seed}", data.cfg, data)
            tables.append(predictions)
            checkpoints += trained
        logits = [logits_of(table) for table in tables]  # [N, K] each
        ranking = {f"seed_{i}": x[:, 0] if x.shape[1] == 1 else -to_scores(x)[:, 0] for i, x in enumerate(logits)}
        table = tables[0].assign(**ranking)
        table[[str(column) for column in table if str(column).startswith("logit_")]] = np.mean(logits, axis=0)
        return table, checkpoints

    return run


def anew(cfg: Config, **data: object) -> Config:
    """The settings for another training: on the grouped split, or as these settings of `data` say."""
    quiet = dataclasses.replace(cfg.trainer, progress=False)
    usual: dict[str, Any] = {"split": "grouped", "allow_leakage": False, "holdout": [], "folds": 0, "fold": 0}
    changed = dataclasses.replace(cfg.data, **usual | data)
    # A job of a search looks at validation alone, and its checkpoint's settings say so; nor is another training to ask
    # for the trainings that it is one of, when it is evaluated.
    evaluation = dataclasses.replace(cfg.evaluation, report=True, policies=False, protocol=[])
    return dataclasses.replace(cfg, ckpt=None, trainer=quiet, data=changed, evaluation=evaluation)


def on_test(predictions: pd.DataFrame, cfg: Config, novelty: np.ndarray | float = 0.0) -> tuple[pd.DataFrame, float]:
    """The test slices with decisions by the operating point of these valid slices, and its threshold.

    novelty: float [N], of each slice of the table; without, none is refused or uncertain for it.
    """
    point = fit_point(predictions, cfg)
    table = with_decisions(predictions.assign(novelty=novelty), point, cfg.task)
    return table[table["split"] == "test"], point.threshold
