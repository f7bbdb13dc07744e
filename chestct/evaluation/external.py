"""A bundle on slices that it never saw: another hospital's folders, or the test slices it was made with.

Nothing is fitted here. Threshold, calibration and novelty stay as the bundle has them, and slices that were in its
training data are left out, which the bundle knows by their hashes.
"""

import dataclasses

import numpy as np
import pandas as pd

from chestct.config.schema import Config, classes_of
from chestct.data.prepare import prepare_store
from chestct.data.splits import load_splits
from chestct.data.store import Store
from chestct.errors import DataError
from chestct.evaluation.evaluate import Evaluation, assembled, decided
from chestct.evaluation.sections import optional_sections
from chestct.models.bundle import Bundle, load_bundle
from chestct.models.predictions import prediction_table


def evaluate_bundle(cfg: Config) -> Evaluation:
    """Measures the bundle cfg.bundle on the slices that cfg.data describes, checks that the settings ask for included.

    The very data that the bundle was made with give its test slices; of other data, every slice counts that the bundle
    has not been trained on. Raises BundleError and DataError.
    """
    # The same figures on every machine, whatever is installed there: another backend is measured where it is named.
    backend = "torch" if cfg.serve.backend == "auto" else cfg.serve.backend
    bundle = load_bundle(cfg.bundle or "packaged", backend, cfg.trainer.accelerator)
    cfg = as_made(cfg, bundle)
    store = prepare_store(cfg, cfg.trainer.progress)
    manifest, left_out = _slices(cfg, store, bundle)
    if not manifest["subtype"].isin(bundle.classes).all():
        cfg = dataclasses.replace(cfg, task="binary")
    table = _predicted(manifest, store, bundle, cfg)
    own = store.data_hash == bundle.facts["data"].get("data_hash")
    about = {
        "split": cfg.data.split if own else "external",
        "data_hash": store.data_hash,
        "bundle": bundle.id,
        "left_out": left_out,
    }
    evaluation = assembled(cfg, bundle, table, manifest, store.images, about, bundle.facts)
    evaluation.sections |= optional_sections(evaluation)
    return evaluation


def as_made(cfg: Config, bundle: Bundle) -> Config:
    """The settings with the bundle's own task and preprocessing."""
    data = dataclasses.replace(cfg.data, **dataclasses.asdict(bundle.preprocess), window=bundle.window, views=0)
    return dataclasses.replace(cfg, task=bundle.task, data=data)


def _slices(cfg: Config, store: Store, bundle: Bundle) -> tuple[pd.DataFrame, int]:
    """The slices to measure, with `split` "test", `target` and `leaked`; and how many were left out as known."""
    if store.data_hash == bundle.facts["data"].get("data_hash"):
        as_split = dataclasses.replace(cfg.data, **bundle.facts["data"]["splitting"])
        manifest = load_splits(store.manifest, dataclasses.replace(cfg, data=as_split)).query("split == 'test'")
    else:
        manifest = store.manifest.drop_duplicates("content").assign(split="test", leaked=False)
    # Of the bundle's own data, too: another version may find other groups and deal them otherwise. Leaks that were
    # allowed are stamped instead.
    known = manifest["content"].str[:16].isin(bundle.seen) & ~manifest["leaked"]
    if known.all():
        raise DataError(
            f"All {len(manifest)} slices of {cfg.data.name} were in the bundle's training data. Give other data."
        )
    return manifest[~known].reset_index(drop=True), int(known.sum())


def _predicted(manifest: pd.DataFrame, store: Store, bundle: Bundle, cfg: Config) -> pd.DataFrame:
    """Predictions of every slice; where subtypes are not known, those of a subtype bundle are reduced to cancer."""
    rows = manifest["row"].to_numpy()
    parts = [bundle.predict(store.images[rows[at : at + 256]]) for at in range(0, len(rows), 256)]
    logits, novelty = (np.concatenate([getattr(part, name) for part in parts]) for name in ("logits", "novelty"))
    names = {name: i for i, name in enumerate(classes_of(cfg.task))}
    manifest = manifest.assign(target=manifest["label" if cfg.task == "binary" else "subtype"].map(names))
    table = prediction_table(manifest, "test", logits, bundle.task)
    table = decided(table, bundle.point, novelty, bundle.task)
    return table if cfg.task == bundle.task else table.assign(probability_cancer=1 - table["probability_normal"])
