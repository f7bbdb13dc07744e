"""The model card: what the model is for and not for, what it learned from, how good it is, and how sure that is.

Made from the same values as the report, so that the card in a bundle cannot say anything else.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from chestct.config.schema import classes_of
from chestct.evaluation.evaluate import Evaluation
from chestct.models.novelty import FOREIGN
from chestct.reporting.text import beside, called, cancer, counted, doubts, headline, interval, known, sections
from chestct.stats.metrics import Estimate, predictive_values


def model_card(found: Evaluation) -> str:
    """The card as Markdown, with the metadata that model hubs read at its head."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=False,  # Markdown; `literal` keeps names from being read as markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"called": called, "interval": interval, "known": known, "literal": literal}
    environment.globals |= {"cancer": cancer, "counted": counted}
    return environment.get_template("model_card.md.j2").render(
        found=found,
        cfg=found.cfg,
        about=found.about,
        point=found.point,
        sections=sections(found),
        rows=beside(found),
        headline=headline(found),
        doubts=doubts(found),
        classes=classes_of(found.cfg.task),
        splits=[name for name in ("test", "valid") if name in found.metrics],
        values=predictive(
            cancer(found.metrics["test"], "sensitivity"),
            cancer(found.metrics["test"], "specificity"),
            found.cfg.evaluation.prevalences,
        ),
        novel=int((found.test["novelty"] > 1).sum()),
        refused=int((found.test["novelty"] > FOREIGN).sum()),
        foreign=FOREIGN,
        uncertain=int((found.test["decision"] == "uncertain").sum()),
    )


def literal(value: Any) -> str:
    """Text that Markdown shows as it is, on one line: names of files and folders come from strangers."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{char}" if char in "\\`*_[]|" else char for char in text)


def predictive(sensitivity: Estimate, specificity: Estimate, prevalences: Sequence[float]) -> list[dict[str, Any]]:
    """PPV and NPV at each prevalence, as Estimates: `prevalence`, `ppv`, `npv`; none where a class is missing.

    Both rise with sensitivity and with specificity: low and high are what both lower, both upper ends would give.
    """
    rates = [(rate.value, rate.low, rate.high) for rate in (sensitivity, specificity)]
    ends = [(a, b) for a, b in zip(*rates, strict=True) if a is not None and b is not None]
    if len(ends) < 3:
        return []
    at = [predictive_values(a, b, prevalences) for a, b in ends]

    def estimate(p: float, name: str) -> Estimate:
        value, low, high = (values[p][name] for values in at)
        return Estimate(value, low, high, 0, 0, "" if value is not None else "nothing is called so")

    return [{"prevalence": p, "ppv": estimate(p, "ppv"), "npv": estimate(p, "npv")} for p in prevalences]
