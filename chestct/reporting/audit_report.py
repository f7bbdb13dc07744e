"""The audit of the data for people (HTML), for machines (JSON) and for terminals."""

from pathlib import Path

import pandas as pd

from chestct.audit import findings
from chestct.audit.findings import Audit, Table, counted, estimate, leaked
from chestct.audit.stage import audit_store, kept_audit, kept_folder
from chestct.config.schema import Config
from chestct.data.prepare import prepare_store
from chestct.data.store import Store
from chestct.errors import DataError
from chestct.files import write_atomic
from chestct.reporting.croissant import croissant
from chestct.reporting.environment import render


def validate(cfg: Config, out: Path) -> Audit:
    """What `chestct audit` does: ingest, audit, report in `out`, summary on the terminal.

    Raises DataError where a finding is of a kind that data.audit.fail_on names; the report is written all the same.
    """
    store = prepare_store(cfg, cfg.trainer.progress)
    audit = audit_store(cfg, store)
    write(audit, store.manifest, out)
    print(f"{summary(audit)}\n\nreport  {out / 'report.html'}")
    if failed := sorted({f.kind for f in audit.findings if f.severity != "info"} & set(cfg.data.audit.fail_on)):
        why = f"The audit reports {', '.join(failed)}, which data.audit.fail_on forbids."
        raise DataError(f"{why} See {out / 'report.html'}.")
    return audit


def write(audit: Audit, manifest: pd.DataFrame, out: Path) -> None:
    """Writes report.json, report.html (one file, nothing fetched from anywhere), and the data as a Croissant record,
    croissant.json with slices.csv, into `out`. manifest: what was audited.
    """
    page = render("audit.html.j2", audit=audit, baselines=_by_auroc(audit), findings=findings)
    files = {"report.json": audit.to_json(), "report.html": page, **croissant(audit, manifest)}
    for name, text in files.items():
        write_atomic(out / name, text)


def kept_report(cfg: Config, store: Store) -> Path:
    """The folder with the report of the kept audit of this store under this split."""
    folder = kept_folder(cfg, store)
    write(kept_audit(cfg, store), store.manifest, folder)
    return folder


def summary(audit: Audit) -> str:
    """The audit for a terminal: verdict, findings, leakage under each policy, the strongest baselines."""
    copies = audit.duplicates
    drawn = f" Beside them {counted(audit.phantoms, 'phantom')}, not measured." if audit.phantoms else ""
    lines = [
        f"Audit of {audit.name}, split {audit.split}: {audit.verdict.severity}. {audit.verdict.text}",
        f"{copies['files']} files, {copies['contents']} different images, {len(audit.unreadable)} unreadable.{drawn}",
        "",
    ]
    for finding in audit.findings:
        lines += [f"{finding.severity.upper():<8}{finding.kind}: {finding.text}", f"{'':8}-> {finding.action}"]
    lines += ["", "Held-out slices known from an earlier split:"]
    for policy, leaks in audit.leakage.items():
        parts = [f"{part} {leaked(leaks[part])} of {leaks[part]['slices']}" for part in ("test", "valid")]
        lines.append(f"  {policy:<16}{', '.join(parts)}{'  (in force)' if policy == audit.split else ''}")
    lines += ["", "AUROC of rules that see no lesion, with 95 % intervals:"]
    for row in _by_auroc(audit)[:5]:
        lines.append(f"  {row['title']:<55}{estimate(row)}{'  shortcut' if row['flagged'] else ''}")
    return "\n".join(lines)


def _by_auroc(audit: Audit) -> Table:
    return sorted(audit.shortcuts, key=lambda row: -(row["auroc"] or 0))
