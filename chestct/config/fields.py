"""What a setting is: a dataclass field with its meaning and its bounds; and how settings are listed."""

import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
    form: str = "",
) -> Any:
    """A dataclass field with its meaning, and what `check` enforces for the value, or for each item of a list or table.

    low, high: allowed values, too; form: a regular expression that the whole text matches.
    """
    meta = {"help": help, "choices": choices, "low": low, "high": high, "form": form}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


def leaves(cfg: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """Every setting of a dataclass (or class, with its defaults) as (dotted key, value, field), groups opened."""
    cfg = cfg() if isinstance(cfg, type) else cfg
    for item in dataclasses.fields(cfg):
        value = getattr(cfg, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item


def type_name(item: dataclasses.Field) -> str:
    """The type of a setting as it is written in the schema, for example `str | None`."""
    return item.type.__name__ if type(item.type) is type else str(item.type)


def at_home(path: str) -> Path:
    """A path of the settings, seen from the repository.

    DVC runs queued experiments in copies of the repository that it removes afterwards; DVC_ROOT names the original.
    """
    return Path(os.environ.get("DVC_ROOT", ""), path)
