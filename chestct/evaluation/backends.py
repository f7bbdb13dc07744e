"""Other backends for a bundle, each verified against torch on validation slices before it is kept.

What is compared is all that a reader is shown: logits, decisions (uncertain and refused ones included), the ranking,
and where the heat lies. A backend that falls short of LIMITS is refused with its numbers; those of one that is kept
travel in bundle.json and in the model card.
"""

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from chestct.config.schema import Config
from chestct.config.schema_serving import FILES, ROUNDED, TENSORS
from chestct.data.prepare import prepare_store
from chestct.data.splits import measurable
from chestct.errors import BundleError, DataError
from chestct.evaluation.external import as_made, own_manifest
from chestct.models.backends import PACKAGES, calibration_slices, convert, load_graph
from chestct.models.bundle import Bundle, backend_files, load_bundle, lock_of, save_bundle
from chestct.models.operating_point import NORMAL, Outputs
from chestct.stats.metrics import auroc_difference

LIMITS = {
    "fp32": {"logits": 0.01, "decisions": 0.01, "auroc": -0.001, "heat": 0.99},
    "bfloat16": {"logits": 0.05, "decisions": 0.02, "auroc": -0.001, "heat": 0.99},
    "INT8": {"logits": 0.5, "decisions": 0.05, "auroc": -0.005, "heat": 0.9},
}
"""Largest difference of a logit, in standard deviations of the logits; share of decisions that change; AUROC lost;
least mean correlation of heat maps. Of the decisions as many as there are classes may always change: the conformal
quantile of a class is the score of one of the validation slices, for which any rounding decides."""

SECTION = "\n## Backends\n"


def add_backends(bundle: Bundle, folder: Path, cfg: Config, manifest: pd.DataFrame, images: np.ndarray) -> Bundle:
    """The bundle in `folder` with the backends that cfg.format names, each verified; as loaded from there.

    manifest: the slices of the bundle's own data, with split and `row`, their place among `images`, uint8 [N, S, S].
    Raises ConfigError where a package is missing, and BundleError, with the numbers, where a backend falls short; the
    folder is then as it was.
    """
    train, valid = manifest[manifest["split"] == "train"], measurable(manifest, "valid")
    order = train["row"].to_numpy()[calibration_slices(len(train))]
    squares = images[valid["row"]]
    expected = bundle.predict(squares, explain=True)
    verified: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for name in cfg.format.split("+"):
        parts = convert(bundle.net, name, images[np.sort(order)])
        answers = dataclasses.replace(bundle, graph=load_graph(name, parts)).predict(squares, explain=True)
        # INT8 rounds small features most, and so moves all slices away from the training set: the mark moves along.
        mark = float(np.median(answers.novelty) / max(np.median(expected.novelty), 1e-12))
        novelty = answers.novelty / mark
        decision = bundle.point.decide(answers.probabilities, novelty)
        numbers = compared(expected, dataclasses.replace(answers, novelty=novelty, decision=decision), valid, cfg)
        if faults := shortcomings(name, numbers, len(bundle.classes)):
            raise BundleError(
                f"{name} is refused: on {len(valid)} validation slices, {'; '.join(faults)}. The bundle {folder} "
                "stays as it was."
            )
        calibration = len(order) if name == "openvino_int8" else 0
        by = f"{PACKAGES[name]} {importlib.metadata.version(PACKAGES[name])}"
        verified[name] = numbers | {"novelty": mark, "calibration": calibration, "version": by}
        files |= dict(zip(FILES[name], parts, strict=True))
    with lock_of(folder):
        current = load_bundle(folder)  # which another command may have given a backend, or another model
        facts, now = (
            one.facts | {"files": one.facts["files"][TENSORS], "digest": 0, "backends": 0} for one in (bundle, current)
        )
        if facts != now:
            raise BundleError(f"Meanwhile {folder} became another bundle, and stays so. The same command begins anew.")
        backends, files = current.facts.get("backends", {}) | verified, backend_files(folder, current.facts) | files
        card = f"{bundle.card.partition(SECTION)[0].rstrip()}\n{SECTION}\n{table(backends)}"
        facts = bundle.facts | {"backends": backends}
        return save_bundle(folder, dataclasses.replace(bundle, facts=facts, card=card, files=files))


def compared(expected: Outputs, answers: Outputs, valid: pd.DataFrame, cfg: Config) -> dict[str, Any]:
    """How the answers for validation slices differ from torch's: the numbers of bundle_schema.Verified.

    Heat maps are compared where they are shown: on slices that torch does not call normal.
    """
    shown = np.flatnonzero(expected.decision != NORMAL)
    maps = [np.asarray(outputs.heat)[shown].reshape(len(shown), -1) for outputs in (expected, answers)]
    settings = (cfg.evaluation.resamples, cfg.data.split_seed)
    cancer = (valid["label"] == "cancer").to_numpy()
    auroc = auroc_difference(answers.score, expected.score, cancer, valid["group"], *settings)
    return {
        "slices": len(valid),
        "logits": float(np.abs(answers.logits - expected.logits).max() / max(expected.logits.std(), 1e-12)),
        "decisions": float((answers.decision != expected.decision).mean()),
        "auroc": dataclasses.asdict(auroc),
        "heat": float(np.mean([_agreement(a, b) for a, b in zip(*maps, strict=True)])) if len(shown) else 1.0,
    }


def _agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two heat maps [h * w]; of two empty ones 1, of one that is empty 0."""
    if not a.std() or not b.std():
        return float(a.std() == b.std())
    return float(np.corrcoef(a, b)[0, 1])


def shortcomings(name: str, numbers: dict[str, Any], classes: int) -> list[str]:
    """What of the numbers lies beyond LIMITS, a sentence each."""
    limits = LIMITS[ROUNDED.get(name, "fp32")]
    limits = limits | {"decisions": max(limits["decisions"], classes / numbers["slices"])}
    logits, decisions = numbers["logits"], numbers["decisions"]
    auroc, heat = numbers["auroc"]["value"], numbers["heat"]
    checks = [  # in this form because NaN, too, falls short
        ("logits", logits <= limits["logits"], f"a logit differs by {logits:.3g} standard deviations"),
        ("decisions", decisions <= limits["decisions"], f"{decisions:.1%} of the decisions change"),
        ("auroc", auroc >= limits["auroc"], f"the AUROC changes by {auroc:+.4f}"),
        ("heat", heat >= limits["heat"], f"heat maps correlate by {heat:.3f} only"),
    ]
    return [f"{text} (limit {limits[key]:g})" for key, within, text in checks if not within]


def table(backends: dict[str, Any]) -> str:
    """The section of the model card."""
    lines = [
        "What computes in torch's place gives these answers, against torch's on the validation slices "
        "(`chestct export format=...`):",
        "",
        "| backend | slices | largest difference of a logit, in standard deviations | decisions that change | "
        "AUROC, difference (95 %) | heat maps, correlation | novelty of 1 was | calibrated on | by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, numbers in backends.items():
        auroc = numbers["auroc"]
        interval = "no interval" if auroc["low"] is None else f"{auroc['low']:+.4f} to {auroc['high']:+.4f}"
        cells = [name, numbers["slices"], f"{numbers['logits']:.2g}", f"{numbers['decisions']:.1%}"]
        cells += [f"{auroc['value']:+.4f} ({interval})", f"{numbers['heat']:.3f}", f"{numbers.get('novelty', 1):.3f}"]
        cells += [f"{numbers['calibration']} training slices" if numbers["calibration"] else "-", numbers["version"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def own_slices(cfg: Config, bundle: Bundle) -> tuple[pd.DataFrame, np.ndarray]:
    """The slices that a bundle was made with, divided as then, and their squares: what `add_backends` needs.

    Raises DataError where cfg.data describes other slices.
    """
    cfg = as_made(cfg, bundle)
    store = prepare_store(cfg, cfg.trainer.progress)
    manifest = own_manifest(cfg, store, bundle)
    if manifest is None:
        raise DataError(
            f"{cfg.data.name} is not the data that bundle {bundle.id} was made with, and no other slices may "
            "calibrate or verify a backend. Give that data (data=..., data.root=FOLDER), or export from the "
            "checkpoint: ckpt=..."
        )
    known = manifest["content"].str[:16].isin(bundle.seen)
    return manifest[known & (manifest["split"] != "test")], store.images
