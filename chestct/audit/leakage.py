"""Which slices are there twice, and which test slices are known from training.

Leakage is judged on groups, and exact copies apart within it: a pixel-identical copy can be shown to anyone,
whereas a near-copy or a slice of the same patient is a matter of degree. Every split policy is judged on its own, so
that the report can show them side by side.
"""

from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from chestct.audit.inventory import CLASSES, Table, records

EARLIER = {"test": ("train", "valid"), "valid": ("train",)}
"""What a slice of each held-out split must not be known from; decisions are made on valid, so test counts it too."""


def leaks(manifest: pd.DataFrame, split: pd.Series, pairs: pd.DataFrame) -> dict[str, Any]:
    """Held-out slices whose content or group is in an earlier split.

    manifest: one row a slice, index 0..N-1; split: "train" | "valid" | "test" | "" for each; pairs: as `duplicates`
    takes them, only to name the most alike. Returns, for "test" and "valid", `slices` (how many there are), `copies`
    (pixel-identical to an earlier slice), `related` (no copy, but in one group with one: near-copy or same patient),
    and `by_class` with the same three; under `list` one row for every leaked slice with the earlier slice (`twin`) that
    gives it away; `left_out` counts slices in no split.
    """
    result: dict[str, Any] = {"left_out": int((split == "").sum()), "list": []}
    alike = pd.concat([pairs, pairs.rename(columns={"a": "b", "b": "a"})]).sort_values("similarity", ascending=False)
    for held_out, earlier in EARLIER.items():
        part = manifest[split == held_out]
        # The first of `earlier` names the worst place for a copy, so it is looked in first.
        known = pd.concat([manifest[split == name] for name in earlier])
        by_content = known.drop_duplicates("content").reset_index().set_index("content")["index"]
        by_group = known.drop_duplicates("group").reset_index().set_index("group")["index"]
        copy = part["content"].map(by_content)
        closest = alike[alike["b"].isin(known.index)].drop_duplicates("a").set_index("a")["b"]
        twin = copy.fillna(part.index.to_series().map(closest)).fillna(part["group"].map(by_group))
        copies, related = copy.notna(), copy.isna() & twin.notna()
        result[held_out] = _tally(copies, related) | {
            "by_class": {
                name: _tally(copies[part["subtype"] == name], related[part["subtype"] == name])
                for name in CLASSES
                if (part["subtype"] == name).any()
            }
        }
        twin = twin.dropna().astype(int)
        rows = part.loc[twin.index, ["path", "subtype"]].assign(
            slice=twin.index,
            split=held_out,
            kind=np.where(copies[twin.index], "copy", "related"),
            twin=twin,
            twin_path=manifest.loc[twin, "path"].to_list(),
            twin_split=split[twin].to_list(),
        )
        result["list"] += records(rows)
    return result


def duplicates(manifest: pd.DataFrame, splits: dict[str, pd.Series], pairs: pd.DataFrame) -> dict[str, Any]:
    """Exact copies and near-copies, whatever the split.

    pairs: columns a, b (positions in the manifest), similarity in [-1, 1], kind "exact" | "near" | "series". Returns
    `files`, `contents`, `redundant` (files - contents), `exact_groups` (contents with more than one file), `largest`
    (files of the most frequent content), `near_pairs` (pairs of different contents), `by_class`, and `clusters`,
    largest first: every set of slices that exact and near pairs tie together, with its positions, the class of the
    first and the split of each under every policy.
    """
    files = manifest["content"].value_counts()
    near = pairs[pairs["kind"] == "near"]
    content = manifest["content"].to_numpy()
    distinct = {frozenset(pair) for pair in zip(content[near["a"]], content[near["b"]], strict=True)}
    by_class = manifest.groupby("subtype").agg(files=("path", "size"), contents=("content", "nunique"))
    return {
        "files": len(manifest),
        "contents": len(files),
        "redundant": len(manifest) - len(files),
        "exact_groups": int((files > 1).sum()),
        "largest": int(files.max()),
        "near_pairs": sum(len(pair) == 2 for pair in distinct),
        "by_class": {name: by_class.loc[name].to_dict() for name in CLASSES if name in by_class.index},
        "clusters": [
            {
                "slices": cluster,
                "subtype": manifest["subtype"].iat[cluster[0]],
                "splits": {policy: split.iloc[cluster].to_list() for policy, split in splits.items()},
            }
            for cluster in _clusters(manifest, near)
        ],
    }


def conflicts(manifest: pd.DataFrame, pairs: pd.DataFrame) -> Table:
    """Slices that look the same and are called different things.

    One row for every content with several classes (`kind` "copy") and for every near pair of different classes
    ("near"), with positions, paths, classes and whether cancer and normal contradict each other (`labels`). Cancer of
    unknown subtype does not contradict a subtype.
    """
    named = manifest[manifest["subtype"] != "cancer"]
    shared = manifest[manifest.duplicated("content", keep=False)]
    mixed = shared.groupby("content")["label"].nunique() > 1
    mixed_subtypes = named.groupby("content")["subtype"].nunique() > 1
    contents = mixed.index[mixed].union(mixed_subtypes.index[mixed_subtypes])
    rows = [
        _conflict(manifest, part.index.to_list(), "copy")
        for _, part in manifest[manifest["content"].isin(contents)].groupby("content", sort=False)
    ]
    near = pairs[pairs["kind"] == "near"]
    seen = set()
    for a, b in zip(near["a"], near["b"], strict=True):
        contents_of_pair = frozenset((manifest["content"].iat[a], manifest["content"].iat[b]))
        classes = {manifest["subtype"].iat[a], manifest["subtype"].iat[b]}
        if len(classes) == 2 and ("cancer" not in classes or "normal" in classes) and contents_of_pair not in seen:
            seen.add(contents_of_pair)
            rows.append(_conflict(manifest, [int(a), int(b)], "near"))
    return sorted(rows, key=lambda row: (row["kind"] != "copy", not row["labels"]))


def _conflict(manifest: pd.DataFrame, positions: list[int], kind: str) -> dict[str, Any]:
    part = manifest.iloc[positions]
    return {
        "kind": kind,
        "slices": [int(position) for position in positions],
        "paths": part["path"].to_list(),
        "classes": part["subtype"].to_list(),
        "labels": part["label"].nunique() > 1,
    }


def _tally(copies: pd.Series, related: pd.Series) -> dict[str, int]:
    return {"slices": len(copies), "copies": int(copies.sum()), "related": int(related.sum())}


def _clusters(manifest: pd.DataFrame, near: pd.DataFrame) -> list[list[int]]:
    """Connected components of exact copies and near pairs that hold more than one slice."""
    n = len(manifest)
    # A chain through each content's first slice ties its copies together without listing all their pairs.
    first = manifest.groupby("content")["path"].transform(lambda part: part.index[0]).to_numpy(int)
    a = np.concatenate([np.arange(n), near["a"].to_numpy(int)])
    b = np.concatenate([first, near["b"].to_numpy(int)])
    _, component = connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(n, n)), directed=False)
    members = pd.Series(np.arange(n)).groupby(component).agg(list)
    return sorted((cluster for cluster in members if len(cluster) > 1), key=len, reverse=True)
