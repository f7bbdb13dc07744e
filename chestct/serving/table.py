"""The batch CLI's table: rows are appended to OUT.partial as they come, and become OUT, in order, when all are there.

A killed run leaves OUT.partial with whole rows, and the next one goes on from it. Only where each row lies is kept in
memory, never the rows. Names and reasons come from strangers: a cell can neither break a line nor start a formula.
"""

import csv
import io
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from filelock import FileLock, Timeout

from chestct.errors import ChestCTError

FIRST, LAST = (
    ["path", "frame", "score", "decision", "reason", "possible"],
    ["novelty", "known", "bundle", "file_hash", "frames", "overlay"],
)
UNREADABLE = "unreadable"

Row = dict[str, object]


class TableError(ChestCTError):
    """A table that cannot be written, or that is somebody else's."""


def columns(classes: Iterable[str]) -> list[str]:
    """The table's columns for a bundle's classes."""
    return [*FIRST, *(f"probability_{name}" for name in classes), *LAST]


def cell(text: str) -> str:
    """Text as a cell shows it: on one line, as UTF-8, and never taken for a formula (OWASP, CSV injection)."""
    printable = re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]", lambda match: ascii(match[0])[1:-1], text)
    return (
        "'" + printable if printable[:1] in ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20") else printable
    )


class Table:
    """Rows of one run and of those before it, by path.

    out: the CSV to be; columns: from `columns`. Use as a context manager: one run at a time may write a table. Raises
    TableError where another run writes it, or where `out` is no table of this program.
    """

    def __init__(self, out: Path, columns: list[str]) -> None:
        self.out, self.columns = out, columns
        self.partial = out.with_name(out.name + ".partial")
        self._new = out.with_name(f".{out.name}.new")  # what a killed run leaves, the next one overwrites
        self._lock = FileLock(out.with_name(f".{out.name}.lock"))
        self._places: dict[str, list[tuple[int, int]]] = {}
        self._file: BinaryIO

    def __enter__(self) -> "Table":
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise TableError(f"Another run is writing {self.out}. Wait for it, or choose another --out.") from None
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def rows(self, path: str) -> list[dict[str, str]]:
        """The rows of a file as they stand, all of them text; [] where there are none."""
        lines = [self._line(place).decode() for place in self._places.get(cell(path), [])]
        return [dict(zip(self.columns, next(csv.reader([line])), strict=True)) for line in lines]

    def put(self, path: str, rows: list[Row]) -> None:
        """Replaces the rows of a file; they are on the disk when this returns."""
        data = [self._as_csv([row.get(name, "") for name in self.columns]) for row in rows]
        begin = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(b"".join(data))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None
        self._places[cell(path)] = []
        for line in data:
            self._places[cell(path)].append((begin, len(line)))
            begin += len(line)

    def finish(self, paths: Iterable[str]) -> None:
        """Writes `out`: the rows of these files in this order, and no others."""
        try:
            with self._new.open("wb") as file:
                file.write(self._as_csv(self.columns))
                for path in paths:
                    file.writelines(self._line(place) for place in self._places.get(cell(path), []))
                file.flush()
                os.fsync(file.fileno())
            self._new.replace(self.out)
            self.partial.unlink()
        except OSError as error:
            raise self._unwritable(error) from None
        finally:
            self._new.unlink(missing_ok=True)

    def _open(self) -> None:
        """Opens OUT.partial, begun as a copy of OUT, and learns where its rows lie."""
        head = self._as_csv(self.columns)
        try:
            if self.out.exists() and not self._is_ours():
                raise TableError(
                    f"{self.out} is there and is no table of this program. Choose another --out, or remove it."
                )
            if self.out.exists() and not self.partial.exists():
                shutil.copyfile(self.out, self._new)
                self._new.replace(self.partial)
            self._file = self.partial.open("a+b")
        except OSError as error:
            raise self._unwritable(error) from None
        self._file.seek(0)
        if self._file.readline() != head:  # nothing yet, or made with a bundle for other classes
            self._file.truncate(0)
            self._file.write(head)
        end = self._file.tell()
        for line in self._file:
            if not line.endswith(b"\n"):  # the run was killed while it wrote
                break
            self._learn(line, end)
            end += len(line)
        self._file.truncate(end)

    def _is_ours(self) -> bool:
        with self.out.open("rb") as file:
            return file.readline(4096).startswith(self._as_csv(FIRST)[:-1])

    def _learn(self, line: bytes, begin: int) -> None:
        """Notes where a row lies; the first row of a file makes those that stood above it void."""
        try:
            (values,) = csv.reader([line.decode()])
            row = dict(zip(self.columns, values, strict=True))
        except (UnicodeDecodeError, ValueError, csv.Error):
            return  # edited by somebody; its file is read again
        places = self._places.setdefault(row["path"], [])
        if row["frame"] in ("", "0") or not row["frames"]:
            places.clear()
        places.append((begin, len(line)))

    def _line(self, place: tuple[int, int]) -> bytes:
        begin, length = place
        self._file.seek(begin)
        return self._file.read(length)

    def _as_csv(self, values: list[object] | list[str]) -> bytes:
        # Text in quotes: a spreadsheet that splits at semicolons then leaves file names whole.
        line = io.StringIO()
        csv.writer(line, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").writerow(
            [cell(value) if isinstance(value, str) else value for value in values]
        )
        return line.getvalue().encode()

    def _unwritable(self, error: OSError) -> TableError:
        return TableError(
            f"Cannot write {self.out}: {error.strerror or error}. Free space there, or choose another place with --out."
        )
