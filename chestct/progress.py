"""What a long phase shows: a bar on a terminal, one line anywhere else (a log, a pipe, a notebook)."""

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def steps(items: Iterable[T], text: str, total: int, show: bool = True) -> Iterable[T]:
    """The items, with what comes of them shown; `total` is how many they are. Nothing is shown where there are none."""
    if total and show and sys.stdout.isatty():
        from rich.progress import track  # only where it is seen

        return track(items, text, total)
    phase(f"{text} ({total})", show=bool(total) and show)
    return items


def phase(text: str, show: bool = True) -> None:
    """A line for a phase without a bar of its own, where no bar of another would tell of it."""
    if show and not sys.stdout.isatty():
        print(text, flush=True)
