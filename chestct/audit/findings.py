"""From numbers to plain sentences: what is wrong, how bad it is, and what to do about it.

Only the split policy in force can be in error; what other policies would leak is information.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

from chestct.config.schema import FINDINGS, of_patients
from chestct.imaging.slice_files import describe_skipped

SEVERITIES = ("error", "warning", "info")
FEW_GROUPS = 30  # fewer groups of a class in test: at 30, a recall of 0.8 has a 95 % interval of about +-0.15
IMBALANCE = 3  # the larger class may have this many times the groups of the smaller one in train
MANY_COPIES = 0.05  # share of redundant files in a class above which copies are a warning
STRONG_SHORTCUT = 0.9  # a rule that sees no lesion and still reaches this AUROC leaves a model nothing to prove

FAMILIES = {
    "size": ("Image size tells", "Take both classes from the same sources; data.fit=body hides the frame."),
    "file": ("The file itself (size, format) tells", "Export both classes with the same program and settings."),
    "metadata": ("Metadata taken together tell", "Take both classes from the same sources."),
    "grey": ("Overall brightness or contrast tells", "Export both classes with the same window, or set "
             "data.contrast=body, and believe a score only on slices from another source."),
    "border": ("The border of the image tells", "Crop to the body (data.fit=body) and remove frames and text."),
    "seen": ("What is left of brightness or contrast after preprocessing tells",
             "Read every score as a margin over this rule: in a crop to the lungs a part of it is the lesion itself. "
             "data.fit=body data.contrast=body takes most of it away."),
}  # fmt: skip
"""Families of shortcuts, worst first: what they are, and what to do about them."""

KINDS = (*FINDINGS, "baseline", "skipped")  # worst first within a severity

CONFLICTS = {("copy", True): "error", ("copy", False): "warning", ("near", True): "warning", ("near", False): "info"}
"""(how two slices are alike, whether cancer and normal contradict each other) -> severity."""

VERDICTS = {
    "leakage": "Scores on this split cannot be trusted: part of the test was seen in training.",
    "label_conflict": "Labels contradict each other, and scores are no better than they are.",
    "shortcut": "A high score proves little here: cancer can be recognised without seeing a lesion.",
    "imbalance": "Nothing can be trained on this split: slices of a class are missing from it.",
}
"""What an error of a kind means for whoever wants to believe a score."""

Table = list[dict[str, Any]]


@dataclass(frozen=True)
class Finding:
    """One fault, or a caveat of a result. severity: one of `SEVERITIES`; text, action: plain sentences.

    What names files comes last in a text, after "For example": see `without_examples`.
    """

    kind: str
    severity: str
    text: str
    action: str = ""


class Verdict(NamedTuple):
    """The worst severity, or "clean", and what it means, in one plain sentence."""

    severity: str
    text: str


@dataclass(frozen=True)
class Audit:
    """Everything that the audit measured and concluded, in plain Python values that go into JSON as they are.

    `leakage` is keyed by split policy, and `split` names the one in force; `lacking` is what that one does not have and
    training needs; the tables are described where they are made (chestct.audit.stage, shortcuts).
    """

    name: str
    split: str
    seed: int
    counts: Table
    balance: Table
    lacking: list[str]
    unreadable: Table
    duplicates: dict[str, Any]
    leakage: dict[str, dict[str, Any]]
    conflicts: Table
    shortcuts: Table
    skipped: Table = field(default_factory=list)
    disbelieved: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def findings(self) -> list[Finding]:
        """All findings, worst first."""
        rules = (_about_the_split, _about_labels_and_copies, _about_shortcuts, _about_files)
        listed = chain.from_iterable(rule(self) for rule in rules)
        return sorted(listed, key=lambda finding: (SEVERITIES.index(finding.severity), KINDS.index(finding.kind)))

    @property
    def verdict(self) -> Verdict:
        """How bad it is and what that means for a score."""
        worst = self.findings[0] if self.findings else None
        if worst is None or worst.severity == "info":
            level, text = "clean", "Nothing here would make a score on this split misleading."
        elif worst.severity == "warning":
            level, text = "warning", "Usable, with reservations that belong next to every score."
        else:
            level, text = "error", VERDICTS[worst.kind]
        if self.counts and not any(of_patients(row["source"]) for row in self.counts):
            text = f"Phantoms, of which no score says anything about patients. {text}"
        return Verdict(level, text)

    @property
    def phantoms(self) -> int:
        """Phantoms beside slices of patients: there to learn from, and in no figure of copies, balance or shortcuts."""
        return sum(row["files"] for row in self.counts) - self.duplicates["files"]

    def to_json(self) -> str:
        """The audit, its verdict and findings; undefined numbers are None with a reason next to them."""
        concluded = {"findings": [asdict(finding) for finding in self.findings]}
        # allow_nan=False: a NaN that slips through is a bug.
        return json.dumps({"verdict": self.verdict._asdict()} | asdict(self) | concluded, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Audit":
        """The audit that `to_json` gave."""
        return cls(**{name: value for name, value in json.loads(text).items() if name not in ("verdict", "findings")})


def leaked(tally: dict[str, int]) -> int:
    """How many slices of a tally of `stage.leaks` are known from an earlier split."""
    return tally["copies"] + tally["related"]


def without_examples(text: str) -> str:
    """The text of a finding without the names of files, which may be those of patients: for what is published."""
    return text.partition(" For example ")[0]


def estimate(row: dict[str, Any]) -> str:
    """`0.98 [0.97, 0.99]`, or n/a and the reason."""
    if row["auroc"] is None:
        return f"n/a ({row['reason']})"
    return f"{row['auroc']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def _about_the_split(audit: Audit) -> Iterator[Finding]:
    for policy, leaks in audit.leakage.items():
        parts = [_leaked("test", leaks["test"]), _leaked("validation", leaks["valid"])]
        if not any(parts):
            continue
        copies = leaks["test"]["copies"] + leaks["valid"]["copies"]
        related = leaks["test"]["related"] + leaks["valid"]["related"]
        text = f"{' and '.join(filter(None, parts))} are known from training or validation: {copies} as pixel-identical"
        text += f" copies, {related} as near-copies or slices of the same patient."
        if policy == audit.split:
            action = "Use data.split=grouped, or official_clean to keep the official test set without its copies."
            yield Finding("leakage", "error" if leaked(leaks["test"]) else "warning", text, action)
        else:
            text = f"Under the {policy} split, which is not in force, {text}"
            yield Finding("leakage", "info", text, "Do not compare scores with ones published on that split.")
    if few := [row for row in audit.balance if row["split"] == "test" and row["groups"] < FEW_GROUPS]:
        counts = " and ".join(f"{row['groups']} {row['label']}" for row in few)
        text = f"Test has only {counts} independent slices (groups), fewer than the {FEW_GROUPS} a class needs: "
        text += "a single wrong answer moves the score visibly."
        action = "Quote scores with intervals, or test every slice by cross-validation: 'evaluation.protocol=[within]'."
        yield Finding("sample_size", "warning", text, action)
    if audit.lacking:
        text = f"There are no {' and no '.join(audit.lacking)}, which training cannot do without."
        action = "Check data.labels and the class folders; where a class has few groups, take larger fractions "
        action += "(data.valid_fraction, data.test_fraction), or add slices of other patients."
        yield Finding("imbalance", "error", text, action)
    classes: dict[str, set[str]] = {}
    for row in audit.counts:
        if row["split"] == "train" and of_patients(row["source"]):
            classes.setdefault(row["source"], set()).add("normal" if row["subtype"] == "normal" else "cancer")
    single = [f"{source} ({label})" for source, labels in classes.items() if len(labels) == 1 for label in labels]
    if single and len(classes) > 1:
        text = f"Of these sources train has one class alone: {', '.join(single)}. What tells a source from the others, "
        text += "such as its scanner, tells cancer from normal, too."
        action = "Take both classes from the same sources, or keep these for test (data.holdout)."
        yield Finding("shortcut", "warning", text, action)
    groups = {row["label"]: row["groups"] for row in audit.balance if row["split"] == "train"}
    rare, common = sorted(groups, key=lambda label: groups[label])
    if groups[common] > IMBALANCE * groups[rare] > 0:
        text = f"Train has {groups[common] / groups[rare]:.1f} times as many independent slices of {common}"
        text += f" ({groups[common]}) as of {rare} ({groups[rare]})."
        action = "Keep optim.class_weights=true, and judge by AUROC and balanced accuracy, not by accuracy."
        yield Finding("imbalance", "warning", text, action)


def _leaked(name: str, tally: dict[str, Any]) -> str:
    """`47 of 259 test slices (47 of 54 normal)`, naming the class that is hit worst."""
    if not leaked(tally):
        return ""
    worst, counts = max(tally["by_class"].items(), key=lambda item: leaked(item[1]) / item[1]["slices"])
    detail = f"{leaked(counts)} of {counts['slices']} {worst.replace('_', ' ')}"
    return f"{leaked(tally)} of {tally['slices']} {name} slices ({detail})"


def _about_labels_and_copies(audit: Audit) -> Iterator[Finding]:
    for (kind, labels), severity in CONFLICTS.items():
        if rows := [row for row in audit.conflicts if (row["kind"], row["labels"]) == (kind, labels)]:
            what = "Identical images" if kind == "copy" else "Near-copies"
            called = "both cancer and normal" if labels else "two subtypes of cancer"
            text = f"{what} are called {called} in {counted(len(rows), 'place')}. For example {_opposed(rows[0])}."
            action = "Look at them side by side: neighbouring slices may differ, copies may not; delete what is wrong."
            yield Finding("label_conflict", severity, text, action)
    copies = audit.duplicates
    if copies["redundant"] or copies["near_pairs"]:
        share = {name: 1 - row["contents"] / row["files"] for name, row in copies["by_class"].items()}
        worst = max(share, key=lambda name: share[name])
        row = copies["by_class"][worst]
        text = f"{copies['redundant']} of {copies['files']} files are copies of another one (of {row['files']} "
        text += f"{worst.replace('_', ' ')} ones {row['contents']} are different images), and "
        text += f"{counted(copies['near_pairs'], 'pair')} of images nearly the same."
        action = "Count groups, not files; data.split=grouped keeps copies together and uses each image once."
        yield Finding("duplicates", "warning" if share[worst] >= MANY_COPIES else "info", text, action)


def _opposed(row: dict[str, Any]) -> str:
    """Two paths of a conflict that contradict each other; cancer of unknown subtype contradicts normal alone."""
    first: dict[str, str] = {}  # side of the conflict -> its first path
    for name, path in zip(row["classes"], row["paths"], strict=True):
        if row["labels"]:
            first.setdefault("normal" if name == "normal" else "cancer", path)
        elif name != "cancer":
            first.setdefault(name, path)
    return " and ".join(list(first.values())[:2])


def _about_shortcuts(audit: Audit) -> Iterator[Finding]:
    flagged = sorted((row for row in audit.shortcuts if row["flagged"]), key=lambda row: -row["auroc"])
    best: dict[str, dict[str, Any]] = {}
    for row in flagged:
        best.setdefault(row["family"], row)
    severity = {family: "error" if row["auroc"] >= STRONG_SHORTCUT else "warning" for family, row in best.items()}
    # Metadata taken together repeat what size and file say; they are a finding only where neither is as bad alone.
    alone = (severity.get("size"), severity.get("file"))
    if "error" in alone or severity.get("metadata") in alone:
        best.pop("metadata", None)
    for family in (name for name in FAMILIES if name in best):
        (what, action), row = FAMILIES[family], best[family]
        text = f"{what} cancer from normal without a look at the lesion: {_lower(row['title'])} alone gives AUROC "
        yield Finding("shortcut", severity[family], f"{text}{estimate(row)}.", action)
    for row in audit.shortcuts:
        # A large lesion survives in a thumbnail, so its score is a bar for the model, not evidence of a shortcut.
        if row["family"] == "picture" and row["low"] is not None and row["low"] > 0.5:
            text = f"A logistic regression on a thumbnail of 10 × 10 pixels reaches AUROC {estimate(row)}."
            yield Finding("baseline", "info", text, "Report every model score as a margin over this one.")


def _about_files(audit: Audit) -> Iterator[Finding]:
    several = len({row["source"] for row in (*audit.counts, *audit.unreadable, *audit.skipped)}) > 1

    def named(rows: Table) -> list[tuple[str, str]]:
        return [(f"{row['source']}/{row['path']}" if several else row["path"], row["reason"]) for row in rows]

    unreadable, skipped = named(audit.unreadable), named(audit.skipped)
    if unreadable:
        path, reason = unreadable[0]
        text = f"{counted(len(unreadable), 'file')} unreadable and left out. For example {path} ({reason})."
        yield Finding("unreadable", "warning", text, "Fetch what is damaged again (dvc pull), or delete it.")
    if skipped:
        number, _, names = describe_skipped(skipped).partition(": ")
        action = "If slices are among them, put them into class folders, as CT."
        yield Finding("skipped", "info", f"{number}. For example {names}.", action)
    for text in audit.disbelieved:
        action = "Slices of one patient may stand on both sides of the split unnoticed: keep real patient numbers, or "
        yield Finding("identifiers", "warning", text, f"{action}pseudonyms for them, when files are anonymised.")
    for text in audit.notes:
        action = "Keep it in mind with every figure; where patients are not known, intervals are rather too narrow."
        yield Finding("identifiers", "info", text, action)


def counted(number: int, one: str) -> str:
    """`1 slice`, `2 slices`."""
    return f"{number:,} {one if number == 1 else one + 's'}"


def _lower(title: str) -> str:
    return title[0].lower() + title[1:]
