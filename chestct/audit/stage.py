"""The audit as a stage of the pipeline: of a store, under every split policy that its folders admit."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from chestct.audit.findings import Audit
from chestct.audit.pictures import pictures
from chestct.audit.report import audit, summary, write
from chestct.config.schema import Config
from chestct.data.prepare import prepare_store
from chestct.data.splits import make_splits
from chestct.data.store import Store
from chestct.errors import DataError

POLICIES = ("official", "official_clean", "grouped")


def audit_store(cfg: Config, store: Store, out: Path) -> Audit:
    """Audits a store under the split policy of the settings, beside the others, and writes report and pictures.

    Raises DataError where data.split does not fit the data.
    """
    in_force = make_splits(store.manifest, cfg.task, cfg.data)
    others = {policy: _splits(cfg, store, policy) for policy in POLICIES if policy != cfg.data.split}
    policies = {cfg.data.split: in_force} | {policy: split for policy, split in others.items() if split is not None}
    found = audit(
        store.manifest,
        policies,
        store.images,
        store.unreadable,
        store.pairs,
        name=cfg.data.name,
        split=cfg.data.split,
        seed=cfg.data.split_seed,
    )
    pictures(found, out / "pictures")
    write(found, out)
    return found


def kept_audit(cfg: Config, store: Store) -> Path:
    """The folder under cache_dir with the audit of this store under this split; made where it is not there yet."""
    data = cfg.data
    code = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.iterdir()) if f.is_file()))
    what: list[Any] = [code.hexdigest(), store.data_hash, store.settings, store.manifest["group"].tolist()]
    what += [make_splits(store.manifest, cfg.task, data).tolist()]
    what += [cfg.task, data.split, data.split_seed, data.folds, data.fold]
    what += [data.valid_fraction, data.test_fraction]
    out = cfg.cache / "audit" / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
    if not (out / "report.html").is_file():  # written last
        audit_store(cfg, store, out)
    return out


def validate(cfg: Config, out: Path) -> Audit:
    """What `chestct audit` does: ingest, audit, summary on the terminal.

    Raises DataError where a finding is of a kind that data.audit.fail_on names; the report is written all the same.
    """
    store = prepare_store(cfg, cfg.trainer.progress)
    found = audit_store(cfg, store, out)
    print(summary(found))
    print(f"\nreport  {out / 'report.html'}")
    failed = sorted({f.kind for f in found.findings if f.severity != "info"} & set(cfg.data.audit.fail_on))
    if failed:
        raise DataError(
            f"The audit found {', '.join(failed)}, which data.audit.fail_on forbids. See {out / 'report.html'}."
        )
    return found


def _splits(cfg: Config, store: Store, policy: str) -> pd.Series | None:
    """The splits under another policy; None where the folders do not admit it."""
    other = replace(cfg.data, split=policy, folds=0, fold=0)
    try:
        return make_splits(store.manifest, cfg.task, other)
    except DataError:
        return None
