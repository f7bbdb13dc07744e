"""The one Jinja environment of all reports, and how they write numbers, intervals and names.

Loads neither pandas nor scikit-learn: the serving image, which has neither, writes drift reports with it.
"""

import base64
import io
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from PIL import Image

if TYPE_CHECKING:
    from chestct.stats.metrics import Estimate

METRICS = {
    "auroc": "AUROC",
    "precision": "Precision (PPV)",
    "npv": "NPV",
    "mcc": "MCC",
    "brier": "Brier score",
    "ece": "Calibration error (ECE)",
}
"""Metrics whose names for people are not simply their keys with spaces."""


def format_number(value: float | None, signed: bool = False) -> str:
    """A number with three decimals; None is n/a."""
    return "n/a" if value is None else f"{value:{'+' if signed else ''}.3f}".replace("-", "\N{MINUS SIGN}")


def interval(estimate: "Estimate", signed: bool = False) -> str:
    """`0.981 [0.950, 0.994]`; what is undefined is n/a, and `reason` of the estimate says why."""
    value = format_number(estimate.value, signed)
    if estimate.value is None:
        return value
    if estimate.low is None:
        return f"{value} [n/a]"
    return f"{value} [{format_number(estimate.low, signed)}, {format_number(estimate.high, signed)}]"


def counted(number: int, one: str) -> str:
    """`1 slice`, `2 slices`."""
    return f"{number:,} {one if number == 1 else one + 's'}"


def display_name(metric: str) -> str:
    """A metric's name for people: `auroc/large_cell` -> `AUROC, large cell`."""
    first, _, second = metric.partition("/")
    if first == "cancer":  # the reduction of subtypes to cancer and normal
        return f"{display_name(second)}, any cancer"
    words = re.sub(r"_at_(\d+)_", r" at \1 % ", first).replace("_", " ")
    name = METRICS.get(first, words[0].upper() + words[1:])
    return f"{name}, {second.replace('_', ' ')}" if second else name


def literal(value: Any) -> str:
    """Text that Markdown shows as it is, on one line: names of files and folders come from strangers."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{char}" if char in "\\`*_[]|" else char for char in text)


def breakable(path: str) -> Markup:
    """A path that may break after each folder and underscore."""
    return Markup(re.sub(r"([/_])", r"\1<wbr>", str(escape(path))))


def jpeg(pixels: np.ndarray, side: int) -> str:
    """Pixels uint8 [S, S] or [S, S, 3] as a JPEG of `side` pixels, in a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=82)
    return data_uri(buffer.getvalue(), "image/jpeg")


def data_uri(content: bytes, kind: str) -> str:
    """A file that stands in the page itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@cache
def environment() -> Environment:
    """Every template of the package, strict about names; HTML is escaped, Markdown goes through `literal`."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for filter_ in (format_number, interval, display_name, literal, breakable):
        made.filters[filter_.__name__] = filter_
    made.globals["counted"] = counted
    return made


def render(template: str, **values: Any) -> str:
    """A template with its values. File names may hold bytes that are no UTF-8; they are shown as escapes."""
    return environment().get_template(template).render(**values).encode("utf-8", "backslashreplace").decode()
