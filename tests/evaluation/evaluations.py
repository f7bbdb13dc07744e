"""Made-up evaluations: predictions whose quality is known, measured like those of a checkpoint."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from chestct.config.schema import Config, classes_of
from chestct.evaluation.evaluate import Evaluation, Row, metrics_of, with_decisions
from chestct.models.bundle import Bundle
from chestct.models.novelty import fit_novelty
from chestct.models.operating_point import OperatingPoint
from chestct.models.predictions import output_names
from chestct.stats.metrics import Estimate


def predictions(labels: list[str], logits: np.ndarray, task: str, split: str) -> pd.DataFrame:
    """A table of predictions with one group a slice. labels: subtypes; logits: [N, K]."""
    names = classes_of(task)
    label = ["normal" if name == "normal" else "cancer" for name in labels]
    table = pd.DataFrame(
        {
            "source": "made_up",
            "path": [f"{split}/{name}/{i}.png" for i, name in enumerate(labels)],
            "split": split,
            "label": label,
            "subtype": labels,
            "target": [names.index(name) for name in (label if task == "binary" else labels)],
            "group": range(len(labels)),
            "content": [f"{split} {i}" for i in range(len(labels))],
            "leaked": False,
        }
    )
    return table.assign(**{f"logit_{name}": logits[:, i] for i, name in enumerate(output_names(task))})


def draw(n: int, task: str, seed: int, strength: float = 2.0) -> tuple[list[str], np.ndarray]:
    """Labels of n slices and logits [n, K] that are larger for the right class."""
    rng = np.random.default_rng(seed)
    kinds = ("normal", "adenocarcinoma", "large_cell", "squamous")
    labels = [kinds[1 + i // 2 % 3 if i % 2 else 0] for i in range(n)]
    if task == "binary":
        side = np.array([1 if name != "normal" else -1 for name in labels])
        return labels, (strength * side + rng.normal(size=n))[:, None]
    return labels, strength * np.eye(4)[[kinds.index(name) for name in labels]] + rng.normal(size=(n, 4))


def made_up(
    task: str = "binary",
    test: tuple[list[str], np.ndarray] | None = None,
    point: OperatingPoint | None = None,
    n: int = 80,
    **sections: Any,
) -> Evaluation:
    """An evaluation of 60 valid and `n` test slices, or of those given, without a network."""
    cfg = Config(task=task)
    cfg.data.name = "made_up"
    cfg.evaluation.resamples = 200
    cfg.evaluation.threshold = "sensitivity>=0.95"
    valid = predictions(*draw(60, task, 1), task, "valid")
    tested = predictions(*(test or draw(n, task, 0)), task, "test")
    logits = [column for column in valid if column.startswith("logit_")]
    point = point or OperatingPoint.fit(valid[logits].to_numpy(), valid["target"].to_numpy(), cfg.evaluation)
    table = pd.concat([valid, tested], ignore_index=True)
    table = with_decisions(table.assign(novelty=np.linspace(0.2, 1.3, len(table))), point, task)
    metrics = {name: metrics_of(part, cfg) for name, part in table.groupby("split", sort=False)}
    about = {"task": task, "data": "made_up", "split": "grouped", "synthetic": False, "leaked": 0}
    about |= {"data_hash": "0" * 64, "checkpoint": "best.ckpt"}
    slices = {name: int((tested["label"] == name).sum()) for name in ("normal", "cancer")}
    margin = Estimate(0.1, 0.05, 0.15, len(tested), len(tested))
    row = Row("grouped", metrics["test"], slices, len(tested), 0, "Width", 0.8, margin)
    cfg.evaluation.gallery = 0
    bundle, none = Bundle(None, point, None, None, {"task": task}), np.zeros(0)  # type: ignore[arg-type]
    return Evaluation(cfg, bundle, table, table.assign(lesion=b""), none, metrics, [row], about, sections)


def with_images(evaluation: Evaluation, net: Any, size: int) -> Evaluation:
    """The same with a network and a noise image for every test slice, as far as galleries need them."""
    manifest = evaluation.table.assign(row=np.arange(len(evaluation.table)), lesion=b"")
    images = np.random.default_rng(0).integers(0, 256, (len(manifest), size, size), dtype=np.uint8)
    evaluation.manifest, evaluation.images = manifest, images
    zeros = torch.zeros(net.head[-1].out_features, size // 16, size // 16)
    novelty_model = fit_novelty(*torch.rand(2, 40, 512))
    evaluation.bundle = Bundle(
        net, evaluation.point, novelty_model, torch.stack([zeros, zeros + 1]), evaluation.bundle.facts
    )
    return evaluation
