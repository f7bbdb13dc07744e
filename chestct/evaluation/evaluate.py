"""From a checkpoint to everything that can be said about it: predictions, operating point, metrics with intervals.

A checkpoint knows its settings, so the data it was made for is made again unless told otherwise. Whatever is fitted
(calibration, threshold, conformal quantiles, novelty) is fitted on train and validation slices; test is only measured.
"""

import dataclasses
import platform
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

import chestct
from chestct.audit.shortcuts import shortcut_scores
from chestct.audit.stage import kept_audit
from chestct.config.schema import Config, classes_of
from chestct.data.datamodule import SliceModule
from chestct.data.prepare import is_synthetic
from chestct.errors import ChestCTError, DataError
from chestct.evaluation.compare import compare
from chestct.evaluation.subgroups import subgroups
from chestct.models.bundle import Bundle
from chestct.models.features import attach
from chestct.models.lightning_module import Classifier, load_classifier
from chestct.models.novelty import NoveltyModel, channel_means, fit_novelty
from chestct.models.operating_point import OperatingPoint
from chestct.models.predictions import prediction_table
from chestct.models.saliency import normal_evidence
from chestct.stats.drift import differences, training_facts
from chestct.stats.metrics import Estimate, measure
from chestct.tracking import code_version

SPLITS = ("train", "valid", "test")

NORMALS = 128
"""Normal training slices that heat maps are held against, at most."""


@dataclass(frozen=True)
class Row:
    """One line of the side-by-side table: a model of this recipe on the test slices of one split policy."""

    policy: str
    estimates: dict[str, Estimate]
    slices: dict[str, int]  # class -> test slices
    groups: int
    leaked: int  # test slices with a copy in train or valid
    shortcut: str = ""  # the best baseline that sees no lesion, by AUROC on the same test slices
    shortcut_auroc: float | None = None
    margin: Estimate | None = None  # AUROC of the model minus that of the shortcut, paired
    note: str = ""


@dataclass
class Evaluation:
    """What was measured. The report, the model card and the bundle are written from this and nothing else."""

    cfg: Config
    table: pd.DataFrame  # one row a valid or test slice; columns: docs/manifest.md
    point: OperatingPoint
    novelty_model: NoveltyModel
    metrics: dict[str, dict[str, Estimate]]  # split -> name -> estimate
    rows: list[Row]
    about: dict[str, Any]
    model: Classifier | None = None
    data: SliceModule | None = None
    manifest: pd.DataFrame | None = None  # the slices that take part, with `row`, their place among
    images: np.ndarray | None = None  # uint8 [N, S, S], squares
    sections: dict[str, Any] = field(default_factory=dict)  # what was asked for beyond: explanation, robustness, ...

    @property
    def test(self) -> pd.DataFrame:
        return self.table[self.table["split"] == "test"]

    @cached_property
    def baseline(self) -> torch.Tensor:
        """Evidence of normal training slices, which heat maps are held against (chestct.models.saliency)."""
        assert self.model is not None
        assert self.data is not None
        train = self.data.manifest[self.data.manifest["split"] == "train"].reset_index(drop=True)
        normal = train.index[train["label"] == "normal"]
        chosen = np.random.default_rng(self.cfg.data.split_seed).permutation(normal)[:NORMALS]
        dataset = self.data.dataset("train")
        with torch.no_grad():
            maps = [self.model.net.fine_maps(dataset.slices([i], view=0)) for i in chosen.tolist()]
        return normal_evidence(self.model.net, torch.cat(maps))

    @cached_property
    def bundle(self) -> Bundle:
        """What answers for squares; it has no facts as yet, which come with the export."""
        assert self.model is not None
        return Bundle(self.model.net, self.point, self.novelty_model, self.baseline, {})

    @property
    def headline(self) -> Row:
        """The row of the split policy in force."""
        return self.rows[0]


def evaluate(cfg: Config, data: SliceModule | None = None) -> Evaluation:
    """Measures the checkpoint cfg.ckpt on the slices that `cfg` describes.

    data: made from `cfg` unless it is given. Raises ChestCTError where there is no checkpoint: a network without
    training is never evaluated.
    """
    if not cfg.ckpt:
        raise ChestCTError(
            "Nothing to evaluate: give a checkpoint with ckpt=runs/.../checkpoints/best.ckpt, ckpt=last for the "
            "newest run, or a bundle with bundle=FOLDER."
        )
    model = load_classifier(Path(cfg.ckpt), cfg.trust).eval()
    data = data or SliceModule(cfg)
    data.prepare_data()
    data.setup()
    logits, pooled = outputs(model, data, cfg)
    valid = data.manifest.loc[data.manifest["split"] == "valid", "target"].to_numpy()
    point = OperatingPoint.fit(logits["valid"], valid, cfg.evaluation)
    novelty_model = fit_novelty(pooled["train"], pooled["valid"])
    parts = [prediction_table(data.manifest, split, logits[split], cfg.task) for split in ("valid", "test")]
    novelty = torch.cat([novelty_model.distance(pooled[split]) for split in ("valid", "test")]).numpy()
    table = decided(pd.concat(parts, ignore_index=True), point, novelty, cfg.task)
    metrics = {str(name): measured(part, cfg, point.threshold) for name, part in table.groupby("split", sort=False)}
    test = table[table["split"] == "test"]
    headline = row(cfg, cfg.data.split, test, metrics["test"], data)
    assert data.store is not None
    found = Evaluation(
        *(cfg, table, point, novelty_model, metrics, [headline], _about(cfg, data)),
        model=model,
        data=data,
        manifest=data.manifest,
        images=data.store.images,
    )
    found.sections = _sections(found)
    return found


def outputs(model: Classifier, data: SliceModule, cfg: Config) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    """Logits [N, K] and mean-pooled features [N, 512] of the plain slices of every split, both float32.

    Frozen networks take them from the feature cache; others run their convolutions.
    """
    if cfg.features.cache and model.cfg.always_frozen:
        plain = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, views=0))
        attach(data, model.net, plain, SPLITS)
    found = [_outputs(model, data, split) for split in SPLITS]
    return tuple(dict(zip(SPLITS, parts, strict=True)) for parts in zip(*found, strict=True))  # type: ignore[return-value]


@torch.no_grad()
def _outputs(model: Classifier, data: SliceModule, split: str) -> tuple[np.ndarray, torch.Tensor]:
    dataset = data.dataset(split)
    if dataset.features:
        features = dataset.features[0]
        return model(features).numpy(), channel_means(features)
    device = torch.device("cuda" if torch.cuda.is_available() and data.cfg.trainer.accelerator != "cpu" else "cpu")
    net = model.net.to(device)
    every = (net.maps(x) for x in net.batches(dataset.images[dataset.rows], data.cfg.data.batch_size))
    parts = [(net.head(maps).float().cpu(), channel_means(maps).float().cpu()) for maps in every]
    net.cpu()
    logits, pooled = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return logits.numpy(), pooled


def decided(table: pd.DataFrame, point: OperatingPoint, novelty: np.ndarray, task: str) -> pd.DataFrame:
    """The table of predictions with calibrated `probability_CLASS`, `flagged` (at the threshold), `decision`
    (`uncertain` or `refused` for some), conformal `set` and `novelty`.
    """
    names = classes_of(task)
    probabilities = point.probabilities(logits_of(table))
    sets = [" or ".join(np.array(names)[held]) or "none" for held in point.sets(probabilities)]
    calibrated = {f"probability_{name}": probabilities[:, i] for i, name in enumerate(names)}
    flagged = 1 - probabilities[:, 0] >= point.threshold
    return table.assign(
        **calibrated, flagged=flagged, decision=point.decide(probabilities, novelty), set=sets, novelty=novelty
    )


def logits_of(table: pd.DataFrame) -> np.ndarray:
    """The logits in a table of predictions, float64 [N, outputs]."""
    return table[[column for column in table if str(column).startswith("logit_")]].to_numpy()


def calibrated(part: pd.DataFrame, task: str) -> np.ndarray:
    """Calibrated scores of a table: P(cancer) [N, 1], or P(class) [N, K] of the subtype task."""
    names = classes_of(task)[1:] if task == "binary" else classes_of(task)
    return part[[f"probability_{name}" for name in names]].to_numpy()


def measured(part: pd.DataFrame, cfg: Config, threshold: float) -> dict[str, Estimate]:
    """All metrics of one split, from calibrated scores."""
    return measure(
        part,
        cfg.task,
        calibrated(part, cfg.task),
        threshold,
        resamples=cfg.evaluation.resamples,
        seed=cfg.data.split_seed,
    )


def row(cfg: Config, policy: str, test: pd.DataFrame, estimates: dict[str, Estimate], data: SliceModule | None) -> Row:
    """A line of the side-by-side table, with the best shortcut on the same slices where the data is at hand."""
    counts = test["label"].value_counts()
    found = Row(
        policy,
        estimates,
        {name: int(counts.get(name, 0)) for name in ("normal", "cancer")},
        int(test["group"].nunique()),
        int(test["leaked"].sum()),
    )
    truth = (test["label"] == "cancer").to_numpy()
    if data is None or truth.all() or not truth.any():
        return found
    assert data.store is not None
    scores = shortcut_scores(data.manifest, data.store.images, seed=cfg.data.split_seed)
    if not scores:
        return dataclasses.replace(found, note="no shortcut baseline is defined on these slices")
    best = max(scores, key=lambda baseline: baseline.auroc)
    margin = _margin(test.assign(target=truth.astype(int)), best.scores, cfg)
    return dataclasses.replace(found, shortcut=best.title, shortcut_auroc=best.auroc, margin=margin)


def _margin(test: pd.DataFrame, shortcut: np.ndarray, cfg: Config) -> Estimate:
    """AUROC of the model minus that of the shortcut, on the same slices in the same resamples."""
    ranks = rankdata(shortcut) / (len(shortcut) + 1)  # only their order counts
    scores = ranks[:, None], 1 - test[["probability_normal"]].to_numpy()
    try:
        compared = compare(
            test, test, "binary", scores=scores, resamples=cfg.evaluation.resamples, seed=cfg.data.split_seed
        )
    except DataError as error:  # too few groups
        return Estimate(None, None, None, len(test), int(test["group"].nunique()), str(error))
    auroc: Any = compared.set_index("metric").loc["auroc"]
    return Estimate(auroc.difference, auroc.low, auroc.high, auroc.slices, auroc.groups, auroc.reason)


def _sections(found: Evaluation) -> dict[str, Any]:
    """What stands in the report beside the metrics; the costly parts only where cfg.evaluation asks for them."""
    cfg, data = found.cfg, found.data
    assert data is not None
    assert data.store is not None
    training = training_facts(data.manifest, found.table)
    manifest = data.manifest[data.manifest["split"] == "test"]
    cancer = 1 - found.test["probability_normal"].to_numpy()
    asked, seed = cfg.evaluation, cfg.data.split_seed
    return {
        "subgroups": subgroups(found.test, cancer, found.point.threshold, resamples=asked.resamples, seed=seed),
        "shift": differences(training, manifest, found.test),
        "audit": kept_audit(cfg, data.store),
        "made": made(),
    }


def made() -> dict[str, Any]:
    """How the numbers came about: command, time, versions."""
    return {
        "command": " ".join(["python", *_program(), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "chestct": chestct.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **code_version(),
    }


def _program() -> list[str]:
    """How the running program was called, without its place on this machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]


def _about(cfg: Config, data: SliceModule) -> dict[str, Any]:
    assert data.store is not None
    return {
        "task": cfg.task,
        "data": cfg.data.name,
        "split": cfg.data.split,
        "synthetic": is_synthetic(cfg.data),
        "leaked": int(data.manifest.loc[data.manifest["split"] != "train", "leaked"].sum()),
        "data_hash": data.store.data_hash,
        # The run's folder and below: where it lies on this machine is nobody's business.
        "checkpoint": "/".join(Path(cfg.ckpt or "").resolve().parts[-3:]),
        "splitting": {
            name: getattr(cfg.data, name)
            for name in ("split", "split_seed", "valid_fraction", "test_fraction", "folds", "fold", "allow_leakage")
        },
    }
