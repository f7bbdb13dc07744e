"""What an evaluation says in words: the headline, its caveats, and the table for the terminal.

Report, model card and terminal take their sentences from here, so that they cannot disagree. Caveats come before
numbers everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from chestct.audit.findings import FEW_GROUPS
from chestct.config.schema import classes_of
from chestct.evaluation.evaluate import Evaluation, Row
from chestct.reporting.environment import counted, display_name, format_number, interval
from chestct.stats.bootstrap import effective_size
from chestct.stats.calibration import wilson
from chestct.stats.metrics import Estimate

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
"""What an evaluation may hold in addition to its metrics."""


@dataclass(frozen=True)
class Caveat:
    """A reason not to believe the headline, or to believe less of it; severity: error, warning or info."""

    severity: str
    kind: str
    text: str


def cancer(estimates: dict[str, Estimate], metric: str) -> Estimate:
    """A metric of cancer against normal, under the same name for both tasks."""
    return estimates[f"cancer/{metric}"] if f"cancer/{metric}" in estimates else estimates[metric]


def headline(evaluation: Evaluation) -> str:
    """The result in one sentence, with its interval, what it rests on, and how far it is above the best shortcut."""
    row = evaluation.headline
    auroc = cancer(row.estimates, "auroc")
    where = f"{counted(sum(row.slices.values()), 'test slice')} in {counted(row.groups, 'group')}"
    if auroc.value is None:
        return f"AUROC n/a on {where}: {auroc.reason}."
    result = f"AUROC {interval(auroc)} on {where}"
    if row.margin is None or row.margin.value is None:
        return f"{result}; how much of it a rule that sees no lesion would reach is not known."
    return f"{result}; margin over the best rule that sees no lesion: {interval(row.margin, signed=True)}."


def caveats(evaluation: Evaluation) -> list[Caveat]:
    """Everything in this evaluation that limits what its numbers prove, the worst first."""
    listed = [caveat for check in CHECKS for caveat in check(evaluation)]
    return sorted(listed, key=lambda caveat: ("error", "warning", "info").index(caveat.severity))


def comparison(evaluation: Evaluation) -> list[Row]:
    """The rows of the side-by-side table, the control on permuted labels last."""
    control = evaluation.sections.get("permuted")
    return [*evaluation.rows, *([] if control is None else [control])]


def sections(evaluation: Evaluation) -> dict[str, Any]:
    """All SECTIONS; None where one was not requested."""
    return {**dict.fromkeys(SECTIONS), **evaluation.sections}


def covered(evaluation: Evaluation) -> np.ndarray:
    """Whether the conformal set of each test slice holds its true class, bool [N]."""
    names = np.array(classes_of(evaluation.cfg.task))[evaluation.test["target"]]
    return np.array([name in text.split(" or ") for name, text in zip(names, evaluation.test["set"], strict=True)])


def rate(hit: np.ndarray, group: np.ndarray) -> Estimate:
    """The share of slices that `hit` (bool [N]), with Wilson's interval for their effective number."""
    if not len(hit):
        return Estimate(None, None, None, 0, 0)
    n = effective_size(hit, group)
    return Estimate(float(hit.mean()), *wilson(hit.mean() * n, n), len(hit), 0)


def summary(evaluation: Evaluation) -> str:
    """The evaluation for a terminal: headline, caveats, metrics with intervals, other split policies."""
    listed, first = caveats(evaluation), len(list(_data(evaluation)))
    lines = []
    for caveat in listed[:first]:
        kind, bracket, rest = caveat.kind.partition(" (")
        lines.append(f"{kind.upper()}{bracket}{rest}: {caveat.text}")
    lines += [headline(evaluation), *(f"- {caveat.text}" for caveat in listed[first:]), ""]
    table = {}
    for split in (name for name in ("valid", "test") if name in evaluation.metrics):
        part, estimates = evaluation.table[evaluation.table["split"] == split], evaluation.metrics[split]
        table[split] = {display_name(name): interval(estimates[name]) for name in HEADLINE if name in estimates}
        table[split] |= {"slices": str(len(part)), "groups": str(part["group"].nunique())}
    reasons = {e.reason: name for name, e in evaluation.metrics["test"].items() if e.value is None and e.reason}
    lines += [pd.DataFrame(table).to_string()]
    lines += [f"n/a: {reason} ({display_name(name)})" for reason, name in list(reasons.items())[:3]]
    notes = [f"{row.policy}: {row.note}" for row in comparison(evaluation) if row.note]
    return "\n".join([*lines, "", _side_by_side(evaluation), *notes])


def _side_by_side(evaluation: Evaluation) -> str:
    rows = [
        {
            "split": row.policy,
            "AUROC": interval(cancer(row.estimates, "auroc")) if row.estimates else "n/a",
            "accuracy": interval(row.estimates["accuracy"]) if row.estimates else "n/a",
            "normal/cancer": f"{row.slices.get('normal', 0)}/{row.slices.get('cancer', 0)}",
            "groups": row.groups,
            "leaked": row.leaked,
            "best shortcut": format_number(row.shortcut_auroc),
            "margin": interval(row.margin, signed=True) if row.margin else "n/a",
        }
        for row in comparison(evaluation)
    ]
    return pd.DataFrame(rows).set_index("split").rename_axis(columns="split", index=None).to_string()


def _data(evaluation: Evaluation) -> Iterator[Caveat]:
    """What has to be read before any number."""
    about = evaluation.about
    if about["synthetic"]:
        text = "Trained and tested on phantoms; these numbers say nothing about patients."
        yield Caveat("error", "Synthetic", text)
    if about["leaked"]:
        text = (
            f"{about['leaked']} validation and test slices have copies in an earlier split; these numbers are too good."
        )
        yield Caveat("error", f"Leaky split ({about['split']})", text)


def _few(evaluation: Evaluation) -> Iterator[Caveat]:
    for name, metric in (("normal", "specificity"), ("cancer", "sensitivity")):
        part = evaluation.test[evaluation.test["label"] == name]
        groups = part["group"].nunique()
        if groups >= FEW_GROUPS:
            continue
        text = f"Test has only {counted(len(part), f'{name} slice')} in {counted(groups, 'group')}"
        reached = cancer(evaluation.headline.estimates, metric)
        if reached.low is not None:
            text += f": {metric} may lie anywhere from {format_number(reached.low)} to {format_number(reached.high)}"
        yield Caveat("warning" if len(part) else "error", f"Few {name}s", f"{text}.")
    normals = evaluation.point.validation.get("normals", FEW_GROUPS)
    if normals < FEW_GROUPS:
        text = f"Threshold and calibration were fitted with {counted(normals, 'normal validation slice')}"
        yield Caveat("warning", "Fitted on few", f"{text}; another draw would have moved them.")


def _margin(evaluation: Evaluation) -> Iterator[Caveat]:
    row = evaluation.headline
    if row.margin is None or row.margin.value is None or row.shortcut_auroc is None:
        return
    if row.margin.low is None or row.margin.low <= 0:
        why = f" ({row.margin.reason})" if row.margin.reason else ""
        text = f"{row.shortcut}, which sees no lesion, alone gives AUROC {format_number(row.shortcut_auroc)}"
        yield Caveat("error", "Shortcut", f"{text} on the same slices: that the model does better is not shown{why}.")


def _operating_point(evaluation: Evaluation) -> Iterator[Caveat]:
    """Where the policy demanded a rate that test rules out."""
    metric, _, least = evaluation.point.policy.partition(">=")
    reached = cancer(evaluation.metrics["test"], metric) if least else None
    if reached and reached.high is not None and reached.high < float(least):
        text = f"The threshold was to give {metric} {least} and gives {interval(reached)} on test."
        yield Caveat("warning", "Operating point", text)


def _coverage(evaluation: Evaluation) -> Iterator[Caveat]:
    """Where conformal sets hold the truth of a class so rarely that the stated coverage is ruled out."""
    test, held, stated = evaluation.test, covered(evaluation), evaluation.point.coverage
    for name in ("normal", "cancer"):
        part = (test["label"] == name).to_numpy()
        reached = rate(held[part], test["group"].to_numpy()[part])
        if reached.high is not None and reached.high < stated:
            text = f"Conformal sets hold the truth in {held[part].sum()} of {counted(part.sum(), f'{name} test slice')}"
            text += f" where {stated:.0%} was stated: test is unlike validation."
            yield Caveat("warning", "Coverage", text)


def _novelty(evaluation: Evaluation) -> Iterator[Caveat]:
    for name, part in evaluation.test.groupby("label"):
        novel = int((part["novelty"] > 1).sum())
        if novel > MANY_NOVEL * len(part):
            text = f"{novel} of {counted(len(part), f'{name} test slice')} lie further from training than validation"
            yield Caveat("warning", "Novelty", f"{text} does, and are called uncertain.")
    foreign = next(iter(evaluation.sections.get("novelty", [])), None)
    if foreign and foreign["beyond"]["value"] < 1 - MANY_ANSWERED:
        text = f"{1 - foreign['beyond']['value']:.0%} of {counted(foreign['pictures'], 'picture')}"
        yield Caveat("warning", "Foreign pictures", f"{text} that are no chest CT would be answered.")


def _subgroups(evaluation: Evaluation) -> Iterator[Caveat]:
    rows = evaluation.sections.get("subgroups", [])
    flags = [f"{row['by']} {row['name']}: {row['flag']}" for row in rows if row["flag"]]
    if flags:
        text = "; ".join(flags[:3]) + (f"; and {len(flags) - 3} more" if len(flags) > 3 else "")
        yield Caveat("warning", "Subgroups", f"{text[0].upper()}{text[1:]}.")


def _heat_maps(evaluation: Evaluation) -> Iterator[Caveat]:
    explanation = evaluation.sections.get("explanation")
    if explanation and not explanation["passes"]:
        yield Caveat("warning", "Heat maps", " ".join(explanation["failures"]))


def _robustness(evaluation: Evaluation) -> Iterator[Caveat]:
    table: pd.DataFrame | None = evaluation.sections.get("robustness")
    if table is None:
        return
    shaky = table[table["flipped"] > MANY_FLIPPED].drop_duplicates("perturbation").sort_values("level", kind="stable")
    if len(shaky):
        named = [f"{row.perturbation} {row.strength:g} ({row.unit}) {row.flipped:.0%}" for row in shaky.itertuples()]
        more = f", and {len(named) - 3} more kinds of change" if len(named) > 3 else ""
        text = f"Decisions flip under changes that a person reads through: {', '.join(named[:3])}{more}."
        yield Caveat("warning", "Robustness", text)
    mildest = [row for row in table.to_dict("records") if row["level"] == 1 and pd.notna(row["auroc_change"])]
    worst = min(mildest, key=lambda row: row["auroc_change"], default=None)
    if worst and worst["auroc_change"] < -MUCH_LOST:
        change = f"{format_number(worst['auroc'])} ({format_number(worst['auroc_change'], signed=True)})"
        text = f"AUROC falls to {change} under {worst['perturbation']} {worst['strength']:g} ({worst['unit']}), the"
        text += " mildest that was tried: the score rests on what this takes away, which is not the lesion."
        yield Caveat("error", "Robustness", text)


def _control(evaluation: Evaluation) -> Iterator[Caveat]:
    for row in comparison(evaluation):
        chance = cancer(row.estimates, "auroc") if row.policy == PERMUTED else None
        if chance and chance.low is not None and chance.low > 0.5:
            text = f"Trained on permuted labels, the model still has AUROC {interval(chance)}: something leaks."
            yield Caveat("error", "Control", text)


CHECKS = (_data, _few, _margin, _operating_point, _coverage, _novelty, _subgroups, _heat_maps, _robustness, _control)
"""Each yields its caveats, if any. `_data` comes first: its caveats stand above the headline."""
