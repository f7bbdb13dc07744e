"""The audit as a whole: what there is, what is there twice, and which held-out slices are known from training.

Tables count files, distinct contents and groups side by side, because only the last is worth anything statistically:
copies and slices of one patient are one observation, not many. Leakage is judged on groups, and exact copies apart
within them: a pixel-identical copy can be shown to anyone, a near-copy or a slice of the same patient is a matter of
degree. Every split policy is judged on its own, so that the report can show them side by side.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from chestct.audit.findings import Audit, Table
from chestct.audit.shortcuts import shortcuts
from chestct.config.schema import SPLITS as POLICIES
from chestct.config.schema import SUBTYPES, Config
from chestct.data.splits import LEFT_OUT, SPLITS, lacking, make_splits, measurable, of_patients_first, targets
from chestct.data.store import STORE, Store
from chestct.errors import DataError
from chestct.files import digest, file_digest, json_digest, write_atomic

CLASSES = (*SUBTYPES, "cancer")

EARLIER = {"test": ("train", "valid"), "valid": ("train",)}
"""What a slice of each held-out split must not be known from; decisions are made on valid, so test counts it too."""


def audit_store(cfg: Config, store: Store) -> Audit:
    """Everything that is wrong with a store under the split policy of the settings, and how the others would leak.

    Raises DataError where data.split does not fit the folders.
    """
    data, manifest, pairs = cfg.data, store.manifest, store.pairs
    # Unchecked, for the audit is what shows why a class is missing.
    in_force = make_splits(manifest, cfg.task, data, check=False)
    policies = {data.split: in_force}
    for policy in POLICIES:
        if policy != data.split:
            try:
                policies[policy] = make_splits(manifest, cfg.task, replace(data, split=policy, folds=0, fold=0))
            except DataError:  # the folders do not admit it
                continue
    return Audit(
        name=data.name,
        split=data.split,
        seed=data.split_seed,
        counts=counts(manifest, in_force),
        balance=balance(manifest, in_force),
        lacking=lacking(in_force, targets(manifest, cfg.task), cfg.task),
        unreadable=store.unreadable,
        duplicates=duplicates(manifest, pairs),
        leakage={policy: leaks(manifest, splits, pairs) for policy, splits in policies.items()},
        conflicts=conflicts(manifest, pairs),
        shortcuts=shortcuts(manifest, store.images, seed=data.split_seed),
        skipped=store.skipped,
        disbelieved=store.disbelieved,
        notes=store.notes,
    )


def kept_audit(cfg: Config, store: Store) -> Audit:
    """The audit of this store under this split from `kept_folder`; made, and kept there, where it is missing."""
    kept = kept_folder(cfg, store) / "report.json"
    if kept.is_file():
        return Audit.from_json(kept.read_text(encoding="utf-8"))
    audit = audit_store(cfg, store)
    write_atomic(kept, audit.to_json())
    return audit


def kept_folder(cfg: Config, store: Store) -> Path:
    """The folder under cache_dir for the audit of this store under this split, by this code."""
    data, package = cfg.data, Path(__file__).parents[1]
    modules = [*package.glob("audit/*.py"), *package.glob("stats/*.py"), package / "data" / "splits.py"]
    code = [digest(path.read_bytes()) for path in sorted(modules)]
    splits = make_splits(store.manifest, cfg.task, data, check=False).tolist()
    # The fractions are of the policies that are not in force.
    settings = [cfg.task, data.name, data.split, data.split_seed, data.valid_fraction, data.test_fraction]
    whole_store = file_digest(store.folder / STORE)  # which holds the checksums of its pieces
    return cfg.cache / "audit" / json_digest([code, whole_store, splits, settings])[:12]


def counts(manifest: pd.DataFrame, split: pd.Series) -> Table:
    """Files, distinct contents and groups for every source, split and class that occurs, in a fixed order."""
    held, subtype = pd.Categorical(split, [*SPLITS, LEFT_OUT]), pd.Categorical(manifest["subtype"], CLASSES)
    return _sizes(manifest.assign(split=held, subtype=subtype), ["source", "split", "subtype"])


def balance(manifest: pd.DataFrame, split: pd.Series) -> Table:
    """The same for every split and label of what counts there, with a row of zeros where a label is missing."""
    divided = manifest.assign(split=split)
    part = pd.concat([measurable(divided, name) for name in SPLITS])
    label, held = pd.Categorical(part["label"], ["normal", "cancer"]), pd.Categorical(part["split"], SPLITS)
    return _sizes(part.assign(split=held, label=label), ["split", "label"], observed=False)


def leaks(manifest: pd.DataFrame, split: pd.Series, pairs: pd.DataFrame) -> dict[str, Any]:
    """Held-out slices whose content or group is in an earlier split.

    split: "train" | "valid" | "test" | "" for each slice; pairs: only to name the most alike. Returns, for "test" and
    "valid", `slices` (how many there are), `copies` (pixel-identical to an earlier slice), `related` (no copy, but in
    one group with one), and `by_class` with the same three; under `list` every leaked slice with the earlier one
    (`twin`) that gives it away; `left_out` counts slices in no split.
    """
    manifest = _named(manifest)
    result: dict[str, Any] = {"left_out": int((split == LEFT_OUT).sum()), "list": []}
    alike = pd.concat([pairs, pairs.rename(columns={"a": "b", "b": "a"})]).sort_values("similarity", ascending=False)
    for held_out, earlier in EARLIER.items():
        part = manifest[split == held_out]
        # The first of `earlier` names the worst place for a copy, so it is looked in first.
        known = pd.concat([manifest[split == name] for name in earlier])
        firsts = {key: known.drop_duplicates(key) for key in ("content", "group")}
        by_content, by_group = (pd.Series(first.index, first[key]) for key, first in firsts.items())
        closest = alike[alike["b"].isin(known.index)].drop_duplicates("a").set_index("a")["b"]
        copy = part["content"].map(by_content)
        twin = copy.fillna(part.index.to_series().map(closest)).fillna(part["group"].map(by_group))
        how = pd.Series(np.select([copy.notna(), twin.notna()], ["copy", "related"], ""), part.index)
        by_class = {name: _tally(how[part["subtype"] == name]) for name in CLASSES if (part["subtype"] == name).any()}
        result[held_out] = _tally(how) | {"by_class": by_class}
        twin = twin.dropna().astype(int)
        rows = part.loc[twin.index, ["path", "subtype"]].assign(
            split=held_out,
            kind=how[twin.index],
            twin_path=manifest.loc[twin, "path"].to_list(),
            twin_split=split[twin].to_list(),
        )
        result["list"] += rows.to_dict("records")
    return result


def duplicates(manifest: pd.DataFrame, pairs: pd.DataFrame) -> dict[str, Any]:
    """Counts of exact copies and near-copies, whatever the split; `redundant` files are copies of another one.

    Phantoms beside patients do not count.
    """
    manifest = manifest[of_patients_first(manifest)]
    copies = manifest["content"].value_counts()
    by_class = manifest.groupby("subtype").agg(files=("path", "size"), contents=("content", "nunique"))
    return {
        "files": len(manifest),
        "contents": len(copies),
        "redundant": len(manifest) - len(copies),
        "exact_groups": int((copies > 1).sum()),
        "near_pairs": len(_near(manifest, pairs)),
        "by_class": {name: by_class.loc[name].to_dict() for name in CLASSES if name in by_class.index},
    }


def conflicts(manifest: pd.DataFrame, pairs: pd.DataFrame) -> Table:
    """Slices that look the same and are called different things.

    One row for every content with several classes (`kind` "copy") and for every near pair of different classes
    ("near"), with paths, classes and whether cancer and normal contradict each other (`labels`). Cancer of unknown
    subtype does not contradict a subtype.
    """
    manifest = _named(manifest)
    copied = manifest[manifest.duplicated("content", keep=False)]
    alike = [("copy", part.index.tolist()) for _, part in copied.groupby("content", sort=False)]
    near, subtype = _near(manifest, pairs)[["a", "b"]].to_numpy(int), manifest["subtype"].to_numpy()
    alike += [("near", pair) for pair in near[subtype[near[:, 0]] != subtype[near[:, 1]]].tolist()]
    rows = []
    for kind, places in alike:
        part = manifest.iloc[places]
        labels = part["label"].nunique() > 1
        if labels or part["subtype"][part["subtype"] != "cancer"].nunique() > 1:
            paths, classes = part["path"].to_list(), part["subtype"].to_list()
            rows.append({"kind": kind, "paths": paths, "classes": classes, "labels": labels})
    return sorted(rows, key=lambda row: (row["kind"] != "copy", not row["labels"]))


def _named(manifest: pd.DataFrame) -> pd.DataFrame:
    """The manifest with paths that tell slices apart: with the source, where there are several."""
    several = manifest["source"].nunique() > 1
    return manifest.assign(path=manifest["source"] + "/" + manifest["path"]) if several else manifest


def _near(manifest: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs of near-copies in the manifest, one for each two contents; copies have near-copies in common."""
    near, content = pairs[pairs["kind"] == "near"], manifest["content"]
    near = near[near["a"].isin(content.index) & near["b"].isin(content.index)]
    both = pd.DataFrame(np.sort([content[near["a"]], content[near["b"]]], axis=0).T, near.index)
    return near[(both[0] != both[1]) & ~both.duplicated()]


def _sizes(frame: pd.DataFrame, by: list[str], *, observed: bool = True) -> Table:
    grouped = frame.groupby(by, observed=observed)
    table = grouped.agg(files=("path", "size"), contents=("content", "nunique"), groups=("group", "nunique"))
    rows: list[Any] = table.reset_index().to_dict("records")
    return rows


def _tally(how: pd.Series) -> dict[str, int]:
    return {"slices": len(how), "copies": int((how == "copy").sum()), "related": int((how == "related").sum())}
