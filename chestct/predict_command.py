"""chestct predict: answers for files and folders, as a table. Options only; chestct.serving.batch does it."""

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from chestct.errors import Interrupted
from chestct.imaging.slice_files import describe_skipped
from chestct.program import errors_for_people, terminate

if TYPE_CHECKING:
    from chestct.serving.batch import Summary

EPILOG = """
The table has one row a slice: path, frame, score (calibrated P(cancer)), decision (cancer, normal, uncertain, refused,
or unreadable for a file), reason, possible (classes that cannot be excluded), a probability for each class, novelty
(distance to the training data; beyond 1 unfamiliar), known (the slice was in the training data), bundle, file_hash,
frames, overlay. The same command again goes on where the last one ended, and reads only what changed.

Exit status: 0 every file scored, 1 some files unreadable, 2 nothing scored, 130 interrupted.
"""


def main(argv: list[str]) -> int:
    """The program; returns its exit status, or exits with 2 after an error, 130 where it was interrupted."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, terminate)
    began = time.perf_counter()
    skipped: list[tuple[str, str]] = []
    with errors_for_people():
        try:
            summary = _predict(arguments, skipped)
        except (KeyboardInterrupt, Interrupted):
            raise Interrupted(f"Interrupted. The same command goes on from {arguments.out}.partial.") from None
        print(_sentences(summary, arguments.out, time.perf_counter() - began))
        if skipped:
            print(f"{describe_skipped(skipped)}.")
    return 2 if not summary.scored else 1 if summary.unreadable else 0


def _predict(arguments: argparse.Namespace, skipped: list[tuple[str, str]]) -> "Summary":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from chestct.serving.batch import find_files, predict_files  # torch takes a second: not before --help

    left_out = [arguments.out, *([arguments.overlays] if arguments.overlays else [])]
    paths = find_files(arguments.sources, left_out, skipped)
    console = Console(stderr=True)
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*shown, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("files", total=len(paths))
        return predict_files(
            paths,
            arguments.out,
            bundle=_bundle(arguments),
            overlays=arguments.overlays,
            every=arguments.every,
            advance=lambda: progress.advance(task),
        )


def _bundle(arguments: argparse.Namespace) -> str:
    """The bundle's folder; MLflow, which takes seconds to import, only for a name in it."""
    name = str(arguments.bundle)
    if not name.startswith(("models:/", "runs:/")):
        return name
    from chestct.config.compose import compose
    from chestct.tracking import fetch_bundle

    return fetch_bundle(name, compose(*([f"tracking.uri={arguments.tracking_uri}"] if arguments.tracking_uri else [])))


def _sentences(summary: "Summary", out: Path, seconds: float) -> str:
    from chestct.serving.predictor import NOT_MEDICAL

    decisions = ("cancer", "normal", "uncertain", "refused")
    counts = ", ".join(f"{summary.decisions[name]:,} {name}" for name in decisions if summary.decisions[name])
    files = _several(summary.files, "file")
    sentences = [
        f"{_several(summary.scored, 'slice')} of {files} scored by bundle {summary.bundle} in {seconds:,.0f} s"
    ]
    sentences[0] += f": {counts}." if counts else "."
    if summary.unreadable:
        sentences.append(f"{_several(summary.unreadable, 'file')} could not be read; the table says why.")
    if summary.reused:
        sentences.append(f"{_several(summary.reused, 'file')} had been scored before and did not change.")
    if summary.known:
        slices = f"{summary.known:,} slice was" if summary.known == 1 else f"{summary.known:,} slices were"
        sentences.append(f"{slices} in the model's training data; there a score says little about the model.")
    return " ".join([*sentences, f"Table: {out}"]) + f"\n{NOT_MEDICAL}"


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chestct predict",
        description="Scores chest CT slices (PNG, JPEG, TIFF, BMP, WebP, DICOM) into a table. Research use only.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="PATH", help="files, and folders to look through")
    parser.add_argument(
        "--bundle",
        default="packaged",
        help="folder, models:/NAME@champion or runs:/ID; `packaged` (default): the one in the package",
    )
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow store or server that knows such a name")
    parser.add_argument("--out", type=Path, default=Path("scores.csv"), metavar="CSV", help="the table (scores.csv)")
    parser.add_argument("--overlays", type=Path, metavar="DIR", help="also draw each slice with its heat, as PNG")
    parser.add_argument("--every", action="store_true", help="every frame or page of a file, not one a file")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
