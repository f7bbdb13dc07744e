"""From an evaluation to the bundle that is deployed: the last stage of the pipeline."""

import dataclasses
from pathlib import Path
from typing import Any

from chestct.config.schema import classes_of
from chestct.data.store import preprocess_of
from chestct.evaluation.evaluate import Evaluation
from chestct.models.bundle import Bundle, save_bundle
from chestct.version import code_version


def export(evaluation: Evaluation, folder: Path, card: str) -> Bundle:
    """Writes the bundle of an evaluated checkpoint to `folder`, and returns it as loaded from there.

    card: the model card, as chestct.reporting.render.model_card makes it.
    """
    cfg = evaluation.cfg
    model = {key: value for key, value in dataclasses.asdict(cfg.model).items() if key not in ("weights", "freeze")}
    facts = {
        "task": cfg.task,
        "classes": list(classes_of(cfg.task)),
        "model": model | {"trained_convolutions": not cfg.always_frozen},
        "preprocess": dataclasses.asdict(preprocess_of(cfg.data)),
        "window": dataclasses.asdict(cfg.data.window),
        "data": evaluation.about | evaluation.bundle.facts["data"],
        "metrics": {
            split: {name: dataclasses.asdict(estimate) for name, estimate in estimates.items()}
            for split, estimates in evaluation.metrics.items()
        },
        "statistics": evaluation.bundle.facts["statistics"],
        "elsewhere": elsewhere(evaluation),
        "code": code_version(),
    }
    return save_bundle(folder, dataclasses.replace(evaluation.bundle, facts=facts, card=card))


def elsewhere(evaluation: Evaluation) -> list[dict[str, Any]]:
    """What the same recipe did in each collection that was left out of training, where the protocol was run."""
    parts = evaluation.sections.get("protocol", {})
    if "loso" not in parts:
        return []
    auroc = {row["held out"]: row["AUROC"] for row in parts["loso"].rows}
    results = []
    for row in parts["threshold"].rows:
        source = row["held out"]
        figures = {"auroc": auroc[source], "sensitivity": row["sensitivity"], "specificity": row["specificity"]}
        values = {name: getattr(figure, "value", None) for name, figure in figures.items()}
        # A source of one class, or one that could not be held out, has no such figures.
        if source not in ("mean", "worst") and None not in values.values():
            results.append({"source": source, **values})
    return results
