"""What an evaluation says in words and tables; report, model card and terminal take them from here, and so agree."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from chestct.audit.findings import FEW_GROUPS, Finding, counted
from chestct.config.schema import classes_of, of_patients
from chestct.config.schema_serving import ROUNDED
from chestct.data.splits import measurable
from chestct.evaluation.evaluate import Evaluation
from chestct.reporting.environment import as_text, display_name
from chestct.stats.bootstrap import effective_size
from chestct.stats.calibration import wilson
from chestct.stats.metrics import Estimate

MANY = 0.1  # a larger share of novel slices, foreign pictures answered or decisions that flip is a caveat


def cancer(estimates: dict[str, Estimate], metric: str) -> Estimate:
    """A metric of cancer against normal, under the same name for both tasks."""
    return estimates[f"cancer/{metric}"] if f"cancer/{metric}" in estimates else estimates[metric]


def answer(evaluation: Evaluation) -> str:
    """What was found out, in plain words and without a number."""
    estimates, margin = evaluation.headline.estimates, evaluation.headline.margin
    if cancer(estimates, "auroc").value is None:
        return "This test set cannot show how well the model tells cancer from normal."
    if margin is None or margin.value is None:
        return "How much the model sees is open: no rule that sees no lesion was measured on the same slices."
    if margin.low is not None and margin.low > 0:
        return "The model tells cancer from normal better than every rule that sees no lesion."
    return "Nothing shows that the model does better than a rule that sees no lesion."


def headline(evaluation: Evaluation) -> str:
    """The result in numbers, with its interval, what it rests on, and how far it is above the best shortcut."""
    row = evaluation.headline
    where = f"{counted(sum(row.slices.values()), 'test slice')} in {counted(row.groups, 'group')}"
    margin = as_text(row.margin, signed=True) if row.margin else "n/a (not measured)"
    auroc = as_text(cancer(row.estimates, "auroc"))
    return f"AUROC {auroc} on {where}; margin over the best rule that sees no lesion: {margin}."


def caveats(evaluation: Evaluation) -> list[Finding]:
    """Everything in this evaluation that limits what its numbers prove, the worst first."""
    listed = [*_about_the_data(evaluation), *_about_the_scores(evaluation), *_about_the_sections(evaluation)]
    return sorted(listed, key=lambda caveat: caveat.severity)


def alike(evaluation: Evaluation) -> str:
    """How the rule of the threshold counts slices of several sources; a bundle does not say how many it had."""
    several = measurable(evaluation.table, "valid")["source"].nunique() != 1
    return " (each source counting alike)" if several and evaluation.point.policy != "half" else ""


def comparison(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The side-by-side table: AUROC and margin of each split policy, with what they rest on."""
    return [
        {
            "split": row.policy,
            "AUROC": as_text(cancer(row.estimates, "auroc")) if row.estimates else "n/a",
            "best rule, no lesion": as_text(row.shortcut_auroc) + (f", {row.shortcut}" if row.shortcut else ""),
            "margin over it": as_text(row.margin, signed=True),
            "accuracy": as_text(row.estimates.get("accuracy")),
            "normal / cancer": f"{row.slices.get('normal', 0)} / {row.slices.get('cancer', 0)}",
            "groups": row.groups,
            "leaked": row.leaked,
        }
        for row in evaluation.rows
    ]


def metric_table(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Every metric by split, with what it rests on."""
    table = []
    for name in evaluation.metrics["test"]:
        row = {"metric": display_name(name)}
        for split in (split for split in ("test", "valid") if split in evaluation.metrics):
            estimate = evaluation.metrics[split][name]
            row |= {split: as_text(estimate), f"{split}: slices / groups": f"{estimate.slices} / {estimate.groups}"}
        table.append(row)
    return table


def counts(evaluation: Evaluation) -> dict[str, pd.DataFrame]:
    """Test slices by true class, as they were `called` at the threshold and `decided`, zeros included."""
    test, names = evaluation.test, np.array(classes_of(evaluation.cfg.task))
    by_threshold = pd.crosstab(names[test["target"]], names[called(evaluation)], rownames=["truth"])
    decided = pd.crosstab(test["label"], test["decision"], rownames=["truth"])
    answers = sorted({"cancer", "normal", "uncertain", *test["decision"]})
    return {
        "called": by_threshold.reindex(columns=sorted(names), fill_value=0).reset_index(),
        "decided": decided.reindex(columns=answers, fill_value=0).reset_index(),
    }


def called(evaluation: Evaluation) -> np.ndarray:
    """The class that each test slice is called at the threshold, int [N]."""
    test, task = evaluation.test, evaluation.cfg.task
    scores = test[[f"probability_{name}" for name in classes_of(task)]].to_numpy()
    return test["flagged"].to_numpy(int) if task == "binary" else scores.argmax(1)


def summary(evaluation: Evaluation) -> str:
    """The evaluation for a terminal: serious caveats, answer, other caveats, metrics, other split policies."""
    listed = caveats(evaluation)
    lines = [f"{caveat.kind.upper()}: {caveat.text}" for caveat in listed if caveat.severity == "error"]
    lines += [answer(evaluation), headline(evaluation), *(f"- {c.text}" for c in listed if c.severity != "error")]
    for table in (metric_table(evaluation), comparison(evaluation)):
        lines += ["", pd.DataFrame(table).to_string(index=False, justify="left")]
    lines += (f"{row.policy}: {row.note}" for row in evaluation.rows if row.note)
    for part in evaluation.sections.get("protocol", {}).values():
        cells = pd.DataFrame(part.rows).map(as_text)
        shown = [cells.to_string(index=False, justify="left")] if part.rows else []
        lines += ["", part.title, *shown, *part.notes]
    return "\n".join(lines)


def _about_the_data(evaluation: Evaluation) -> Iterator[Finding]:
    about = evaluation.about
    tested = not evaluation.test["source"].map(of_patients).any()
    # A checkpoint is measured on its own data; what a bundle learned from it says itself.
    trained = evaluation.bundle.facts.get("data", {}).get("synthetic", about["synthetic"] and "bundle" not in about)
    if tested or trained:
        how = "Trained and tested" if tested and trained else "Tested" if tested else "Trained"
        means = "these numbers say nothing about patients" if tested else "the model has seen no patient"
        yield Finding("Synthetic", "error", f"{how} on phantoms: {means}.")
    if about["leaked"]:
        text = f"{about['leaked']} validation and test slices of the split {about['split']} have copies in an earlier"
        yield Finding("Leaky split", "error", f"{text} one; these numbers are too good.")
    if number := about.get("left_out"):
        text = f"Not measured: {counted(number, 'slice')} that the model learned from, or near-copies of such."
        yield Finding("Left out", "warning", text)
    if number := about.get("label_conflicts"):
        yield Finding("Left out", "warning", f"Not measured: {counted(number, 'picture')} with more than one label.")
    if number := about.get("phantoms"):
        yield Finding("Left out", "warning", f"Not measured: {counted(number, 'phantom')} beside slices of patients.")
    if about.get("features"):
        text = f"Measured on features in {ROUNDED[about['features']]}, and the bundle answers in fp32; "
        text += "features.backend=torch measures that."
        yield Finding("Rounded features", "warning", text)
    for name, metric in (("normal", "specificity"), ("cancer", "sensitivity")):
        part = evaluation.test[evaluation.test["label"] == name]
        groups = part["group"].nunique()
        if groups < FEW_GROUPS:
            text = f"Test has only {counted(len(part), f'{name} slice')} in {counted(groups, 'group')}"
            reached = as_text(cancer(evaluation.headline.estimates, metric))
            yield Finding(f"Few {name}s", "warning" if len(part) else "error", f"{text}: {metric} {reached}.")


def _about_the_scores(evaluation: Evaluation) -> Iterator[Finding]:
    row = evaluation.headline
    if row.margin and row.margin.value is not None and (row.margin.low is None or row.margin.low <= 0):
        text = f"{row.shortcut}, which sees no lesion, alone gives AUROC {as_text(row.shortcut_auroc)}"
        yield Finding("Shortcut", "error", f"{text} on the same slices: that the model does better is not shown.")
    for name, part in evaluation.test.groupby("label"):
        truth = part["label" if evaluation.cfg.task == "binary" else "subtype"]
        # A subtype bundle that is measured on cancer and normal still has sets of subtypes.
        any_cancer = (truth == "cancer") & ~part["set"].isin(("normal", "none"))
        held = np.array([name in names for name, names in zip(truth, part["set"], strict=True)]) | any_cancer.to_numpy()
        size = effective_size(held, part["group"].to_numpy())
        if wilson(held.mean() * size, size)[1] < evaluation.point.coverage:
            text = f"Conformal sets hold the truth in {held.sum()} of {counted(len(part), f'{name} test slice')} where"
            yield Finding("Coverage", "warning", f"{text} {evaluation.point.coverage:.0%} was stated.")
        novel = int((part["novelty"] > 1).sum())
        if novel > MANY * len(part):
            text = f"{novel} of {counted(len(part), f'{name} test slice')} lie further from training than validation"
            yield Finding("Novelty", "warning", f"{text} does, and are called uncertain.")


def _about_the_sections(evaluation: Evaluation) -> Iterator[Finding]:
    sections = evaluation.sections
    if flagged := [row for row in sections.get("subgroups", []) if row["flag"]]:
        text = "; ".join(f"{row['by']} {row['name']}: {row['flag']}" for row in flagged)
        yield Finding("Subgroups", "warning", f"{text}.")
    if "explanation" in sections and (failure := sections["explanation"]["failure"]):
        yield Finding("Heat maps", "warning", failure)
    foreign = next(iter(sections.get("novelty", [])), None)
    if foreign and foreign["beyond"].value < 1 - MANY:
        text = f"{1 - foreign['beyond'].value:.0%} of {counted(foreign['pictures'], 'picture')}"
        yield Finding("Foreign pictures", "warning", f"{text} that are no chest CT would be answered.")
    if "robustness" in sections:
        table = sections["robustness"]
        shaky = table[table["flipped"] > MANY].drop_duplicates("perturbation").itertuples()
        if named := [f"{row.perturbation} {row.strength:g} ({row.unit}) {row.flipped:.0%}" for row in shaky]:
            text = f"Decisions flip under changes that a person reads through: {', '.join(named)}."
            yield Finding("Robustness", "warning", text)
