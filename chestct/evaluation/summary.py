"""The few lines that a person reads after a run: what was scored, how well, and what the numbers do not say."""

from typing import Any

SHOWN = ("auroc", "average_precision", "accuracy", "balanced_accuracy", "recall", "specificity", "log_loss")


def summary(metrics: dict[str, Any]) -> str:
    """A table of the metrics that `chestct.evaluation.evaluate.write_report` returns, with its caveats above it."""
    about = metrics["about"]
    splits = [name for name in metrics if name != "about"]
    lines = [f"{'':18}" + "".join(f"{split:>10}" for split in splits)]
    for name in SHOWN:
        if any(name in metrics[split] for split in splits):
            lines.append(f"{name:18}" + "".join(f"{_text(metrics[split].get(name)):>10}" for split in splits))
    for name in ("slices", "groups"):
        lines.append(f"{name:18}" + "".join(f"{metrics[split][name]:>10}" for split in splits))
    return "\n".join([*caveats(about), "", *lines])


def caveats(about: dict[str, Any]) -> list[str]:
    """What has to be said before any number of this run."""
    found = []
    if about["synthetic"]:
        found.append("SYNTHETIC: trained and tested on phantoms; these numbers say nothing about patients.")
    if about["leaked"]:
        found.append(
            f"LEAKY SPLIT ({about['split']}): {about['leaked']} of the slices below have copies in an earlier split; "
            "these numbers are too good."
        )
    return found


def _text(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
