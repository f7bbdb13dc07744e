"""What bundle.json must hold, checked before anything in it is used.

The limits of settings are those of the configuration's schema; what only describes the bundle (metrics, reliability)
is checked as well, because the page shows it. Written out here since a JSON schema library would be a dependency of
serving for the sake of this one file.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, fields
from typing import Any

from chestct.config.schema import DataConfig, ModelConfig, WindowConfig, classes_of


@dataclass(frozen=True)
class Number:
    """A finite number, or with `whole` an integer; both bounds are allowed values."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False


@dataclass(frozen=True)
class Many:
    """A list whose items all follow `item`."""

    item: Any
    least: int = 0
    most: float = math.inf


@dataclass(frozen=True)
class Maybe:
    """`item`, or null."""

    item: Any


def _setting(field: Field) -> Any:
    """The rule for a setting of the configuration."""
    meta, default = field.metadata, field.default
    if meta["choices"]:
        return meta["choices"]
    if isinstance(default, bool):
        return bool
    return Number(meta["low"], meta["high"], whole=isinstance(default, int))


DATA, MODEL = ({field.name: field for field in fields(cls)} for cls in (DataConfig, ModelConfig))
COUNT, SHARE, HASH = Number(0, whole=True), Number(0, 1), str
ESTIMATE = {"value": Maybe(Number()), "low": Maybe(Number()), "high": Maybe(Number()), "slices": COUNT, "*": object}

# A tuple lists choices; a dict names the keys, of which those with "?" may be absent; "*" is the rule for all others.
RULES: dict[str, Any] = {
    "task": ("binary", "subtype"),
    "classes": Many(str),
    "model": {
        "pool": _setting(MODEL["pool"]),
        "hidden": Many(Number(1, 65536, whole=True), most=16),
        "dropout": _setting(MODEL["dropout"]),
        "trained_convolutions": bool,
        "backbone?": str,
        "head?": {"*": object},  # a head of the user's own, whose class check_trusted allows or not
    },
    "preprocess": {
        "size": _setting(DATA["size"]),
        "fit": _setting(DATA["fit"]),
        "contrast?": _setting(DATA["contrast"]),
    },
    "window": {field.name: _setting(field) for field in fields(WindowConfig)},
    "weights": {"packaged": bool, "mean": Many(Number(), 3, 3), "scale": Many(Number(), 3, 3), "digest": HASH},
    "operating_point": {
        "calibration": {"scale": Number(0), "shift": Number()},
        "threshold": Number(0, 1.001),  # one that calls nothing cancer lies above 1
        "policy": str,
        "coverage": SHARE,
        "quantiles": Many(SHARE),
        "validation": {"cancers": COUNT, "found": COUNT, "normals": COUNT, "flagged": COUNT},
    },
    "files": {"model.safetensors": HASH, "MODEL_CARD.md": HASH},
    "data": {"seen": Many(str), "data_hash?": HASH, "slices?": {"*": COUNT}, "*": object},
    "statistics?": {"*": Many(Number(), 2)},
    "metrics?": {"*": {"*": ESTIMATE}},
    "reliability?": {"*": Many({"score": SHARE, "observed": SHARE, "n": COUNT, "low": SHARE, "high": SHARE})},
    "*": object,
}


def check_facts(facts: Any) -> None:
    """Raises ValueError, naming the key, where the contents of bundle.json (without its digest) break a rule."""
    for problem in _problems(facts, RULES, ""):
        raise ValueError(problem)
    classes, quantiles = facts["classes"], facts["operating_point"]["quantiles"]
    if tuple(classes) != classes_of(facts["task"]):
        raise ValueError(f"classes={classes} are not those of task={facts['task']}")
    if len(quantiles) != len(classes):
        raise ValueError(f"operating_point.quantiles has {len(quantiles)} values for {len(classes)} classes")


def _problems(value: Any, rule: Any, key: str) -> Iterator[str]:
    """What is wrong with a value, the first thing first."""
    if isinstance(rule, Maybe):
        if value is not None:
            yield from _problems(value, rule.item, key)
    elif isinstance(rule, Mapping):
        yield from _in_mapping(value, rule, key)
    elif isinstance(rule, Many):
        if not isinstance(value, list):
            yield f"{key} is {_shown(value)}, not a list"
        elif not rule.least <= len(value) <= rule.most:
            yield f"{key} has {len(value)} values, not {rule.least} to {rule.most}"
        else:
            for i, item in enumerate(value):
                yield from _problems(item, rule.item, f"{key}[{i}]")
    elif isinstance(rule, tuple):
        if value not in rule:
            yield f"{key} is {_shown(value)}, not one of {', '.join(rule)}"
    elif isinstance(rule, Number):
        kinds = int if rule.whole else int | float
        if not isinstance(value, kinds) or isinstance(value, bool):
            yield f"{key} is {_shown(value)}, not {'a whole' if rule.whole else 'a'} number"
        elif not rule.low <= value <= rule.high:
            yield f"{key} is {value}, out of range: {rule.low} to {rule.high}"
    elif not isinstance(value, rule):
        yield f"{key} is {_shown(value)}, not {'true or false' if rule is bool else 'text'}"


def _in_mapping(value: Any, rules: Mapping[str, Any], key: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{key or 'the file'} is {_shown(value)}, not an object"
        return
    prefix = f"{key}." if key else ""
    known = {name.removesuffix("?"): rule for name, rule in rules.items() if name != "*"}
    for name in rules:
        if name != "*" and not name.endswith("?") and name not in value:
            yield f"{prefix}{name} is missing"
    for name, item in value.items():
        if name in known or "*" in rules:
            yield from _problems(item, known.get(name, rules.get("*")), f"{prefix}{name}")
        else:
            yield f"{prefix}{name} is unknown"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
