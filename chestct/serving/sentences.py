"""What the page says, in sentences that need no statistics: every number in them comes from the bundle or the answer.

Nothing here is HTML; `answer` and `about` escape and mark up.
"""

import re

from chestct.models.bundle import Bundle
from chestct.models.operating_point import OperatingPoint
from chestct.serving.predictor import Prediction

HEADLINES = {
    "cancer": "The model sees signs of cancer",
    "normal": "The model sees no signs of cancer",
    "uncertain": "The model cannot tell",
    "refused": "No answer for this image",
}

NAMES = {
    "large_cell": "large cell carcinoma",
    "squamous": "squamous cell carcinoma",
}

LIMITS = re.compile(r"limit|caveat|not to trust|not to use|out.of.scope|not (?:be )?used?\b|bias|risk", re.IGNORECASE)
"""Headings of a model card that tell when not to trust it."""

DOUBTS = (
    "It judges one slice at a time; a doctor sees the whole scan, the history and the patient.",
    "It knows only two kinds of pictures: healthy lungs and lungs with a carcinoma. Pneumonia, scars, old "
    "tuberculosis and everything else it was never shown can look like either.",
    "It learned from one public collection. Other scanners, other windows and other people can look different to it.",
)
"""Said where the bundle's card has no section of its own."""


def percent(share: float) -> str:
    """A probability for people: whole percents, and never a certainty that the model cannot have."""
    if share < 0.01:
        return "under 1 %"
    if share > 0.99:
        return "over 99 %"
    return f"{share:.0%}".replace("%", " %")


def class_name(name: str) -> str:
    return NAMES.get(name, name)


def verdict(found: Prediction, point: OperatingPoint) -> str:
    """The sentence below the headline."""
    if found.decision in ("refused", "uncertain"):
        return found.reason
    side = "at or above" if found.decision == "cancer" else "below"
    return f"The probability of cancer is {percent(found.score)}, {side} the threshold of {percent(point.threshold)}."


def threshold_meaning(point: OperatingPoint) -> str:
    """What the threshold does, in counts of validation slices."""
    said = f"From {percent(point.threshold)} on, the model calls a slice cancer."
    counts = point.validation
    if not counts.get("cancers") or not counts.get("normals"):
        return said
    cancers, found, normals, flagged = (counts[key] for key in ("cancers", "found", "normals", "flagged"))
    return (
        f"{said} At this threshold {per_hundred(found, cancers)} of 100 cancers in the validation set were found "
        f"({found:,} of {cancers:,}), and {per_hundred(flagged, normals)} of 100 normal slices were flagged by mistake "
        f"({flagged:,} of {normals:,})."
    )


def per_hundred(part: int, whole: int) -> int:
    """Rounded, but 0 and 100 only where they are exact."""
    if part in (0, whole):
        return 100 * part // whole
    return min(99, max(1, round(100 * part / whole)))


def calibration_meaning(found: Prediction) -> str:
    some = (
        "hardly any" if found.score < 0.01 else "almost all" if found.score > 0.99 else f"about {100 * found.score:.0f}"
    )
    return f"It was calibrated on validation slices, so that of 100 slices with this probability {some} show cancer."


def possible_meaning(found: Prediction, point: OperatingPoint) -> str:
    """What the conformal set says."""
    sure = f"{point.coverage:.0%}".replace("%", " %")
    if not found.possible:
        return f"None: the score fits no class as the validation slices of that class do (coverage {sure})."
    names = " or ".join(class_name(name) for name in found.possible)
    return f"{names} (sets made this way held the truth for {sure} of each class in validation)"


def distance_meaning(found: Prediction) -> str:
    """How far the slice lies from what the model learned from."""
    if found.novelty > 1:
        return f"{found.novelty:.2f}, beyond the limit of 1.00: unlike the slices that the model learned from"
    return f"{found.novelty:.2f} of at most 1.00: like the slices that the model learned from"


def heat_meaning(found: Prediction) -> str:
    """What the coloured areas are."""
    if found.heat is None or not found.heat.any():
        return "No area of this slice speaks for cancer, so the picture beside it shows no colour."
    return (
        "Coloured areas are those whose texture speaks for cancer, from dark violet (little) to yellow (the most in "
        "this slice). The map is coarse and relative: it shows where the network looked, not where a tumour ends."
    )


def known_warning() -> str:
    return (
        "This very slice was used to train or tune the model. The answer is no evidence of how well it does on slices "
        "it has never seen."
    )


def doubts(bundle: Bundle) -> str:
    """Markdown: when not to trust the model, from its card, or else what holds for any such model."""
    said = "\n\n".join(filter(None, (findings(bundle.card), card_section(bundle.card))))
    return said or "\n".join(f"- {line}" for line in DOUBTS)


def body(card: str) -> str:
    """A model card without the YAML that model hubs read, and without its title."""
    return re.sub(r"\A\s*(---\n.*?\n---\n)?\s*(# [^\n]*\n)?", "", card, flags=re.DOTALL)


def findings(card: str) -> str:
    """What a card says in list items above its first section: what to know before anything else."""
    return "\n".join(
        line for line in re.split(r"^#", body(card), flags=re.MULTILINE)[0].splitlines() if line[:2] == "- "
    )


def card_section(card: str) -> str:
    """The sections of a model card (Markdown) whose headings match LIMITS, without the headings."""
    kept: list[str] = []
    level = 0
    for line in card.splitlines():
        heading = re.match(r"(#+)\s+(.*)", line)
        if heading and (not level or len(heading[1]) <= level):
            level = len(heading[1]) if LIMITS.search(heading[2]) else 0
        elif level:
            kept.append(line)
    return "\n".join(kept).strip()
