"""The words of the page, in sentences that need no statistics: every number comes from the bundle or the answer.

Everything is Markdown. What a file or a bundle from elsewhere could have written passes `plain`, except the model card,
which is Markdown itself; Gradio shows it without its HTML.
"""

import re
from collections.abc import Mapping
from typing import Any

from chestct.models.bundle import Bundle
from chestct.models.operating_point import OperatingPoint
from chestct.serving.predictor import NOT_MEDICAL, Prediction

NOTICE = "**{}.** {}".format(*NOT_MEDICAL.split(". ", 1))

HEADLINES = {
    "cancer": "The model sees signs of cancer",
    "normal": "The model sees no signs of cancer",
    "uncertain": "The model cannot tell",
    "refused": "No answer for this image",
    "unreadable": "This file was not read",
}

NAMES = {
    "large_cell": "large cell carcinoma",
    "squamous": "squamous cell carcinoma",
}

CAVEAT_HEADINGS = re.compile(
    r"limit|caveat|not to trust|not to use|out.of.scope|not (?:be )?used?\b|bias|risk", re.IGNORECASE
)
"""Headings of a model card below which it says when not to trust it."""

GENERAL_CAVEATS = """- It judges one slice at a time; a doctor sees the whole scan, the history and the patient.
- It knows only two kinds of pictures: healthy lungs and lungs with a carcinoma. Pneumonia, scars, old tuberculosis and
  everything else it was never shown can look like either.
- It learned from one public collection. Other scanners, other windows and other people can look different to it."""
"""For bundles whose card has no such section."""


def plain(text: str) -> str:
    """Text as Markdown that shows exactly it: neither markup nor HTML."""
    return re.sub(r"([\\`*_{}\[\]()<>#+.!|~&$:-])", r"\\\1", " ".join(text.split()))


def percent(share: float) -> str:
    """A probability for people: whole percents, and never a certainty that the model cannot have."""
    if share < 0.01:
        return "under 1 %"
    if share > 0.99:
        return "over 99 %"
    return f"{share:.0%}".replace("%", " %")


def display_name(class_name: str) -> str:
    return NAMES.get(class_name, class_name)


def verdict(prediction: Prediction, point: OperatingPoint) -> str:
    """What stands below the headline: the score and its side of the threshold, or the reason for another decision."""
    if prediction.decision in ("refused", "uncertain"):
        return plain(prediction.reason)
    side = "at or above" if prediction.decision == "cancer" else "below"
    return (
        f"The probability of cancer is **{percent(prediction.score)}**, {side} the threshold of "
        f"{percent(point.threshold)}."
    )


def threshold_meaning(point: OperatingPoint) -> str:
    """What the threshold does, in counts of validation slices."""
    rule = f"From {percent(point.threshold)} on, the model calls a slice cancer."
    counts = point.validation
    if not counts.get("cancers") or not counts.get("normals"):
        return rule
    cancers, detected, normals, flagged = (counts[key] for key in ("cancers", "found", "normals", "flagged"))
    return (
        f"{rule} At this threshold {per_hundred(detected, cancers)} of 100 cancers in the validation set were found "
        f"({detected:,} of {cancers:,}), and {per_hundred(flagged, normals)} of 100 normal slices were flagged by "
        f"mistake ({flagged:,} of {normals:,})."
    )


def per_hundred(part: int, whole: int) -> int:
    """Rounded, but 0 and 100 only where they are exact."""
    if part in (0, whole):
        return 100 * part // whole
    return min(99, max(1, round(100 * part / whole)))


def calibration_meaning(prediction: Prediction) -> str:
    """How often slices of this score are cancer; "" where there is no answer, since calibration does not hold there."""
    if prediction.decision in ("refused", "uncertain"):
        return ""
    share = prediction.score
    number = "hardly any" if share < 0.01 else "almost all" if share > 0.99 else f"about {100 * share:.0f}"
    return f"It was calibrated on validation slices, so that of 100 slices with this probability {number} show cancer."


def possible_meaning(prediction: Prediction, point: OperatingPoint) -> str:
    """The conformal set in words."""
    coverage = f"{point.coverage:.0%}".replace("%", " %")
    if not prediction.possible:
        return f"None: the score fits no class as the validation slices of that class do (coverage {coverage})."
    names = " or ".join(plain(display_name(name)) for name in prediction.possible)
    return f"{names} (sets made this way held the truth for {coverage} of each class in validation)"


def distance_meaning(prediction: Prediction) -> str:
    """How far the slice lies from what the model learned from."""
    if prediction.novelty > 1:
        return f"{prediction.novelty:.2f}, beyond the limit of 1.00: unlike the slices that the model learned from"
    return f"{prediction.novelty:.2f} of at most 1.00: like the slices that the model learned from"


def heat_meaning(prediction: Prediction, shown: bool) -> str:
    """What the coloured areas are. shown: whether there are any."""
    if shown:
        return (
            "**Where the model looked.** Coloured areas are those whose texture speaks for cancer, from dark violet "
            "(little) to yellow (the most in this slice). The map is coarse and relative: it shows where the network "
            "looked, not where a tumour ends."
        )
    if prediction.decision == "normal":
        return (
            "No area is coloured: colours are relative to the slice itself, and on one without signs of cancer the "
            "brightest spot means nothing."
        )
    return "No area of this slice speaks for cancer, so none is coloured."


def explanation(prediction: Prediction, bundle: Bundle) -> str:
    """Why this answer: a list."""
    lines = {
        "The score": calibration_meaning(prediction),
        "Answers that cannot be excluded": possible_meaning(prediction, bundle.point),
        "Distance to the training slices": distance_meaning(prediction),
        "Answered by": f"bundle `{prediction.bundle}` in {max(1, round(1000 * sum(prediction.seconds.values())))} ms",
    }
    return "\n".join(f"- **{name}**: {text}" for name, text in lines.items() if text)


KNOWN_WARNING = (
    "**This very slice was used to train or tune the model.** The answer is no evidence of how well it does on slices "
    "it has never seen."
)


def refused_score(prediction: Prediction) -> str:
    """The score of a refused image, behind its warning."""
    return (
        "**This score means nothing reliable.** The model gives a number for any picture, a photograph of a cat "
        "included. This image was refused because it is not what the model was made for.\n\n"
        f"Probability of cancer: {percent(prediction.score)}. Distance to the training slices: "
        f"{distance_meaning(prediction)}."
    )


def caveats(bundle: Bundle) -> str:
    """When not to trust the model: from its card, or else what holds for any such model."""
    from_card = "\n\n".join(filter(None, (card_findings(bundle.card), card_caveats(bundle.card))))
    return f"{from_card or GENERAL_CAVEATS}\n\n{NOT_MEDICAL}"


def card_body(card: str) -> str:
    """A model card without the YAML that model hubs read, and without its title."""
    return re.sub(r"\A\s*(---\n.*?\n---\n)?\s*(# [^\n]*\n)?", "", card, flags=re.DOTALL)


def card_findings(card: str) -> str:
    """The list items above a card's first section: what to know before anything else."""
    before = re.split(r"^#", card_body(card), flags=re.MULTILINE)[0]
    return "\n".join(line for line in before.splitlines() if line.startswith("- "))


def card_caveats(card: str) -> str:
    """The sections of a card whose headings match CAVEAT_HEADINGS, without the headings."""
    kept: list[str] = []
    level = 0
    for line in card.splitlines():
        heading = re.match(r"(#+)\s+(.*)", line)
        if heading and (not level or len(heading[1]) <= level):
            level = len(heading[1]) if CAVEAT_HEADINGS.search(heading[2]) else 0
        elif level:
            kept.append(line)
    return "\n".join(kept).strip()


GLOSSARY = """- **AUROC**: how well the scores order cancer above normal; 0.5 is chance, 1 perfect
- **Sensitivity**: share of the cancers that are detected
- **Specificity**: share of the normal slices that are left alone
- **Precision, NPV**: share of the slices called cancer, or normal, that are it
- **Balanced accuracy**: mean of sensitivity and specificity
- **Calibration error, Brier score**: gap and squared error between probability and what came true; 0 is best
- **[In brackets]**: 95 % intervals, with copies and near-copies of a slice (a group) counted as one"""


def reliability(facts: Mapping[str, Any]) -> str:
    """How many test slices of a probability really were cancer, as a table; "" where the bundle does not say."""
    bins = facts.get("reliability", {}).get("test") or []
    rows = [
        f"| {percent(row['score'])} | **{row['observed']:.0%}** [{row['low']:.0%}, {row['high']:.0%}] | {row['n']} |"
        for row in bins
    ]
    if not rows:
        return ""
    head = "| Probability of cancer (mean of the bin) | Test slices with it that are cancer | Slices |"
    return "\n".join(["The probability holds where the first two columns agree.\n", head, "| --- | --- | --- |", *rows])
