"""The record of what the service saw: a few numbers a slice in SQLite, for the drift report.

A request never waits for the disk: it leaves its numbers in a queue, and one thread writes what has gathered there. A
full disk, a lock or a broken file costs records, never an answer.
"""

import logging
import queue
import shlex
import sqlite3
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chestct.errors import ChestCTError
from chestct.imaging.statistics import STATISTICS, image_statistics

if TYPE_CHECKING:
    from chestct.serving.prediction import Prediction

logger = logging.getLogger("chestct.serving")

NUMBERS = ("score", "novelty", *STATISTICS)
COLUMNS = ("time", "bundle", "decision", "known", *NUMBERS)

WAITING = 10_000
"""Records that may wait to be written; more are dropped."""

BUSY = 5.0
"""Seconds to wait for another process that writes the same file."""


class Monitor:
    """Appends records to a file; safe to call from any number of threads, and several processes may share the file.

    path: made where it is missing; keep_days: older records are deleted. `dropped`: records that could not be written.
    """

    def __init__(self, path: str | Path, keep_days: int = 90) -> None:
        self.path, self.keep_days, self.dropped = Path(path), keep_days, 0
        self._waiting: queue.Queue[tuple[Any, ...] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name="monitor", daemon=True)
        self._thread.start()

    def record(self, prediction: "Prediction") -> None:
        """Notes an answer. Returns at once and never raises for what is wrong with the disk."""
        numbers = {"score": prediction.score, "novelty": prediction.novelty, **image_statistics(prediction.slice.gray)}
        what = (int(time.time()), prediction.bundle, prediction.decision, int(prediction.known))
        try:
            self._waiting.put_nowait((*what, *(float(numbers[name]) for name in NUMBERS)))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Writes what waits, and ends the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        last = False
        while not last:
            rows = [self._waiting.get()]
            while not self._waiting.empty():
                rows.append(self._waiting.get())
            last = None in rows
            self._write([row for row in rows if row is not None])

    def _write(self, rows: list[tuple[Any, ...]]) -> None:
        """One transaction. The file is opened anew each time: one that was moved away or mended is taken up again."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch(0o600)  # SQLite would let everybody read it
            with closing(sqlite3.connect(self.path, timeout=BUSY)) as database, database:
                with suppress(sqlite3.OperationalError):  # it does not wait while another process does the same
                    database.execute("PRAGMA journal_mode = WAL")  # a report that reads does not hold up who writes
                database.execute(f"CREATE TABLE IF NOT EXISTS answers ({', '.join(COLUMNS)})")
                database.execute("CREATE INDEX IF NOT EXISTS by_time ON answers (time)")
                database.executemany(f"INSERT INTO answers VALUES ({', '.join('?' * len(COLUMNS))})", rows)
                database.execute("DELETE FROM answers WHERE time < ?", (time.time() - self.keep_days * 86400,))
        except (sqlite3.Error, OSError) as error:
            if not self.dropped:  # once is enough: a full disk needs no full log
                sorry = "answers go on without a record until the file can be written, or is moved away"
                logger.error("monitor: cannot write %s (%s); %s", self.path, error, sorry)
            self.dropped += len(rows)


def read_records(path: str | Path, days: float | None = None) -> dict[str, np.ndarray]:
    """The records of the last `days`, or all, by column.

    `time`: int64, Unix seconds; `bundle`, `decision`: text; `known`: bool; NUMBERS: float64. Raises ChestCTError where
    the file is missing or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ChestCTError(
            f"No records in {path}: there is no such file. Start the service with monitor.enabled=true "
            f"{shlex.quote(f'monitor.path={path}')}, or give the right file with --db."
        )
    if days is not None and not days > 0:
        raise ChestCTError(f"--days {days:g}: give a number above 0.")
    since = 0 if days is None else time.time() - days * 86400
    types = {"time": np.int64, "bundle": str, "decision": str, "known": bool}
    try:
        columns = list(zip(*_select(path.resolve(), since), strict=True)) or [()] * len(COLUMNS)
        return {name: np.array(part, types.get(name, np.float64)) for name, part in zip(COLUMNS, columns, strict=True)}
    except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
        raise ChestCTError(
            f"{path} cannot be read as records of the service: {error}. Give the right file with --db, or move this "
            "one away: the service then begins another."
        ) from None


def _select(path: Path, since: float, more: str = "") -> list[tuple[Any, ...]]:
    query = f"SELECT {', '.join(COLUMNS)} FROM answers WHERE time >= ? ORDER BY time"
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro{more}", uri=True, timeout=BUSY)) as database:
            return database.execute(query, (since,)).fetchall()
    except sqlite3.OperationalError as error:
        # Even to read, SQLite writes beside the file, unless it is told that nobody changes it: no log, so no service.
        forbidden = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
        if more or not forbidden or Path(f"{path}-wal").exists():
            raise
        return _select(path, since, "&immutable=1")
