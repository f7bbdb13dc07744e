"""Scores files, folders, zip archives and volumes into a table of slices, and of scans: `chestct predict`.

Rows are appended to OUT.partial as answers come, and become OUT, in order, when all are there. A row that this bundle
made of the same bytes, in either of the two, is kept: a killed run loses seconds. Names and reasons come from
strangers: a cell can neither break a line nor start a formula.
"""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from chestct.errors import ChestCTError, ConfigError, DataError, DecodeError
from chestct.files import digest, write_atomic
from chestct.imaging.decode import read
from chestct.imaging.slice_files import BadArchive, File, describe_skipped, entries, walk
from chestct.progress import steps
from chestct.serving.prediction import NOT_MEDICAL, Prediction
from chestct.serving.predictor import Predictor
from chestct.serving.scan import Row, in_order, place_of

THREADS = 6
"""Files read, decoded and predicted at once: enough to keep the network busy, few enough to hold in memory."""

FIRST, LAST = (
    ["path", "frame", "score", "decision", "reason", "possible"],
    ["novelty", "known", "bundle", "format", "file_hash", "frames", "series", "position"],
)

MAX_ENTRIES, MAX_INFLATED = 50_000, 20_000_000_000
"""Files in a zip archive, and the bytes that all of them together announce, beyond which it is not opened."""


def find_files(sources: list[Path], out: Path) -> tuple[list[File], list[tuple[str, str]]]:
    """The files given and those in folders and zip archives, none twice; and (name, reason) of each that was skipped.

    out: the table, which is no slice. Raises ConfigError where it names a folder or a device, DataError where something
    given is not there or a bad archive, or where there is no file.
    """
    if out.exists() and not out.is_file():
        raise ConfigError(f"--out {out} is no regular file. Give another name.")
    own = {os.path.abspath(part) for part in (out, f"{out}.partial", out.with_suffix(".scans.json"))}  # noqa: PTH100  Path.resolve would follow links
    paths: dict[Path, None] = {}
    skipped: list[tuple[str, str]] = []
    for source in sources:
        try:
            source.lstat()
        except (FileNotFoundError, NotADirectoryError):  # a folder that is closed may hold it
            raise DataError(f"No such file or folder: {source}.") from None
        # A folder that cannot be listed stands for itself, so that the table tells of it.
        below = walk(source, lambda error: paths.setdefault(Path(error.filename)), own)
        for path, reason in below if source.is_dir() else [(source, "")]:
            if reason:
                skipped.append((str(path), reason))
            else:
                paths.setdefault(path)
    if not paths:
        names = f" {describe_skipped(skipped)}." if skipped else ""
        where = f" in {', '.join(map(str, sources))}" if sources else ""
        raise DataError(f"No files{where}.{names} Give slices, or folders that hold some.")
    files: list[File] = []
    for path in paths:
        try:
            files += _in_archive(path) if path.suffix.lower() == ".zip" else [path]
        except DataError as error:
            if path in sources:
                raise
            files.append(BadArchive(path, str(error).removeprefix(f"{path} ")))
    return files, skipped


def _in_archive(path: Path) -> Sequence[File]:
    """The files of a zip archive. Raises DataError."""
    files = entries(path)
    size = sum(entry.info.file_size for entry in files)
    if not files or len(files) > MAX_ENTRIES or size > MAX_INFLATED:
        raise DataError(
            f"{path} holds {len(files):,} files that may be slices, {size:,} bytes in all; it takes at least one, at "
            f"most {MAX_ENTRIES:,} files and {MAX_INFLATED:,} bytes. Unpack what is wanted of it, and give the folder."
        )
    return files


def predict_files(
    files: Sequence[File], out: Path, predictor: Predictor, progress: bool = False
) -> tuple[list[Row], int]:
    """Writes the answers for `files` to the CSV `out`, one row a slice and one for each unreadable file.

    Returns the rows, and how many files had been answered before. Raises ChestCTError where `out` cannot be written or
    is no table of this program.
    """
    partial = out.with_name(f"{out.name}.partial")
    columns = [*FIRST, *(f"probability_{name}" for name in predictor.bundle.classes), *LAST]
    pool = ThreadPoolExecutor(THREADS, "batch")
    rows: list[Row] = []
    reused = 0
    try:
        tables = _read_table(out, columns) | _read_table(partial, columns)
        earlier = {path: old for path, old in tables.items() if old[0]["bundle"] == predictor.bundle.id}
        write_atomic(partial, _as_csv(columns, [row for old in earlier.values() for row in old]))
        answers = pool.map(lambda file: answer_file(predictor, file, earlier.get(cell(str(file)), [])), files)
        with partial.open("a", encoding="utf-8", newline="") as opened:
            for answered, are_old in steps(answers, "Scoring files", len(files), progress):
                rows += answered
                reused += are_old
                if not are_old:
                    opened.write(_as_csv(columns, answered, header=False))
                    opened.flush()
        rows = in_order(rows, place_of)
        write_atomic(Path(os.path.realpath(out)), _as_csv(columns, rows))  # a link stays one
        partial.unlink(missing_ok=True)
    except OSError as error:
        raise ChestCTError(
            f"Cannot write {out}: {error.strerror or error}. Free space there, or choose another --out."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    return rows, reused


def answer_file(predictor: Predictor, file: File, old: Sequence[Row] = ()) -> tuple[list[Row], bool]:
    """The rows of a file, one a frame or page, and whether they are the old ones: of the same bytes, and all there."""
    file_hash = ""
    try:
        data = read(file, predictor.limits)
        file_hash = digest(data)
        if old and all(row["file_hash"] == file_hash and row["frames"] == str(len(old)) for row in old):
            return list(old), True
        with predictor.room(data):
            rows = [row_of(str(file), one) for one in predictor.predict_frames(data, name=str(file), explain=False)]
        return [row | {"file_hash": file_hash, "frames": str(len(rows))} for row in rows], False
    except DecodeError as error:
        row = {"path": cell(str(file)), "decision": "unreadable", "reason": cell(error.reason)}
        return [row | {"bundle": predictor.bundle.id, "file_hash": file_hash}], False


def row_of(name: str, prediction: Prediction) -> Row:
    """The answer for a slice of the file of this name; the file's hash and number of frames are the caller's to add."""
    place = prediction.slice.position  # a float32 of NIfTI in mm, or an integer of up to 10 digits
    return {
        "path": cell(name),
        "frame": str(prediction.slice.frame),
        "score": f"{prediction.score:.6g}",
        "decision": prediction.decision,
        "reason": cell(prediction.reason),
        "possible": " ".join(prediction.possible),
        **{f"probability_{name}": f"{value:.6g}" for name, value in prediction.probabilities.items()},
        "novelty": f"{prediction.novelty:.6g}",
        "known": str(prediction.known),
        "bundle": prediction.bundle,
        "format": prediction.slice.format,
        "series": cell(prediction.slice.series),
        "position": "" if place is None else f"{place[2]:.8g} mm" if place[1] == "mm" else f"no. {place[2]:.10g}",
    }


def cell(text: str) -> str:
    """Text as a cell shows it: on one line, as UTF-8, and never taken for a formula (OWASP, CSV injection)."""
    printable = re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]", lambda match: ascii(match[0])[1:-1], text)
    return f"'{printable}" if printable.startswith(tuple("=+-@\uff1d\uff0b\uff0d\uff20")) else printable


def _as_csv(columns: list[str], rows: list[Row], header: bool = True) -> str:
    """Rows as CSV. All in quotes: a spreadsheet that splits at semicolons then leaves file names whole."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, quoting=csv.QUOTE_ALL, lineterminator="\n", extrasaction="ignore")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _read_table(path: Path, columns: list[str]) -> dict[str, list[Row]]:
    """The rows of a table by file, without those that are torn or of no answer.

    There are none where the columns are others: they went, or are of another bundle.
    """
    if not path.exists():
        return {}
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")[:-1]  # after the last: a row that was torn
    try:
        header, *values = csv.reader(lines)
    except (ValueError, csv.Error):
        header, values = [], []
    if header[: len(FIRST)] != FIRST:
        raise ChestCTError(f"{path} is there and is no table of this program. Choose another --out, or remove it.")
    if header != columns:
        return {}
    table: dict[str, list[Row]] = {}
    for row in (dict(zip(header, line, strict=True)) for line in values if len(line) == len(header)):
        if _has_numbers(row):
            table.setdefault(row["path"], []).append(row)
    return table


def _has_numbers(row: Row) -> bool:
    """Whether the numbers of an answer are in a row, as far as can be told: a spreadsheet may have changed them."""
    try:
        place_of(row)
        numbers = [float(row[name]) for name in row if name in ("score", "novelty") or name.startswith("probability_")]
    except ValueError:
        return False
    return bool(np.isfinite(numbers).all())


def describe(rows: list[Row], reused: int, skipped: list[tuple[str, str]]) -> str:
    """What became of the files, a line each."""
    counts = Counter(row["decision"] for row in rows)
    counts["scored before, and not changed"] = reused
    counts["of the model's training data, where a score says little"] = sum(row.get("known") == "True" for row in rows)
    lines = [f"{count:>8,} {what}" for what, count in counts.items() if count]
    return "\n".join([*lines, *([f"{describe_skipped(skipped)}."] if skipped else []), NOT_MEDICAL])
