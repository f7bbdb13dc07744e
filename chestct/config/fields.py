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
    choices: tuple[Any, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
) -> Any:
    """A dataclass field with its meaning and its bounds, which `check` enforces (both bounds are allowed values)."""
    meta = {"help": help, "choices": choices, "low": low, "high": high}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


def leaves(cfg: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """Every setting of a dataclass (or class) as (dotted key, value or default, field), groups opened."""
    for item in dataclasses.fields(cfg):
        key = f"{prefix}{item.name}"
        if isinstance(cfg, type):
            default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        else:
            default = getattr(cfg, item.name)
        if dataclasses.is_dataclass(default):
            yield from leaves(default, f"{key}.")
        else:
            yield key, default, item


def type_name(item: dataclasses.Field) -> str:
    """The type of a setting as it is written in the schema, for example `str | None`."""
    return item.type.__name__ if type(item.type) is type else str(item.type)


def at_home(path: str) -> Path:
    """A path of the settings, seen from the repository.

    DVC runs queued experiments in copies of the repository that it removes afterwards; DVC_ROOT names the original.
    """
    return Path(os.environ.get("DVC_ROOT", ""), path)
