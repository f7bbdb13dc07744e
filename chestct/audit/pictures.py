"""Which slices to show, and the audit's pictures as PNG files (for MLflow).

The slices are chosen and shrunk once, when the audit is made, so that the report and the pictures need neither the
images nor the manifest again.
"""

import base64
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from chestct.audit.findings import Audit, called
from chestct.audit.inventory import CLASSES, Table
from chestct.data.splits import LEFT_OUT, SPLITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTACTS = 12
"""Slices of each split and class on a contact sheet."""
EXAMPLES = 6
"""Pairs shown of each kind."""
SIDE = 144
"""Side of a thumbnail in pixels."""
COLUMNS, HEIGHT = 160, 24
"""Sets of copies on the duplicate map, the largest first, and squares in the column of one."""

COLOURS = {"train": "#8a96a3", "valid": "#d97c00", "test": "#0b5cad", "": "#ffffff"}
"""Grey, orange and blue stay apart for every kind of colour blindness, and on paper by their lightness."""


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


def examples(audit: Audit, manifest: pd.DataFrame, pairs: pd.DataFrame) -> Table:
    """The pairs worth looking at: label conflicts, leaked slices with their twins, near-copies.

    {kind "conflict" | "leak" | "near", a, b (positions), a_path, b_path, about (one line)}. Leaks are those of the
    policy in force, or of the first policy that leaks.
    """
    rows: list[tuple[str, int, int, str]] = [
        ("conflict", row["slices"][0], row["slices"][1], " and ".join(map(called, row["classes"][:2])))
        for row in audit.conflicts[:EXAMPLES]
    ]
    policy = next((name for name in (audit.split, *audit.leakage) if audit.leakage[name]["list"]), None)
    groups = manifest["group"].to_numpy()
    for how, words in (("copy", "identical in every pixel"), ("related", "near-copy or same patient")):
        leaks = [row for row in audit.leakage[policy]["list"] if row["kind"] == how] if policy else []
        # One of every group: its other slices would show the same again.
        firsts = {groups[row["slice"]]: row for row in reversed(leaks)}
        for row in list(firsts.values())[: -EXAMPLES - 1 : -1]:
            rows.append(("leak", row["slice"], row["twin"], f"{row['split']} and {row['twin_split']}: {words}"))
    contents = manifest["content"].to_numpy()
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


def stack(splits: list[str]) -> list[str]:
    """The column of a set of copies on the duplicate map, from the bottom: one square a file, by split.

    A larger set keeps its proportions in HEIGHT squares: neighbouring slices of a whole scan may all be near-copies.
    """
    ordered = sorted(splits, key=[*SPLITS, LEFT_OUT].index)
    squares = min(len(ordered), HEIGHT)
    return [ordered[i * len(ordered) // squares] for i in range(squares)]


def thumbnails(audit: Audit, manifest: pd.DataFrame, images: np.ndarray) -> dict[int, str]:
    """A small grey JPEG (base64) of every slice that the report shows, by position."""
    shown: set[int] = {position for row in audit.contacts for position in row["slices"]}
    shown |= {row[side] for row in audit.examples for side in "ab"}
    rows = manifest["row"].to_numpy()
    result = {}
    for position in sorted(shown):
        buffer = io.BytesIO()
        image = Image.fromarray(images[rows[position]])
        image.resize((SIDE, SIDE), Image.Resampling.BOX).save(buffer, "JPEG", quality=80)
        result[position] = base64.b64encode(buffer.getvalue()).decode()
    return result


def pictures(audit: Audit, out: Path) -> list[Path]:
    """Writes contact sheets (one for each split and class), duplicate map and shortcut bars as PNG into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in _rendered(audit):
        save(out / name, content)
        written.append(out / name)
    return written


def save(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)


def _rendered(audit: Audit) -> Iterator[tuple[str, bytes]]:
    for row in audit.contacts:
        yield f"contact_{row['split']}_{row['subtype']}.png", _png(_sheet(audit, row["slices"]))
    for name, figure in (("duplicates.png", _map(audit)), ("shortcuts.png", _bars(audit))):
        yield name, _png(figure)


def _png(picture: "Image.Image | Figure") -> bytes:
    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(buffer, "PNG")
    else:
        picture.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _sheet(audit: Audit, slices: list[int], across: int = 6) -> Image.Image:
    sheet = Image.new("L", (across * SIDE, -(-len(slices) // across) * SIDE), 255)
    for i, position in enumerate(slices):
        thumbnail = Image.open(io.BytesIO(base64.b64decode(audit.thumbnails[position])))
        sheet.paste(thumbnail, (i % across * SIDE, i // across * SIDE))
    return sheet


def _map(audit: Audit) -> "Figure":
    from matplotlib.figure import Figure

    clusters = audit.duplicates["clusters"][:COLUMNS]
    figure = Figure(figsize=(10, 1 + 2 * len(audit.leakage)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(audit.leakage), sharex=True))
    for axis, policy in zip(axes, audit.leakage, strict=True):
        for x, cluster in enumerate(clusters):
            for y, split in enumerate(stack(cluster["splits"][policy])):
                axis.bar(x, 0.8, 0.8, y, color=COLOURS[split], edgecolor="#8a96a3", linewidth=0.5)
        axis.set_title(policy, loc="left", fontsize=10)
        axis.set(xticks=[], ylabel="files")
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    for split, colour in COLOURS.items():
        axes[0].bar(0, 0, color=colour, edgecolor="#8a96a3", label=split or "left out")
    axes[-1].set_xlabel("every column is a set of copies and near-copies, every square one of its files", loc="left")
    axes[0].legend(ncols=4, frameon=False, loc="upper right", fontsize=9)
    return figure


def _bars(audit: Audit) -> "Figure":
    from matplotlib.figure import Figure

    rows = [row for row in audit.shortcuts if row["auroc"] is not None][::-1]
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for y, row in enumerate(rows):
        colour = "#b3261e" if row["flagged"] else "#5a626b"
        axis.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axis.plot(row["auroc"], y, "o", color=colour)
    axis.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axis.axvline(0.5, color="#5a626b", linewidth=0.8, linestyle=":")
    axis.set(xlim=(0.4, 1.01), xlabel="AUROC, cancer against normal, with 95 % interval (red: flagged as a shortcut)")
    axis.spines[["top", "right"]].set_visible(False)
    return figure
