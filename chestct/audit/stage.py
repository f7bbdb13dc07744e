"""The audit as a whole: of any set of slices, or of a store under every split policy that its folders admit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from chestct.audit import inventory, leakage, shortcuts, showcase
from chestct.audit.findings import Audit, findings
from chestct.config.schema import Config
from chestct.data.splits import make_splits
from chestct.data.store import Store
from chestct.errors import DataError
from chestct.files import digest, json_digest, write_atomic
from chestct.stats.drift import split_shift

POLICIES = ("official", "official_clean", "grouped")


def audit(
    manifest: pd.DataFrame,
    splits: Mapping[str, pd.Series],
    images: np.ndarray,
    unreadable: Sequence[Mapping[str, str]],
    pairs: pd.DataFrame,
    *,
    name: str,
    split: str,
    seed: int = 0,
    skipped: Sequence[Mapping[str, str]] = (),
    disbelieved: Sequence[str] = (),
) -> Audit:
    """Everything that is wrong with a set of slices, with the split policy `split` in force.

    manifest: one row a slice; splits: for each policy "train" | "valid" | "test" | "" for every slice (index as the
    manifest's); images: uint8 [M, S, S], by the manifest's `row`; unreadable: source, path, reason of each;
    pairs: columns a, b (positions in the manifest), similarity, kind "exact" | "near" | "series". name: what the data
    is called; skipped: source, path, reason of each; disbelieved: sentences about identifiers. Raises DataError if
    there are no slices, KeyError if `split` is not among the policies.
    """
    if manifest.empty:
        raise DataError(
            f"Nothing to audit: {name} has no readable slices ({len(unreadable)} unreadable files). "
            "Check data.root, or run 'dvc pull'."
        )
    policies = {str(policy): column.loc[manifest.index].reset_index(drop=True) for policy, column in splits.items()}
    manifest = manifest.reset_index(drop=True)
    in_force = policies[split]
    leaks = {policy: leakage.leaks(manifest, column, pairs) for policy, column in policies.items()}
    conflicts = leakage.conflicts(manifest, pairs)
    shifts = split_shift(shortcuts.columns(manifest), in_force, manifest["group"])
    shown: inventory.Table = next((leaks[policy]["list"] for policy in (split, *leaks) if leaks[policy]["list"]), [])
    result = Audit(
        name=name,
        split=split,
        seed=seed,
        counts=inventory.counts(manifest, in_force),
        balance=inventory.balance(manifest, in_force),
        formats=inventory.formats(manifest),
        sizes=inventory.sizes(manifest),
        unreadable=[{key: row[key] for key in ("source", "path", "reason")} for row in unreadable],
        duplicates=leakage.duplicates(manifest, policies, pairs),
        leakage=leaks,
        conflicts=conflicts,
        shortcuts=shortcuts.shortcuts(manifest, policies, images, seed=seed),
        shift=[row | {"title": shortcuts.TITLES[row["name"]]} for row in shifts],
        contacts=showcase.contacts(manifest, in_force, seed=seed),
        examples=showcase.examples(manifest, pairs, conflicts, shown),
        skipped=[dict(row) for row in skipped],
        disbelieved=list(disbelieved),
    )
    return replace(result, findings=findings(result))


def audit_store(cfg: Config, store: Store) -> Audit:
    """Audits a store under the split policy of the settings, and under the others for comparison.

    Raises DataError where data.split does not fit the data.
    """
    policies = {cfg.data.split: make_splits(store.manifest, cfg.task, cfg.data)}
    for policy in POLICIES:
        if policy != cfg.data.split and (split := _splits(cfg, store, policy)) is not None:
            policies[policy] = split
    return audit(
        store.manifest,
        policies,
        store.images,
        store.unreadable,
        store.pairs,
        name=cfg.data.name,
        split=cfg.data.split,
        seed=cfg.data.split_seed,
        skipped=store.skipped,
        disbelieved=store.disbelieved,
    )


def kept_audit(cfg: Config, store: Store) -> Audit:
    """The audit of this store under this split from `kept_folder`; made, and kept there, where it is missing."""
    kept = kept_folder(cfg, store) / "report.json"
    if kept.is_file():
        return Audit.from_json(kept.read_text(encoding="utf-8"))
    made = audit_store(cfg, store)
    write_atomic(kept, made.to_json())
    return made


def kept_folder(cfg: Config, store: Store) -> Path:
    """The folder under cache_dir for the audit of this store under this split, by this code."""
    data = cfg.data
    code = [digest(path.read_bytes()) for path in sorted(Path(__file__).parent.glob("*.py"))]
    what: list[Any] = [code, store.data_hash, store.settings, store.manifest["group"].tolist()]
    what += [make_splits(store.manifest, cfg.task, data).tolist()]
    what += [store.skipped, store.disbelieved]
    what += [cfg.task, data.name, data.split, data.split_seed, data.folds, data.fold]
    what += [data.valid_fraction, data.test_fraction]
    return cfg.cache / "audit" / json_digest(what)[:12]


def _splits(cfg: Config, store: Store, policy: str) -> pd.Series | None:
    """The splits under another policy; None where the folders do not admit it."""
    other = replace(cfg.data, split=policy, folds=0, fold=0)
    try:
        return make_splits(store.manifest, cfg.task, other)
    except DataError:
        return None
