"""The audit as a whole: made from manifest, splits and images, told to machines (JSON), people (HTML) and terminals.

`audit` computes, `write` and `summary` only tell: everything that the report shows, thumbnails too, is in the Audit, so
that a report can be written again without the data.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from chestct.audit import findings as rules
from chestct.audit import inventory, leakage, pictures, shortcuts
from chestct.audit.findings import Audit
from chestct.data.splits import SPLITS
from chestct.errors import DataError
from chestct.stats.drift import split_shift


def audit(
    manifest: pd.DataFrame,
    splits: Mapping[str, pd.Series],
    images: np.ndarray,
    unreadable: pd.DataFrame,
    pairs: pd.DataFrame,
    *,
    name: str,
    split: str,
    seed: int = 0,
) -> Audit:
    """Everything that is wrong with a set of slices, with the split policy `split` in force.

    manifest: one row a slice; splits: for each policy "train" | "valid" | "test" | "" for every slice (index as the
    manifest's); images: uint8 [M, S, S], found through the manifest's `row`; unreadable: columns source, path, reason;
    pairs: columns a, b (positions in the manifest), similarity, kind "exact" | "near" | "series". name: how the data is
    called in the report. Raises DataError if there are no slices, KeyError if `split` is not among the policies.
    """
    if manifest.empty:
        raise DataError(
            f"Nothing to audit: {name} has no readable slices ({len(unreadable)} unreadable files). "
            "Check data.root, or run 'dvc pull'."
        )
    policies = {str(policy): column.loc[manifest.index].reset_index(drop=True) for policy, column in splits.items()}
    manifest = manifest.reset_index(drop=True)
    in_force = policies[split]
    shifts = split_shift(shortcuts.columns(manifest), in_force, manifest["group"])
    result = Audit(
        name=name,
        split=split,
        seed=seed,
        counts=inventory.counts(manifest, in_force),
        balance=inventory.balance(manifest, in_force),
        formats=inventory.formats(manifest),
        sizes=inventory.sizes(manifest),
        unreadable=inventory.records(unreadable[["source", "path", "reason"]]),
        duplicates=leakage.duplicates(manifest, policies, pairs),
        leakage={policy: leakage.leaks(manifest, column, pairs) for policy, column in policies.items()},
        conflicts=leakage.conflicts(manifest, pairs),
        shortcuts=shortcuts.shortcuts(manifest, policies, images, seed=seed),
        shift=[row | {"title": shortcuts.TITLES[row["name"]]} for row in shifts],
        contacts=pictures.contacts(manifest, in_force, seed=seed),
    )
    result = replace(result, examples=pictures.examples(result, manifest, pairs))
    result = replace(result, thumbnails=pictures.thumbnails(result, manifest, images))
    return replace(result, findings=rules.findings(result))


def to_json(audit: Audit) -> dict[str, Any]:
    """The audit without its thumbnails, as plain values; undefined numbers are None with a reason beside them."""
    fields = [field.name for field in dataclasses.fields(audit) if field.name not in ("findings", "thumbnails")]
    return {
        "verdict": dict(zip(("severity", "text"), audit.verdict, strict=True)),
        "findings": [dataclasses.asdict(finding) for finding in audit.findings],
    } | {name: getattr(audit, name) for name in fields}


def write(audit: Audit, out: Path) -> None:
    """Writes report.json and report.html (one file, nothing fetched from anywhere) into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    # allow_nan=False: an undefined number has to be None with a reason, and a NaN that slips through is a bug.
    pictures.save(out / "report.json", json.dumps(to_json(audit), indent=1, allow_nan=False).encode())
    # File names may hold bytes that are no UTF-8; they are shown as escapes.
    pictures.save(out / "report.html", html(audit).encode("utf-8", "backslashreplace"))


def html(audit: Audit) -> str:
    """The report for people: self-contained HTML without scripts, light and dark, for screen, phone and paper."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # file names come from strangers
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "breakable": lambda path: Markup(re.sub(r"([/_])", r"\1<wbr>", str(escape(path)))),
        "called": rules.called,
        "estimate": rules.estimate,
        "known": rules.known,
        "stack": pictures.stack,
    }
    worst = max(audit.leakage, key=lambda policy: len(audit.leakage[policy]["list"]))
    return environment.get_template("report.html.j2").render(
        audit=audit,
        splits=SPLITS,
        worst=worst,
        baselines=sorted(audit.shortcuts, key=lambda row: -(row["auroc"] or 0)),
        classes=[name for name in inventory.CLASSES if name in audit.duplicates["by_class"]],
        clusters=audit.duplicates["clusters"][: pictures.COLUMNS],
        height=pictures.HEIGHT,
        few=rules.FEW_GROUPS,
        material=shortcuts.MATERIAL,
        min_groups=shortcuts.MIN_GROUPS,
    )


def summary(audit: Audit) -> str:
    """The audit for a terminal: verdict, findings, leakage under each policy, the strongest baselines."""
    severity, sentence = audit.verdict
    copies = audit.duplicates
    lines = [
        f"Audit of {audit.name}, split {audit.split}: {severity}. {sentence}",
        f"{copies['files']} files, {copies['contents']} different images, {len(audit.unreadable)} unreadable.",
        "",
    ]
    for finding in audit.findings:
        lines += [f"{finding.severity.upper():<8}{finding.kind}: {finding.text}", f"{'':8}-> {finding.action}"]
    lines += ["", "Held-out slices known from an earlier split:"]
    for policy, leaks in audit.leakage.items():
        parts = [f"{part} {rules.known(leaks[part])} of {leaks[part]['slices']}" for part in ("test", "valid")]
        lines.append(f"  {policy:<16}{', '.join(parts)}{'  (in force)' if policy == audit.split else ''}")
    lines += ["", "AUROC of rules that see no lesion, with 95 % intervals:"]
    for row in sorted(audit.shortcuts, key=lambda row: -(row["auroc"] or 0))[:5]:
        lines.append(f"  {row['title']:<55}{rules.estimate(row)}{'  shortcut' if row['flagged'] else ''}")
    return "\n".join(lines)
