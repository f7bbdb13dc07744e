"""What an evaluation says in words: the headline, what to doubt about it, and the table for the terminal.

Report, model card and terminal take their sentences and the form of their numbers from here, so that they cannot
disagree. Doubts come before numbers everywhere.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from chestct.audit.findings import FEW_GROUPS
from chestct.config.schema import classes_of
from chestct.evaluation.evaluate import Evaluation, Row
from chestct.stats.bootstrap import effective_size
from chestct.stats.calibration import wilson
from chestct.stats.metrics import Estimate

NAMES = {
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "precision": "Precision (PPV)",
    "npv": "NPV",
    "f1": "F1",
    "mcc": "MCC",
    "brier": "Brier score",
    "log_loss": "Log loss",
    "ece": "Calibration error (ECE)",
    "sensitivity_at_90_specificity": "Sensitivity at 90 % specificity",
    "sensitivity_at_95_specificity": "Sensitivity at 95 % specificity",
    "specificity_at_90_sensitivity": "Specificity at 90 % sensitivity",
    "specificity_at_95_sensitivity": "Specificity at 95 % sensitivity",
}
HEADLINE = (
    *("auroc", "average_precision", "accuracy", "balanced_accuracy", "sensitivity", "specificity"),
    *("f1", "mcc", "brier", "log_loss", "ece"),
)


MANY_NOVEL = 0.1
"""Share of a class's test slices that may be novel; the threshold is meant to leave one in a hundred beyond."""

MANY_ANSWERED, MANY_FLIPPED = 0.1, 0.1
"""Share of foreign pictures that may be answered, and of decisions that may flip under a graded change."""

MUCH_LOST = 0.1
"""AUROC that the mildest of graded changes may cost."""

PERMUTED = "permuted labels"
"""Policy of the row of the control."""


SECTIONS = ("subgroups", "explanation", "robustness", "shift", "novelty", "audit", "made")
"""What an evaluation may hold beside its metrics."""


@dataclass(frozen=True)
class Doubt:
    """A reason not to believe the headline, or to believe less of it; severity: error, warning or info."""

    severity: str
    kind: str
    text: str


def called(metric: str) -> str:
    """A metric's name for people: `auroc/large_cell` -> `AUROC, large cell`."""
    first, _, second = metric.partition("/")
    if first == "cancer":  # the reduction of subtypes to cancer and normal
        return f"{NAMES.get(second, second)}, any cancer"
    return NAMES.get(first, first.replace("_", " ")) + (f", {second.replace('_', ' ')}" if second else "")


def known(value: float | None, signed: bool = False) -> str:
    """A number with three decimals; None is n/a."""
    return "n/a" if value is None else f"{value:{'+' if signed else ''}.3f}".replace("-", "\N{MINUS SIGN}")


def interval(estimate: Estimate, signed: bool = False) -> str:
    """`0.981 [0.950, 0.994]`; what is undefined is n/a, and `reason` of the estimate says why."""
    if estimate.value is None or estimate.low is None:
        return known(estimate.value, signed) + (" [n/a]" if estimate.value is not None else "")
    return f"{known(estimate.value, signed)} [{known(estimate.low, signed)}, {known(estimate.high, signed)}]"


def cancer(estimates: dict[str, Estimate], metric: str) -> Estimate:
    """A metric of cancer against normal, under the same name for both tasks."""
    return estimates[f"cancer/{metric}"] if f"cancer/{metric}" in estimates else estimates[metric]


def counted(number: int, one: str, several: str = "") -> str:
    """`1 slice`, `2 slices`."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def headline(found: Evaluation) -> str:
    """The result in one sentence, with its interval, what it rests on, and how far it is above the best shortcut."""
    row = found.headline
    auroc = cancer(row.estimates, "auroc")
    where = f"{counted(sum(row.slices.values()), 'test slice')} in {counted(row.groups, 'group')}"
    if auroc.value is None:
        return f"AUROC n/a on {where}: {auroc.reason}."
    result = f"AUROC {interval(auroc)} on {where}"
    if row.margin is None or row.margin.value is None:
        return f"{result}; how much of it a rule that sees no lesion would reach is not known."
    return f"{result}; margin over the best rule that sees no lesion: {interval(row.margin, signed=True)}."


def caveats(about: dict[str, Any]) -> list[str]:
    """What has to be said before any number of this run."""
    found = []
    if about["synthetic"]:
        found.append("SYNTHETIC: trained and tested on phantoms; these numbers say nothing about patients.")
    if about["leaked"]:
        found.append(
            f"LEAKY SPLIT ({about['split']}): {about['leaked']} validation and test slices have copies in an earlier "
            "split; these numbers are too good."
        )
    return found


def doubts(found: Evaluation) -> list[Doubt]:
    """Everything that this evaluation gives as a reason for doubt, the worst first."""
    told = [text.split(": ", 1) for text in caveats(found.about)]
    listed = [Doubt("error", kind.capitalize(), _sentence(text)) for kind, text in told]
    listed += [*_few(found), *_margin(found.headline), *_operating_point(found), *_coverage(found), *_sections(found)]
    return sorted(listed, key=lambda doubt: ("error", "warning", "info").index(doubt.severity))


def beside(found: Evaluation) -> list[Row]:
    """The rows of the side-by-side table, the control on permuted labels last."""
    control = found.sections.get("permuted")
    return [*found.rows, *([] if control is None else [control])]


def sections(found: Evaluation) -> dict[str, Any]:
    """All SECTIONS; None where one was not asked for."""
    return {**dict.fromkeys(SECTIONS), **found.sections}


def _few(found: Evaluation) -> list[Doubt]:
    test, estimates = found.test, found.headline.estimates
    listed = []
    for name, metric in (("normal", "specificity"), ("cancer", "sensitivity")):
        part = test[test["label"] == name]
        groups = part["group"].nunique()
        if groups >= FEW_GROUPS:
            continue
        text = f"Test has only {counted(len(part), f'{name} slice')} in {counted(groups, 'group')}"
        rate = cancer(estimates, metric)
        if rate.low is not None and rate.high is not None:
            text += f": {metric} may lie anywhere from {known(rate.low)} to {known(rate.high)}"
        listed.append(Doubt("warning" if len(part) else "error", f"Few {name}s", f"{text}."))
    normals = found.point.validation.get("normals", FEW_GROUPS)
    if normals < FEW_GROUPS:
        text = f"Threshold and calibration were fitted with {counted(normals, 'normal validation slice')}"
        listed.append(Doubt("warning", "Fitted on few", f"{text}; another draw would have moved them."))
    return listed


def _margin(row: Row) -> list[Doubt]:
    if row.margin is None or row.margin.value is None or row.shortcut_auroc is None:
        return []
    shortcut = f"{row.shortcut}, which sees no lesion, alone gives AUROC {known(row.shortcut_auroc)} on the same slices"
    if row.margin.low is not None and row.margin.low > 0:
        return []
    why = f" ({row.margin.reason})" if row.margin.reason else ""
    return [Doubt("error", "Shortcut", f"{shortcut}: that the model does better is not shown{why}.")]


def _operating_point(found: Evaluation) -> list[Doubt]:
    """Where the policy asked for a rate that test rules out."""
    metric, _, least = found.point.policy.partition(">=")
    if not least:
        return []
    reached = cancer(found.metrics["test"], metric)
    if reached.high is None or reached.high >= float(least):
        return []
    text = f"The threshold was to give {metric} {least} and gives {interval(reached)} on test."
    return [Doubt("warning", "Operating point", text)]


def _coverage(found: Evaluation) -> list[Doubt]:
    """Where conformal sets hold the truth of a class so rarely that the stated coverage is ruled out."""
    test, names = found.test, np.array(classes_of(found.cfg.task))
    held = np.array([name in text.split(" or ") for name, text in zip(names[test["target"]], test["set"], strict=True)])
    listed = []
    for name in ("normal", "cancer"):
        part = (test["label"] == name).to_numpy()
        if not part.any():
            continue
        n = effective_size(held[part], test["group"].to_numpy()[part])
        if wilson(held[part].mean() * n, n)[1] < found.point.coverage:
            text = (
                f"Conformal sets hold the truth in {held[part].sum()} of "
                f"{counted(int(part.sum()), f'{name} test slice')} where {found.point.coverage:.0%} was stated: test "
                "is unlike validation."
            )
            listed.append(Doubt("warning", "Coverage", text))
    return listed


def _sections(found: Evaluation) -> list[Doubt]:
    listed = []
    for name, part in found.test.groupby("label"):
        novel = int((part["novelty"] > 1).sum())
        if novel > MANY_NOVEL * len(part):
            text = (
                f"{novel} of {counted(len(part), f'{name} test slice')} lie further from training than validation "
                "does, and are called uncertain."
            )
            listed.append(Doubt("warning", "Novelty", text))
    flags = [row for row in found.sections.get("subgroups", []) if row["flag"]]
    if flags:
        names = "; ".join(f"{row['by']} {row['name']}: {row['flag']}" for row in flags[:3])
        more = f"; and {len(flags) - 3} more" if len(flags) > 3 else ""
        listed.append(Doubt("warning", "Subgroups", f"{_sentence(names)}{more}."))
    explanation = found.sections.get("explanation")
    if explanation and not explanation["passes"]:
        listed.append(Doubt("warning", "Heat maps", " ".join(explanation["failures"])))
    foreign = next(iter(found.sections.get("novelty", [])), None)
    if foreign and foreign["beyond"]["value"] < 1 - MANY_ANSWERED:
        text = (
            f"{1 - foreign['beyond']['value']:.0%} of {counted(foreign['pictures'], 'picture')} that are no chest CT "
            "would be answered."
        )
        listed.append(Doubt("warning", "Foreign pictures", text))
    robustness = found.sections.get("robustness")
    if robustness is not None and len(shaky := robustness[robustness["flipped"] > MANY_FLIPPED]):
        mildest = shaky.drop_duplicates("perturbation").sort_values("level", kind="stable")
        named = [f"{row.perturbation} {row.strength:g} ({row.unit}) {row.flipped:.0%}" for row in mildest.itertuples()]
        more = f", and {len(named) - 3} more kinds of change" if len(named) > 3 else ""
        text = f"Decisions flip under changes that a person reads through: {', '.join(named[:3])}{more}."
        listed.append(Doubt("warning", "Robustness", text))
    mild = None if robustness is None else robustness[robustness["level"] == 1].dropna(subset="auroc_change")
    if mild is not None and len(mild):
        mild = mild.astype({"auroc_change": float})
        worst = mild.loc[mild["auroc_change"].idxmin()]
        if worst["auroc_change"] < -MUCH_LOST:
            text = (
                f"AUROC falls to {known(worst['auroc'])} ({known(worst['auroc_change'], signed=True)}) under "
                f"{worst['perturbation']} {worst['strength']:g} ({worst['unit']}), the mildest that was tried: the "
                "score rests on what this takes away, which is not the lesion."
            )
            listed.append(Doubt("error", "Robustness", text))
    for permuted in (row for row in beside(found) if row.policy == PERMUTED):
        chance = cancer(permuted.estimates, "auroc")
        if chance.low is not None and chance.low > 0.5:
            text = f"Trained on permuted labels, the model still has AUROC {interval(chance)}: something leaks."
            listed.append(Doubt("error", "Control", text))
    return listed


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def summary(found: Evaluation) -> str:
    """The evaluation for a terminal: caveats, headline, doubts, metrics with intervals, other split policies."""
    splits = [name for name in ("valid", "test") if name in found.metrics]
    told = len(caveats(found.about))  # they are the first doubts
    lines = [*caveats(found.about), headline(found), *(f"- {doubt.text}" for doubt in doubts(found)[told:]), ""]
    lines.append(f"{'':26}" + "".join(f"{name:>24}" for name in splits))
    for metric in HEADLINE:
        cells = [interval(found.metrics[split][metric]) for split in splits if metric in found.metrics[split]]
        if cells:
            lines.append(f"{called(metric):26}" + "".join(f"{cell:>24}" for cell in cells))
    for name, count in (("slices", len), ("groups", lambda part: part["group"].nunique())):
        counts = [count(found.table[found.table["split"] == split]) for split in splits]
        lines.append(f"{name:26}" + "".join(f"{value:>24}" for value in counts))
    reasons = {e.reason: called(name) for name, e in found.metrics["test"].items() if e.value is None and e.reason}
    lines += [f"n/a: {reason} ({name})" for reason, name in list(reasons.items())[:3]]
    lines += ["", *_side_by_side(found)]
    return "\n".join(lines)


def _side_by_side(found: Evaluation) -> list[str]:
    heads = ("AUROC", "accuracy", "normal/cancer", "groups", "leaked", "best shortcut", "margin")
    widths = (22, 22, 14, 7, 7, 14, 24)
    rows = beside(found)
    lines = [f"{'split':18}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))]
    for row in rows:
        cells = (
            interval(cancer(row.estimates, "auroc")) if row.estimates else "n/a",
            interval(row.estimates["accuracy"]) if row.estimates else "n/a",
            f"{row.slices.get('normal', 0)}/{row.slices.get('cancer', 0)}",
            str(row.groups),
            str(row.leaked),
            known(row.shortcut_auroc),
            interval(row.margin, signed=True) if row.margin else "n/a",
        )
        line = f"{row.policy:18}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{line}  {row.note}".rstrip())
    return lines
