"""From numbers to plain sentences: what is wrong, how bad it is, and what to do about it.

One small rule for each kind of fault, each with its thresholds next to it, so that a verdict can be argued with. Only
the split policy in force can be in error; what other policies would leak is information.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from chestct.audit.inventory import Table
from chestct.imaging.slice_files import describe_skipped

SEVERITIES = ("error", "warning", "info")
FEW_GROUPS = 30
"""Fewer independent slices of a class in test than this: at 30, a recall of 0.8 has a 95 % interval of about +-0.15."""
IMBALANCE = 3
"""The larger class may have this many times the groups of the smaller one in train."""
MANY_COPIES = 0.05
"""Share of redundant files in a class above which copies are a warning."""
STRONG_SHORTCUT = 0.9
"""A rule that sees no lesion and still reaches this AUROC leaves a model nothing to prove."""

SHORTCUT_ACTIONS = {
    "size": "Have the slices of both classes come in the same sizes from the same sources; data.fit=body crops to the "
    "body and hides the frame.",
    "file": "Export both classes with the same program and settings; find out where each comes from.",
    "metadata": "Find out which source each class comes from, and take both classes from the same ones.",
    "grey": "Export both classes with the same window, take brightness and contrast out of what the network sees "
    "(data.contrast=body), and believe a score only on slices from another source.",
    "border": "Crop to the body (data.fit=body) and remove frames and text; padding also gives the aspect ratio away.",
    "seen": "Preprocessing lets it through: data.fit=body data.contrast=body takes most of it away.",
}
FAMILIES = {
    "size": "Image size tells",
    "file": "The file itself (size, format) tells",
    "metadata": "Metadata taken together tell",
    "grey": "Overall brightness or contrast tells",
    "border": "The border of the image tells",
    "seen": "What is left of brightness or contrast after preprocessing tells",
}

VERDICTS = {
    "leakage": "Scores on this split cannot be trusted: part of the test was seen in training.",
    "label_conflict": "Labels contradict each other, and scores are no better than they are.",
    "shortcut": "A high score proves little here: cancer can be recognised without seeing a lesion.",
    "imbalance": "Nothing can be learned from one class.",
}
"""What an error of a kind means for whoever wants to believe a score."""


@dataclass(frozen=True)
class Finding:
    """One fault. kind: one of `RULES`; severity: one of `SEVERITIES`; text and action: one plain sentence each."""

    kind: str
    severity: str
    text: str
    action: str


@dataclass(frozen=True)
class Verdict:
    """The worst severity, or "clean", and what it means, in one plain sentence."""

    severity: str
    text: str


@dataclass(frozen=True)
class Audit:
    """Everything that the audit measured and concluded, in plain Python values that go into JSON as they are.

    `leakage` is keyed by split policy, and `split` names the one in force; the other tables are described where they
    are made (inventory, leakage, shortcuts, examples, chestct.stats.drift).
    """

    name: str
    split: str
    seed: int
    counts: Table
    balance: Table
    formats: Table
    sizes: Table
    unreadable: Table
    duplicates: dict[str, Any]
    leakage: dict[str, dict[str, Any]]
    conflicts: Table
    shortcuts: Table
    shift: Table
    contacts: Table
    examples: Table
    skipped: Table = field(default_factory=list)
    disbelieved: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """How bad it is and what that means for a score."""
        worst = self.findings[0] if self.findings else None
        if worst is None or worst.severity == "info":
            return Verdict("clean", "Nothing here would make a score on this split misleading.")
        if worst.severity == "warning":
            return Verdict("warning", "Usable, with reservations that belong next to every score.")
        return Verdict("error", VERDICTS[worst.kind])

    def to_json(self) -> str:
        """The audit and its verdict; undefined numbers are None with a reason next to them."""
        # allow_nan=False: a NaN that slips through is a bug.
        return json.dumps({"verdict": asdict(self.verdict), **asdict(self)}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Audit":
        """The audit that `to_json` gave."""
        fields = {name: value for name, value in json.loads(text).items() if name != "verdict"}
        return cls(**fields | {"findings": [Finding(**finding) for finding in fields["findings"]]})


def findings(audit: Audit) -> list[Finding]:
    """All findings, worst first."""
    listed = [Finding(kind, *fault) for kind, rule in RULES.items() for fault in rule(audit)]
    return sorted(listed, key=lambda finding: (SEVERITIES.index(finding.severity), list(RULES).index(finding.kind)))


def leaked(tally: dict[str, int]) -> int:
    """How many slices of a tally of `leakage.leaks` are known from an earlier split."""
    return tally["copies"] + tally["related"]


def estimate(row: dict[str, Any]) -> str:
    """`0.98 [0.97, 0.99]`, or n/a and the reason."""
    if row["auroc"] is None:
        return f"n/a ({row['reason']})"
    interval = "(no interval)" if row["low"] is None else f"[{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['auroc']:.2f} {interval}"


Faults = Iterator[tuple[str, str, str]]
"""Severity, text and action of each fault of one kind."""


def _leakage(audit: Audit) -> Faults:
    for policy, leaks in audit.leakage.items():
        parts = [_leaked(name, leaks[part]) for name, part in (("test", "test"), ("validation", "valid"))]
        if not any(parts):
            continue
        copies, related = (sum(leaks[part][how] for part in ("test", "valid")) for how in ("copies", "related"))
        text = f"{' and '.join(filter(None, parts))} are known from training or validation: {copies} as pixel-identical"
        text += f" copies, {related} as near-copies or slices of the same patient." if related else " copies."
        if policy == audit.split:
            action = "Use data.split=grouped, or official_clean to keep the official test set without its copies."
            yield "error" if leaked(leaks["test"]) else "warning", text, action
        else:
            text = f"Under the {policy} split, which is not in force, {text}"
            yield "info", text, "Do not compare scores with ones published on that split."


def _leaked(name: str, tally: dict[str, Any]) -> str:
    """`47 of 259 test slices (47 of 54 normal)`, naming the class that is hit worst."""
    if not leaked(tally):
        return ""
    worst, counts = max(tally["by_class"].items(), key=lambda item: leaked(item[1]) / item[1]["slices"])
    detail = f"{leaked(counts)} of {counts['slices']} {worst.replace('_', ' ')}"
    return f"{leaked(tally)} of {tally['slices']} {name} slices ({detail})"


def _conflicts(audit: Audit) -> Faults:
    def first(rows: Table) -> str:
        return f"{' and '.join(rows[0]['paths'][:2])}{', and others' if len(rows) > 1 else ''}."

    copies = [row for row in audit.conflicts if row["kind"] == "copy"]
    for labels, severity, what in (
        (True, "error", "both cancer and normal"),
        (False, "warning", "two different subtypes of cancer"),
    ):
        if rows := [row for row in copies if row["labels"] == labels]:
            text = f"{_plural(len(rows), 'image carries', 'images carry')} {what}: {first(rows)}"
            yield severity, text, "Find out which label is right and delete the other file; until then leave both out."
    if near := [row for row in audit.conflicts if row["kind"] == "near"]:
        text = f"{_plural(len(near), 'pair of near-copies has', 'pairs of near-copies have')} different classes:"
        action = "Look at them side by side: neighbouring slices may differ, copies may not."
        yield "warning" if any(row["labels"] for row in near) else "info", f"{text} {first(near)}", action


def _shortcuts(audit: Audit) -> Faults:
    flagged = [row for row in audit.shortcuts if row["flagged"]]
    families = {row["family"] for row in flagged}
    # Metadata taken together repeat what size and file say; they are a finding only where neither says it alone.
    families -= {"metadata"} if families & {"size", "file"} else set()
    for family in sorted(families, key=list(FAMILIES).index):
        best = max((row for row in flagged if row["family"] == family), key=lambda row: row["auroc"])
        text = f"{FAMILIES[family]} cancer from normal without a look at the lesion: {_lower(best['title'])} alone"
        severity = "error" if best["auroc"] >= STRONG_SHORTCUT else "warning"
        yield severity, f"{text} gives AUROC {estimate(best)}.", SHORTCUT_ACTIONS[family]


def _baseline(audit: Audit) -> Faults:
    for row in audit.shortcuts:
        # A large lesion survives in a thumbnail, so its score is a bar for the model, not evidence of a shortcut.
        if row["family"] == "picture" and row["low"] is not None and row["low"] > 0.5:
            text = f"A logistic regression on a thumbnail of 10 × 10 pixels reaches AUROC {estimate(row)}."
            yield "info", text, "Report every model score as a margin over this one."


def _unreadable(audit: Audit) -> Faults:
    if audit.unreadable:
        count, first = _plural(len(audit.unreadable), "file is", "files are"), audit.unreadable[0]
        text = f"{count} unreadable and left out, for example {first['path']} ({first['reason']})."
        yield "warning", text, "Fetch what is damaged again (dvc pull), or delete it."


def _skipped(audit: Audit) -> Faults:
    if audit.skipped:
        text = f"{describe_skipped([(row['path'], row['reason']) for row in audit.skipped])}."
        yield "info", text, "If slices are among them, put them into class folders."


def _identifiers(audit: Audit) -> Faults:
    action = "Slices of one patient may stand on both sides of the split unnoticed: keep real patient numbers, or "
    for text in audit.disbelieved:
        yield "warning", text, f"{action}pseudonyms for them, when files are anonymised."


def _sample_size(audit: Audit) -> Faults:
    few = [row for row in audit.balance if row["split"] == "test" and row["groups"] < FEW_GROUPS]
    if few:
        counts = " and ".join(f"{row['groups']} {row['label']}" for row in few)
        text = f"Test has only {counts} independent slices (groups), fewer than the {FEW_GROUPS} a class needs: "
        action = "Quote scores with intervals, or use cross-validation (data.folds) so that every slice is tested."
        yield "warning", f"{text}a single wrong answer moves the score visibly.", action


def _imbalance(audit: Audit) -> Faults:
    groups = {row["label"]: row["groups"] for row in audit.balance if row["split"] == "train"}
    rare, common = sorted(groups, key=lambda label: groups[label])
    if not groups[rare]:
        yield "error", f"Train has no slices of {rare}.", "Check data.labels and the class folders."
    elif groups[common] > IMBALANCE * groups[rare]:
        text = f"Train has {groups[common] / groups[rare]:.1f} times as many independent slices of {common}"
        action = "Keep optim.class_weights=true, and judge by AUROC and balanced accuracy, not by accuracy."
        yield "warning", f"{text} ({groups[common]}) as of {rare} ({groups[rare]}).", action


def _shift(audit: Audit) -> Faults:
    flagged = sorted((row for row in audit.shift if row["flagged"]), key=lambda row: -row["distance"])
    if flagged:
        others = f", and {len(flagged) - 1} more numbers differ" if len(flagged) > 1 else ""
        text = f"Test slices do not look like training slices: {_lower(flagged[0]['title'])} differs most (KS distance"
        action = "Find out whether test comes from elsewhere; if so, write it next to the score, else split by groups."
        yield "warning", f"{text} {flagged[0]['distance']:.2f}){others}.", action


def _duplicates(audit: Audit) -> Faults:
    copies = audit.duplicates
    if not copies["redundant"] and not copies["near_pairs"]:
        return
    share = {name: 1 - row["contents"] / row["files"] for name, row in copies["by_class"].items()}
    worst = max(share, key=lambda name: share[name])
    text = f"{copies['redundant']} of {copies['files']} files are copies of another one, and "
    text += f"{_plural(copies['near_pairs'], 'pair is', 'pairs are')} nearly the same"
    if copies["redundant"]:
        row = copies["by_class"][worst]
        text += f", most of all in {worst.replace('_', ' ')}: {row['files']} files, {row['contents']} different images"
    action = "Count groups, not files; data.split=grouped keeps copies together and uses each image once."
    yield "warning" if share[worst] >= MANY_COPIES else "info", f"{text}.", action


def _plural(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _lower(title: str) -> str:
    return title[0].lower() + title[1:]


RULES: dict[str, Callable[[Audit], Faults]] = {
    "leakage": _leakage,
    "label_conflict": _conflicts,
    "shortcut": _shortcuts,
    "unreadable": _unreadable,
    "sample_size": _sample_size,
    "imbalance": _imbalance,
    "identifiers": _identifiers,
    "shift": _shift,
    "duplicates": _duplicates,
    "baseline": _baseline,
    "skipped": _skipped,
}
"""Kinds of finding, worst first within a severity, and what finds them."""
