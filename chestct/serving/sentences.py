"""The words of the page, in sentences that need no statistics: every number comes from the bundle or the answer.

Everything is Markdown. What a file or a bundle from elsewhere could have written passes `plain`, except the model card,
which is Markdown itself; Gradio shows it without its HTML.
"""

import re

from chestct.models.bundle import Bundle
from chestct.serving.prediction import NOT_MEDICAL, Prediction

NOTICE = "**{}.** {}".format(*NOT_MEDICAL.split(". ", 1))

HEADLINES = {
    "cancer": "Possible cancer",
    "normal": "No sign of cancer",
    "uncertain": "The model cannot tell",
    "refused": "No answer for this image",
    "unreadable": "This file was not read",
}
"""The decision in a few words; a score is never called a probability, since calibration does not travel."""

KNOWN_WARNING = (
    "**This very slice was used to train or tune the model.** The answer is no evidence of how well it does on slices "
    "it has never seen."
)

HEAT = (
    "Coloured areas are those whose texture speaks for cancer, from dark violet (little) to yellow (the most in this "
    "slice). The map is coarse and relative: it shows where the network looked, not where a tumour ends."
)


def plain(text: str) -> str:
    """Text as Markdown that shows exactly it: neither markup nor HTML."""
    return re.sub(r"([\\`*_{}\[\]()<>#+.!|~&$:-])", r"\\\1", " ".join(text.split()))


def percent(share: float) -> str:
    """A probability for people: whole percents, and never a certainty that the model cannot have."""
    if share < 0.01:
        return "under 1 %"
    return "over 99 %" if share > 0.99 else f"{100 * share:.0f} %"


def capped(share: float) -> float:
    """A score for people, in words and as a bar: never 0 or 1, since no model is certain."""
    return min(0.99, max(0.01, share))


def of_100(share: float, digits: int = 0) -> str:
    """A score in [0, 1] as points out of 100, such as `56`."""
    return f"{100 * capped(share):.{digits}f}"


def verdict(prediction: Prediction, bundle: Bundle) -> str:
    """What stands below the headline: score and threshold, or the reason of another decision; what both are worth."""
    if prediction.decision == "refused":
        return plain(prediction.reason)
    point, counts = bundle.point, bundle.point.validation
    lines = [plain(prediction.reason)]
    if prediction.decision != "uncertain":
        side = "at or above" if prediction.decision == "cancer" else "below"
        digits = 2 if of_100(prediction.score) == of_100(point.threshold) else 0  # 56, below the threshold of 56?
        score, threshold = (of_100(share, digits) for share in (prediction.score, point.threshold))
        lines = [f"The score is **{score}** of 100, {side} the threshold of {threshold}."]
    if bundle.elsewhere:
        lines.append(bundle.elsewhere)
    elif counts.get("cancers") and counts.get("normals"):
        lines.append(
            f"At this threshold {counts['found']:,} of {counts['cancers']:,} cancers in the validation set were "
            f"found, and {counts['flagged']:,} of {counts['normals']:,} normal slices were flagged by mistake. How it "
            "does in other collections is not known."
        )
    return "\n\n".join([*lines, KNOWN_WARNING] if prediction.known else lines)


def explanation(prediction: Prediction, bundle: Bundle) -> str:
    """Why this answer, as a list; of a refused image the score, behind its warning."""
    side = "beyond the limit of 1.00: un" if prediction.novelty > 1 else "of at most 1.00: "
    distance = f"{prediction.novelty:.2f}, {side}like the slices that the model learned from"
    if prediction.decision == "refused":
        return (
            "**This score means nothing reliable.** The model gives a number for any picture, a photograph of a cat "
            "included. This image was refused because it is not what the model was made for.\n\n"
            f"Score: {of_100(prediction.score)} of 100. Distance to the training slices: {distance}."
        )
    coverage = f"{100 * bundle.point.coverage:.0f} %"
    lines = {"The score": "It ranks slices. How probable cancer is at a given score differs between hospitals."}
    if len(bundle.classes) > 2:
        kinds = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
        lines["Which kind"] = plain(", ".join(f"{kind} {percent(share)}" for kind, share in kinds).replace("_", " "))
    names = plain(" or ".join(prediction.possible).replace("_", " ")) or "none"
    lines["Answers that cannot be excluded"] = f"{names} (such sets held the truth for {coverage} in validation)"
    lines["Distance to the training slices"] = distance
    if prediction.decision == "normal":
        lines["Colours"] = "none: they are relative to the slice, and here the brightest spot would mean nothing"
    lines["Answered by"] = f"bundle `{prediction.bundle}`"
    return "\n".join(f"- **{name}**: {text}" for name, text in lines.items())


def card_body(card: str) -> str:
    """A model card without the YAML that model hubs read, and without its title."""
    return re.sub(r"\A\s*(---\n.*?\n---\n)?\s*(# [^\n]*\n)?", "", card, flags=re.DOTALL)


def caveats(card: str) -> str:
    """When not to trust the model: the list above its card's first section, and the section on limits."""
    findings = re.findall(r"^- .*$", re.split(r"^#", card_body(card), maxsplit=1, flags=re.MULTILINE)[0], re.MULTILINE)
    limits = re.search(r"^## Limit\w*\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    return "\n\n".join(["\n".join(findings), limits[1].strip() if limits else "", NOT_MEDICAL]).strip()
