"""Which slices a reader should look at: some of every split and class, and the pairs that findings rest on."""

import numpy as np
import pandas as pd

from chestct.audit.inventory import CLASSES, Table
from chestct.data.splits import SPLITS

CONTACTS = 12
"""Slices of each split and class on a contact sheet."""
EXAMPLES = 6
"""Pairs shown of each kind."""


def contacts(manifest: pd.DataFrame, split: pd.Series, *, seed: int) -> Table:
    """Positions of a few different slices of every split and class, drawn at random: {split, subtype, slices}."""
    distinct = manifest[~manifest.assign(split=split).duplicated(["split", "content"])]
    rows = []
    for subtype in CLASSES:
        for name in SPLITS:
            part = distinct.index[(distinct["subtype"] == subtype) & (split[distinct.index] == name)]
            if len(part):
                drawn = np.random.default_rng(seed).permutation(part)[:CONTACTS]
                rows.append({"split": name, "subtype": subtype, "slices": sorted(drawn.tolist())})
    return rows


def examples(manifest: pd.DataFrame, pairs: pd.DataFrame, conflicts: Table, leaks: Table) -> Table:
    """The pairs worth looking at: label conflicts, leaked slices with their twins, near-copies.

    conflicts, leaks (the `list` of one policy): as chestct.audit.leakage makes them. {kind "conflict" | "leak" |
    "near", a, b (positions), a_path, b_path, about (one line)}.
    """
    rows: list[tuple[str, int, int, str]] = [
        ("conflict", row["slices"][0], row["slices"][1], " and ".join(row["classes"][:2]).replace("_", " "))
        for row in conflicts[:EXAMPLES]
    ]
    groups, contents = manifest["group"].to_numpy(), manifest["content"].to_numpy()
    for how, words in (("copy", "identical in every pixel"), ("related", "near-copy or same patient")):
        # One of every group: its other slices would show the same again.
        firsts = {groups[row["slice"]]: row for row in reversed(leaks) if row["kind"] == how}
        for row in list(firsts.values())[: -EXAMPLES - 1 : -1]:
            rows.append(("leak", row["slice"], row["twin"], f"{row['split']} and {row['twin_split']}: {words}"))
    near = pairs[(pairs["kind"] == "near").to_numpy() & (contents[pairs["a"]] != contents[pairs["b"]])]
    # One pair of every group, the least alike first: they show where the line is drawn.
    near = near.assign(group=groups[near["a"]]).sort_values("similarity").drop_duplicates("group")
    for a, b, similarity in near[["a", "b", "similarity"]].head(EXAMPLES).itertuples(index=False):
        rows.append(("near", int(a), int(b), f"similarity {similarity:.4f}"))
    path = manifest["path"]
    return [
        {"kind": kind, "a": a, "b": b, "a_path": path.iat[a], "b_path": path.iat[b], "about": about}
        for kind, a, b, about in rows
    ]
