"""Scores folders of slices into a table: `chestct predict`.

A few files are read and decoded ahead while the network works, and answers are written in order as they come, so that
memory does not grow with the number of files and a killed run loses seconds. A file whose bytes are in the table with
this bundle's answer is not predicted again.
"""

import itertools
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from chestct.errors import DataError, DecodeError
from chestct.files import digest, write_atomic
from chestct.imaging.decode import read
from chestct.imaging.slice_files import describe_skipped, walk
from chestct.models.device import pick_device
from chestct.serving.pictures import overlay
from chestct.serving.predictor import Prediction, Predictor
from chestct.serving.table import UNREADABLE, Row, Table, TableError, columns

AHEAD = 6
"""Files read, decoded and predicted at once: enough for shared forward passes, few enough to hold in memory."""

PATIENCE = 24 * 3600.0
"""Seconds that a slice may wait for the network: here nobody waits but the program itself."""


@dataclass
class Summary:
    """What became of the files."""

    bundle: str
    files: int
    reused: int = 0  # files whose rows an earlier run had made
    known: int = 0  # slices that were in train or valid
    decisions: Counter[str] = field(default_factory=Counter)  # of slices; `unreadable` counts files

    def add(self, rows: Iterable[Mapping[str, object]], reused: bool) -> None:
        """Counts the rows of one file."""
        self.reused += reused
        for row in rows:
            self.decisions[str(row["decision"])] += 1
            self.known += str(row.get("known")) == "True"

    @property
    def scored(self) -> int:
        """Slices with a score."""
        return self.decisions.total() - self.unreadable

    @property
    def unreadable(self) -> int:
        """Files without a score."""
        return self.decisions[UNREADABLE]


def find_files(
    sources: list[Path], left_out: Iterable[Path] = (), skipped: list[tuple[str, str]] | None = None
) -> list[Path]:
    """The files given and those in the folders given, each folder's sorted, none twice.

    What a file is, its content says; what is skipped by its name (see `slice_files`) is appended to `skipped` with the
    reason. A folder that cannot be listed stands for itself, so that the table tells of it. left_out: files and folders
    that the program itself writes. Raises DataError where something given is not there, or where there is no file.
    """
    if missing := next((source for source in sources if not os.path.lexists(source)), None):
        raise DataError(f"No such file or folder: {missing}.")
    absolute = [os.path.abspath(path) for path in left_out]  # noqa: PTH100  Path.resolve would follow links
    own = {*absolute, *(f"{path}.partial" for path in absolute)}
    skipped = [] if skipped is None else skipped
    paths = list(dict.fromkeys(path for source in sources for path in _below(source, own, skipped)))
    if not paths:
        names = f" {describe_skipped(skipped)}." if skipped else ""
        raise DataError(f"No files in {', '.join(map(str, sources))}.{names} Give slices, or folders that hold some.")
    return paths


def _below(source: Path, own: set[str], skipped: list[tuple[str, str]]) -> Iterator[Path]:
    if not source.is_dir():
        yield source
        return
    closed: list[Path] = []
    for path, reason in walk(source, lambda error: closed.append(Path(error.filename)), own):
        yield from closed
        closed.clear()
        if reason:
            skipped.append((str(path), reason))
        else:
            yield path
    yield from closed


def predict_files(
    paths: list[Path],
    out: Path,
    *,
    bundle: str | Path = "packaged",
    overlays: Path | None = None,
    every: bool = False,
    advance: Callable[[], object] = lambda: None,
) -> Summary:
    """Writes the answers for `paths` to the CSV `out`, one row a slice and one for each unreadable file.

    overlays: folder for a picture of each slice with its heat; every: a row for each frame or page of a file; advance:
    called after each file. Raises BundleError, and TableError where `out` cannot be written.
    """
    if overlays is not None:
        try:
            overlays.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TableError(f"Cannot make the folder {overlays} for overlays: {error.strerror}.") from None
    predictor = Predictor(bundle, batch=AHEAD, seconds=PATIENCE)
    predictor.bundle.net.to(pick_device())
    wanted = _Request(predictor, overlays, every)
    summary = Summary(bundle=predictor.bundle.id, files=len(paths))
    pool = ThreadPoolExecutor(AHEAD, "batch")
    ahead: deque[tuple[Path, list[dict[str, str]], Future[list[Row] | None]]] = deque()
    waiting = iter(paths)
    try:
        with Table(out, columns(predictor.bundle.classes)) as table:
            while True:
                for path in itertools.islice(waiting, AHEAD - len(ahead)):
                    old = table.rows(str(path))
                    ahead.append((path, old, pool.submit(_answer, wanted, path, old)))
                if not ahead:
                    break
                path, old, answer = ahead.popleft()
                rows = answer.result()
                if rows is not None:
                    table.put(str(path), rows)
                summary.add(old if rows is None else rows, reused=rows is None)
                advance()
            table.finish(map(str, paths))
    finally:
        pool.shutdown(cancel_futures=True)
        predictor.close()
    return summary


@dataclass(frozen=True)
class _Request:
    """What is wanted of every file."""

    predictor: Predictor
    overlays: Path | None
    every: bool

    def holds(self, rows: list[dict[str, str]], file_hash: str) -> bool:
        """Whether rows of an earlier run are this bundle's answer to the same bytes, and as much as is wanted now."""
        return (
            bool(rows)
            and all(row["file_hash"] == file_hash and row["bundle"] == self.predictor.bundle.id for row in rows)
            and rows[0]["decision"] != UNREADABLE  # cheap to try again, and perhaps this version can read it
            and rows[0]["frames"] == (str(len(rows)) if self.every else "")
            and (
                not self.overlays or all(row["overlay"] and (self.overlays / row["overlay"]).is_file() for row in rows)
            )
        )


def _answer(wanted: _Request, path: Path, old: list[dict[str, str]]) -> list[Row] | None:
    """The new rows of a file; None where the old ones hold."""
    file_hash = ""
    try:
        data = read(path, wanted.predictor.limits)
        file_hash = digest(data)
        if wanted.holds(old, file_hash):
            return None
        predictor, explain = wanted.predictor, wanted.overlays is not None
        with predictor.room(data, every=wanted.every):
            if not wanted.every:
                return [_row(wanted, path, predictor.predict(data, name=str(path), explain=explain), file_hash)]
            answers = predictor.predict_frames(data, name=str(path), explain=explain)
            rows = [_row(wanted, path, prediction, file_hash) for prediction in answers]
        return [row | {"frames": len(rows)} for row in rows]
    except DecodeError as error:
        bundle = wanted.predictor.bundle.id
        unreadable = {"decision": UNREADABLE, "reason": error.reason, "bundle": bundle, "file_hash": file_hash}
        return [{"path": str(path), **unreadable}]


def _row(wanted: _Request, path: Path, prediction: Prediction, file_hash: str) -> Row:
    """The row of a slice, whose overlay is on the disk by then."""
    overlay = ""
    if wanted.overlays is not None:
        overlay = overlay_name(path, f"{file_hash} {prediction.slice.frame} {prediction.bundle}")
        _save_overlay(prediction, wanted.overlays / overlay)
    row: Row = {
        "path": str(path),
        "frame": prediction.slice.frame,
        "score": _short(prediction.score),
        "decision": prediction.decision,
        "reason": prediction.reason,
        "possible": " ".join(prediction.possible),
        "novelty": _short(prediction.novelty),
        "known": prediction.known,
        "bundle": prediction.bundle,
        "file_hash": file_hash,
        "frames": "",
        "overlay": overlay,
    }
    return row | {f"probability_{name}": _short(value) for name, value in prediction.probabilities.items()}


def _short(value: float) -> float:
    """Six digits: more would be noise of the processor's arithmetic."""
    return float(f"{value:.6g}")


def overlay_name(path: Path, answer: str) -> str:
    """A file name that says which slice it shows, fits every file system and stands for this answer alone."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", str(path)).strip("._-")[-80:]
    return f"{readable}-{digest(f'{path} {answer}'.encode('utf-8', 'surrogateescape'))[:16]}.png".lstrip("._-")


def _save_overlay(prediction: Prediction, path: Path) -> None:
    try:
        write_atomic(path, overlay(prediction))
    except OSError as error:
        raise TableError(f"Cannot write {path}: {error.strerror or error}. Free space there.") from None
