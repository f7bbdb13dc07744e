"""A bundle on slices that it never saw: another hospital's folders, or the test slices it was made with.

Nothing is fitted here. Threshold, calibration and novelty stay as the bundle has them, and slices that were in its
training data are left out, which the bundle knows by their hashes, with all that shares a group with them.
"""

import dataclasses
import sys
from typing import Any

import pandas as pd

from chestct.config.schema import Config, ModelConfig, classes_of
from chestct.data.prepare import prepare_store
from chestct.data.splits import groups_of, load_splits, of_patients_first
from chestct.data.store import Store
from chestct.errors import DataError
from chestct.evaluation.evaluate import Evaluation, assemble, with_decisions
from chestct.evaluation.sections import optional_sections
from chestct.models.bundle import Bundle, load_bundle
from chestct.models.predictions import prediction_table
from chestct.stats import drift


def evaluate_bundle(cfg: Config) -> Evaluation:
    """Measures the bundle cfg.bundle on the slices that cfg.data describes, checks that the settings ask for included.

    The very data that the bundle was made with give its test slices; of other data, every group counts of which the
    bundle has seen nothing. Raises BundleError and DataError.
    """
    # The same figures on every machine, whatever is installed there: another backend is measured where it is named.
    backend = "torch" if cfg.serve.backend == "auto" else cfg.serve.backend
    bundle = load_bundle(cfg.bundle or "packaged", backend, cfg.trainer.accelerator)
    drift.check_reference(bundle.facts, bundle.id)  # now, not after minutes
    cfg = as_made(cfg, bundle)
    store = prepare_store(cfg, cfg.trainer.progress)
    for note in (*store.disbelieved, *store.notes):  # what the groups, and so the intervals, rest on
        print(note, file=sys.stderr)
    if not store.manifest["subtype"].isin(bundle.classes).all():
        cfg = dataclasses.replace(cfg, task="binary")
    manifest, counts = _slices(cfg, store, bundle)
    table = _predicted(manifest, store, bundle, cfg)
    about = {"data_hash": store.data_hash, "bundle": bundle.id} | counts
    evaluation = assemble(cfg, bundle, table, manifest, store.images, about)
    evaluation.sections |= optional_sections(evaluation)
    return evaluation


def as_made(cfg: Config, bundle: Bundle) -> Config:
    """The settings with the bundle's own task, preprocessing and model."""
    data = dataclasses.replace(cfg.data, **dataclasses.asdict(bundle.preprocess), window=bundle.window, views=0)
    model = dict(bundle.facts["model"])
    model["freeze"] = not model.pop("trained_convolutions")
    return dataclasses.replace(cfg, task=bundle.task, data=data, model=ModelConfig(**model))


def own_manifest(cfg: Config, store: Store, bundle: Bundle) -> pd.DataFrame | None:
    """The slices that a bundle was made with, divided as then; None for others, or where it does not say how."""
    facts = bundle.facts["data"]
    if store.data_hash != facts.get("data_hash") or not facts.get("splitting"):
        return None
    data = dataclasses.replace(cfg.data, **facts["splitting"])
    return load_splits(store.manifest, dataclasses.replace(cfg, data=data))


def _slices(cfg: Config, store: Store, bundle: Bundle) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The slices to measure, with `split` "test" and `leaked`; and what reports say of them: `split`, and how many
    slices were `left_out` as known, contents for their `label_conflicts`, and `phantoms` beside patients.
    """
    own, split, conflicts = own_manifest(cfg, store, bundle), "external", 0
    if own is not None:
        manifest, split = own[own["split"] == "test"], bundle.facts["data"]["splitting"]["split"]
    else:
        manifest = store.manifest.assign(split="test", leaked=False)
        labels = manifest["label" if cfg.task == "binary" else "subtype"].groupby(manifest["content"])
        conflicting = labels.transform("nunique") > 1
        conflicts = manifest["content"][conflicting].nunique()
        manifest = manifest[~conflicting].drop_duplicates("content")
    # Of the bundle's own data, too: another version may find other groups and deal them otherwise. Leaks that were
    # allowed are stamped instead.
    known = manifest["group"].isin(groups_of(store.manifest, bundle.seen)) & ~manifest["leaked"]
    if known.all():
        raise DataError(
            f"Nothing is left to measure of {cfg.data.name}. Slices that the bundle learned from, or near-copies of "
            f"such: {len(manifest)}; with more than one label: {conflicts}. Give other data."
        )
    manifest = manifest[~known]
    measured = of_patients_first(manifest)
    counts = {"split": split, "left_out": int(known.sum()), "label_conflicts": conflicts}
    return manifest[measured].reset_index(drop=True), counts | {"phantoms": int((~measured).sum())}


def _predicted(manifest: pd.DataFrame, store: Store, bundle: Bundle, cfg: Config) -> pd.DataFrame:
    """Predictions of every slice; where subtypes are not known, those of a subtype bundle are reduced to cancer."""
    answers = bundle.predict(store.images, rows=manifest["row"].to_numpy())
    names = {name: i for i, name in enumerate(classes_of(cfg.task))}
    manifest = manifest.assign(target=manifest["label" if cfg.task == "binary" else "subtype"].map(names))
    table = prediction_table(manifest, "test", answers.logits, bundle.task)
    table = with_decisions(table.assign(novelty=answers.novelty), bundle.point, bundle.task)
    return table if cfg.task == bundle.task else table.assign(probability_cancer=1 - table["probability_normal"])
