"""Parts that users bring: `_target_` names a class or a function, and the keys next to it are its arguments.

Who types a command or writes a file in conf/ may name anything. A checkpoint or a bundle may come from anywhere, so its
settings may only name networks, optimisers and schedules of the libraries below: whatever else Python can reach by a
dotted name, os.system among it, is refused. `trust` on the command line adds packages. Callbacks, loggers and profilers
write to paths and talk to servers that their arguments name, so they are never taken from a file.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from chestct.errors import ConfigError

TRUSTED = ("torch.nn", "torch.optim", "torchvision.models", "chestct.models.head")
"""Packages whose classes a file may name."""

T = TypeVar("T")


def build(spec: dict[str, Any], kind: type[T], setting: str, *args: Any, **kwargs: Any) -> T:
    """What `spec` names, made with its arguments and those that are given here.

    setting: the key of `spec`, for messages; kwargs: left out where `spec` has them, or what it names does not take
    them. Raises ConfigError where it is not a `kind`, or cannot be found or made.
    """
    from hydra.utils import instantiate

    if not isinstance(spec, dict) or "_target_" not in spec:
        raise ConfigError(f"{setting} names no class: give {setting}._target_=PACKAGE.CLASS, see docs/extend.md.")
    wrong_kind = f"{setting}._target_={spec['_target_']} is no {kind.__module__}.{kind.__name__}."
    try:
        # Partial, because Hydra would copy tensors that it is given.
        factory = instantiate({**spec, "_partial_": True, "_convert_": "all"})
        if isinstance(factory.func, type) and not issubclass(factory.func, kind):
            raise ConfigError(wrong_kind)  # before it is made, which may open files
        parameters = inspect.signature(factory.func).parameters
        more = {k: value for k, value in kwargs.items() if k in parameters and k not in factory.keywords}
        instance = factory(*args, **more)
    except ConfigError:
        raise
    except Exception as error:  # whatever the class of a user raises
        raise ConfigError(f"{setting}._target_={spec['_target_']} cannot be made: {_reason(error)}") from error
    if not isinstance(instance, kind):
        raise ConfigError(wrong_kind)
    return instance


def _reason(error: Exception) -> str:
    """Why something cannot be made, in a line; and Hydra's question where it cannot import it."""
    from hydra.errors import InstantiationException

    reason, cause = " ".join(str(error).split()) or type(error).__name__, error.__cause__
    if not isinstance(error, InstantiationException) or cause is None:
        return reason
    question = str(cause).splitlines()[-1]
    while cause.__cause__:
        cause = cause.__cause__
    own = " A file of your own is found in the working directory with PYTHONPATH=. before the command."
    return f"{cause}. {question}{own * question.endswith('is installed?')}"


def check_trusted(settings: Any, source: str, trust: Sequence[str] = ()) -> None:
    """Raises ConfigError where the settings in a file name code that a file may not choose, or hold an expression.

    source: the file, for the message; trust: packages that are trusted besides. An expression would read this
    machine's environment, or make settings anew (`oc.create`) after all checks.
    """
    for key, value in _items(settings):
        if "${" in key or (isinstance(value, str) and "${" in value):
            raise ConfigError(f"{source} sets {key}={value!r}: an expression, which files may not hold.")
    for target in foreign(settings, trust):
        package = str(target).split(".", 1)[0]
        raise ConfigError(
            f"{source} names code to run, {target}, which is no network, optimiser or schedule of "
            f"{', '.join(TRUSTED)}. If you know the file and that code, say 'trust=[{package}]'."
        )


def foreign(settings: Any, trust: Sequence[str] = ()) -> list[Any]:
    """What settings name with `_target_` that a file may not choose.

    Callbacks, loggers and trainer.args in a run's settings are left out: no file decides them, so they may be anything.
    """
    if isinstance(settings, dict) and "_target_" not in settings:  # a part's own arguments may be called the same
        settings = {key: value for key, value in settings.items() if key not in ("callbacks", "loggers")}
        if isinstance(trainer := settings.get("trainer"), dict):
            settings["trainer"] = {key: value for key, value in trainer.items() if key != "args"}
    targets = [value for key, value in _items(settings) if key.rpartition(".")[2] == "_target_"]
    return [target for target in targets if not _trusted(target, trust)]


def _items(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested tables and lists, with its dotted key."""
    yield key, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, item in items:
        yield from _items(item, f"{key}.{name}".lstrip("."))


def _trusted(target: Any, trust: Sequence[str]) -> bool:
    """Whether a name leads to a network, optimiser or schedule of TRUSTED, or to anything of `trust`.

    Not the name counts, but where the class comes from: torch.nn.modules.module.OrderedDict is collections'.
    """
    from hydra.utils import get_object
    from torch import nn, optim

    if not isinstance(target, str) or not _within(target, (*TRUSTED, *trust)):
        return False
    try:
        named = get_object(target)
    except Exception:
        return False
    kinds = (nn.Module, optim.Optimizer, optim.lr_scheduler.LRScheduler)
    origin = f"{getattr(named, '__module__', '')}."
    if _within(origin, trust):
        return True
    return _within(origin, TRUSTED) and isinstance(named, type) and issubclass(named, kinds)


def _within(name: str, packages: Sequence[str]) -> bool:
    return name.startswith(tuple(f"{package}." for package in packages))
