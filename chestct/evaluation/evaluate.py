"""From a checkpoint to all that is measured of it: predictions, operating point, metrics with intervals.

A checkpoint knows its settings, so the data it was made for is made again unless the settings say otherwise. Whatever
is fitted (calibration, threshold, conformal quantiles, novelty) is fitted on train and validation slices; test is only
measured.
"""

import dataclasses
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from chestct.audit.shortcuts import shortcut_scores
from chestct.audit.stage import kept_audit
from chestct.config.schema import Config, classes_of
from chestct.config.schema_serving import ROUNDED
from chestct.data.datamodule import SliceModule
from chestct.data.prepare import is_synthetic
from chestct.data.splits import SPLITS, SPLITTING, check_own, identity, measurable, of_patients_first
from chestct.errors import ChestCTError
from chestct.evaluation.subgroups import subgroups
from chestct.files import digest
from chestct.models import features
from chestct.models.bundle import Bundle
from chestct.models.feature_cache import Kept, extract
from chestct.models.head import has_places
from chestct.models.lightning_module import Classifier, load_classifier
from chestct.models.novelty import NoveltyModel, fit_novelty
from chestct.models.operating_point import OperatingPoint
from chestct.models.predictions import prediction_table, training_facts
from chestct.models.saliency import normal_cam
from chestct.models.vgg16 import pick_device
from chestct.stats import drift
from chestct.stats.metrics import Estimate, auroc_difference, measure
from chestct.version import __version__, code_version

FOLDERS = re.compile(r"(?:(?<![\w./:~])|(?<=:///)|(?<=file:)|(?<=file://))/(?:[^,\]}'\"/]+/)+")
"""Of an absolute path, by itself or in sqlite:////PATH or file:///PATH: all but its last part."""

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
    """What was measured; report, model card and bundle are written from this alone."""

    cfg: Config
    bundle: Bundle  # what answered; that of a checkpoint gets most of its facts with the export
    table: pd.DataFrame  # one row a valid or test slice; columns: docs/manifest.md
    manifest: pd.DataFrame  # the slices that take part, with `row`, their place among
    images: np.ndarray  # uint8 [N, S, S], squares
    metrics: dict[str, dict[str, Estimate]]  # split -> name -> estimate
    rows: list[Row]
    about: dict[str, Any]
    sections: dict[str, Any]  # subgroups, shift, ... and what the settings ask for beyond
    data: SliceModule | None = None  # that a checkpoint was made for, with its features
    held_out: pd.DataFrame | None = None  # slices of sources that heads trained anew have never seen, see `protocol`

    @property
    def point(self) -> OperatingPoint:
        return self.bundle.point

    @property
    def test(self) -> pd.DataFrame:
        return self.table[self.table["split"] == "test"]

    @property
    def headline(self) -> Row:
        """The row of the split policy in force."""
        return self.rows[0]


def evaluate(cfg: Config, data: SliceModule | None = None) -> Evaluation:
    """Measures the checkpoint cfg.ckpt on its own slices, divided as it was trained.

    data: made from `cfg` unless it is given; features that it holds are not used. Raises ChestCTError where there is no
    checkpoint (a network without training is never evaluated), DataError where the data or their division changed.
    """
    if not cfg.ckpt:
        raise ChestCTError(
            "Nothing to evaluate: give a checkpoint with ckpt=runs/.../checkpoints/best.ckpt, ckpt=last for the "
            "newest run, or a bundle with bundle=FOLDER."
        )
    device = pick_device(cfg.trainer.accelerator)
    print(f"Computing on {device}.", file=sys.stderr)
    model = load_classifier(Path(cfg.ckpt), cfg.trust).eval().to(device)
    data = data or SliceModule(cfg)
    data.prepare_data()
    data.setup()
    assert data.store is not None
    now = identity(data.manifest, data.store.data_hash)
    check_own(model.hparams["data"], now, cfg.ckpt, _on_other_data(Path(cfg.ckpt)))
    data.features = {}  # what training left there may come from convolutions that have changed since
    if cfg.features.cache and model.cfg.always_frozen:
        features.attach(data, model.net, features.in_fp32(cfg), SPLITS, views=1)
    answers = {split: features.outputs(model.net, data.dataset(split), cfg.data.batch_size) for split in SPLITS}
    novelty_model = fit_marks(data.manifest, answers["train"][1], answers["valid"][1])
    parts = []
    for split in ("valid", "test"):
        logits, pooled = answers[split]
        part = prediction_table(data.manifest, split, logits, cfg.task)
        parts.append(part.assign(novelty=novelty_model.distance(pooled).numpy()))
    table = pd.concat(parts, ignore_index=True)
    point = fit_point(table, cfg)
    table = with_decisions(table, point, cfg.task)
    ckpt = Path(cfg.ckpt).resolve()
    about = {
        "data_hash": data.store.data_hash,
        # In a run, its folder and below; else the name: where it lies on this machine is nobody's business.
        "checkpoint": "/".join(ckpt.parts[-3:] if ckpt.parent.name == "checkpoints" else ckpt.parts[-1:]),
        "splitting": {name: getattr(cfg.data, name) for name in SPLITTING},
    } | ({"features": cfg.features.backend} if cfg.features.backend in ROUNDED else {})
    facts = training_facts(data.manifest, table) | {"task": cfg.task}
    facts["data"]["seen"] = sorted({*now["seen"]["train"], *now["seen"]["valid"]})
    bundle = Bundle(model.net, point, novelty_model, normal_baseline(model, data, cfg), facts)
    evaluation = assemble(cfg, bundle, table, data.manifest, data.store.images, about, data)
    evaluation.sections["audit"] = kept_audit(cfg, data.store)
    return evaluation


def fit_marks(manifest: pd.DataFrame, train: torch.Tensor, valid: torch.Tensor) -> NoveltyModel:
    """The novelty model that the pooled features of these splits give, float [N, D] in the manifest's order."""
    counts = of_patients_first(manifest[manifest["split"] == "valid"])
    return fit_novelty(train, valid[counts])


def fit_point(table: pd.DataFrame, cfg: Config) -> OperatingPoint:
    """The operating point that the validation slices of a table of predictions give."""
    valid = measurable(table, "valid")
    return OperatingPoint.fit(logits_of(valid), valid["target"].to_numpy(), cfg.evaluation, valid["source"].tolist())


def assemble(
    cfg: Config,
    bundle: Bundle,
    table: pd.DataFrame,
    manifest: pd.DataFrame,
    images: np.ndarray,
    about: dict[str, Any],
    data: SliceModule | None = None,
) -> Evaluation:
    """All that follows from a table of decisions: metrics, the headline's row, and what every report has.

    bundle: with the facts that `training_facts` makes.
    """
    metrics = {split: metrics_of(measurable(table, split), cfg) for split in table["split"].unique()}
    test = table[table["split"] == "test"]
    of_test = drift.measured(manifest[manifest["split"] == "test"], test)
    sections = {
        "subgroups": subgroups(test, cfg),
        "shift": drift.differences(bundle.facts, of_test),
        "made": provenance(),
    }
    about = {
        "task": cfg.task,
        "data": cfg.data.name,
        "split": cfg.data.split,
        "synthetic": is_synthetic(cfg.data),
        "leaked": int(table["leaked"].sum()),
    } | about
    rows = [row(cfg, str(about["split"]), test, metrics["test"], data)]
    return Evaluation(cfg, bundle, table, manifest, images, metrics, rows, about, sections, data)


def _on_other_data(ckpt: Path) -> str:
    """How the model of a checkpoint is measured on data that are not its own, the end of a sentence."""
    folder = ckpt.parent.parent / "bundle"
    command = f"python evaluate.py {shlex.quote(f'bundle={folder}')} data=... data.root=..."
    return f"measure its bundle, which leaves out what it has seen: {command}" if folder.is_dir() else "train anew."


@torch.no_grad()
def normal_baseline(model: Classifier, data: SliceModule, cfg: Config) -> torch.Tensor | None:
    """What NORMALS normal training slices show (see saliency); None for a head that judges places and needs none."""
    if has_places(model.net.head):
        return None
    dataset = data.dataset("train")
    normal = np.flatnonzero((data.manifest.loc[data.manifest["split"] == "train", "label"] == "normal").to_numpy())
    chosen = np.random.default_rng(cfg.data.split_seed).permutation(normal)[:NORMALS].tolist()
    return normal_cam(model.net, conv5_of(model, data, dataset.images[dataset.rows[chosen]], cfg)).cpu()


@torch.no_grad()
def conv5_of(model: Classifier, data: SliceModule, images: np.ndarray, cfg: Config) -> torch.Tensor:
    """`net.conv5` of squares [N, S, S], float32 on the network's device; rounded to float16.

    Computed and cached like frozen features: they take as long as all else in a warm run.
    """
    net, batch_size = model.net, cfg.features.batch_size
    if cfg.features.cache and model.cfg.always_frozen:
        cfg = features.settled(cfg, net.mean.device)
        conv5, device, quantised = features.convolutions(data, net, cfg)
        folder = features.space_folder(cfg, net.digest, 0, quantised) / "conv5"
        contents = [digest(image.tobytes()) for image in images]
        kept = Kept(lambda x: conv5(x).half(), contents, folder)  # half the space

        def squares(positions: Sequence[int]) -> list[torch.Tensor]:
            return list(net.batches(images[positions], len(positions)))

        maps = extract([kept], squares, device, batch_size=batch_size)[0][:]
    else:
        maps = torch.cat([net.conv5(x).half().cpu() for x in net.batches(images, batch_size)])
    return maps.to(net.mean.device).float()


def with_decisions(table: pd.DataFrame, point: OperatingPoint, task: str) -> pd.DataFrame:
    """The table of predictions and novelty with calibrated `probability_CLASS`, `flagged` (at the threshold),
    `decision` (`uncertain` or `refused` for some) and conformal `set`.
    """
    names = classes_of(task)
    probabilities = point.probabilities(logits_of(table))
    return table.assign(
        **{f"probability_{name}": probabilities[:, i] for i, name in enumerate(names)},
        flagged=1 - probabilities[:, 0] >= point.threshold,
        decision=point.decide(probabilities, table["novelty"].to_numpy()),
        set=[" or ".join(np.array(names)[held]) or "none" for held in point.sets(probabilities)],
    )


def logits_of(table: pd.DataFrame) -> np.ndarray:
    """The logits in a table of predictions, float64 [N, outputs]."""
    return table[[column for column in table if str(column).startswith("logit_")]].to_numpy()


def metrics_of(part: pd.DataFrame, cfg: Config) -> dict[str, Estimate]:
    """All metrics of one split."""
    return measure(part, cfg.task, cfg.evaluation.resamples, cfg.data.split_seed)


def row(cfg: Config, policy: str, test: pd.DataFrame, estimates: dict[str, Estimate], data: SliceModule | None) -> Row:
    """A line of the side-by-side table, with the best shortcut on the same slices where the data is at hand."""
    slices = {name: int((test["label"] == name).sum()) for name in ("normal", "cancer")}
    line = Row(policy, estimates, slices, int(test["group"].nunique()), int(test["leaked"].sum()))
    if data is None or data.store is None or 0 in slices.values():
        return line
    scores = shortcut_scores(data.manifest, data.store.images, seed=cfg.data.split_seed)
    best = max(scores, key=lambda baseline: baseline.auroc)
    cancer = (test["label"] == "cancer").to_numpy()
    model = 1 - test["probability_normal"].to_numpy()
    margin = auroc_difference(model, best.scores, cancer, test["group"], cfg.evaluation.resamples, cfg.data.split_seed)
    return dataclasses.replace(line, shortcut=best.title, shortcut_auroc=best.auroc, margin=margin)


def provenance() -> dict[str, Any]:
    """How the numbers came about: command, time, versions. It goes into cards that others read: no folders of here."""
    program = Path(sys.argv[0]).name.replace("__main__.py", "chestct")
    arguments = [FOLDERS.sub(".../", argument) for argument in sys.argv[1:]]
    return {
        "command": " ".join(["python" if program.endswith(".py") else "", program, shlex.join(arguments)]).strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "chestct": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **code_version(),
    }
