"""The one Jinja environment of all reports, and how they write numbers and names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from chestct.audit.findings import counted, without_examples


def as_text(value: Any, signed: bool = False) -> str:
    """What stands in a cell: `0.981`, `258.5`, `n/a (reason)`; `0.981 [0.950, 0.994]` for what has value, low, high."""
    if hasattr(value, "low"):
        low, high = as_text(value.low, signed), as_text(value.high, signed)
        ends = "" if low == "n/a" else f" [{low}, {high}]"
        return as_text(value.value, signed) + ends + (f" ({value.reason})" if value.reason else "")
    if value is None or value != value:
        return "n/a"
    if isinstance(value, float):
        return f"{value:{'+' if signed else ''}.{3 if abs(value) < 10 else 1}f}".replace("-", "\N{MINUS SIGN}")
    return str(value)


def records(rows: Any) -> list[dict[str, Any]]:
    """The rows of a table (a DataFrame, or mappings or dataclasses) as mappings."""
    rows = rows.to_dict("records") if hasattr(rows, "to_dict") else rows
    return [dict(row) if isinstance(row, Mapping) else vars(row) for row in rows]


def display_name(metric: str) -> str:
    """A metric's name for people: `auroc/large_cell` -> `AUROC, large cell`."""
    first, _, second = metric.partition("/")
    if first == "cancer":  # the reduction of subtypes to cancer and normal
        return f"{display_name(second)}, any cancer"
    name = first.upper() if first in ("auroc", "npv", "ece") else first.replace("_", " ").capitalize()
    return f"{name}, {second.replace('_', ' ')}" if second else name


def literal(value: Any) -> str:
    """Text that Markdown shows as it is, on one line: names of files and folders come from strangers."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{char}" if char in "\\`*_|" else char for char in text).replace("](", "]\\(")


ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=select_autoescape(["html.j2"]),  # Markdown goes through `literal`
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {function.__name__: function for function in (as_text, records, literal, without_examples)}
ENVIRONMENT.globals["counted"] = counted


def render(template: str, **values: Any) -> str:
    """A template with its values. File names may hold bytes that are no UTF-8; they are shown as escapes."""
    return ENVIRONMENT.get_template(template).render(**values).encode("utf-8", "backslashreplace").decode()
