"""The store on this machine: an SQLite file, made whole or not at all.

MLflow migrates a new file for seconds, and a kill or a second process in that time leaves a file that no later run can
open. So it is made next to its place under a lock and then renamed, and what a kill left elsewhere is made anew.
"""

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from chestct.config.schema import TrackingConfig, at_home
from chestct.errors import ChestCTError

SQLITE = "sqlite:///"
WAIT_SECONDS = 120
"""How long a process waits for another that makes the store."""


class TrackingError(ChestCTError):
    """A tracking server or store that cannot be used."""


def named_uri(cfg: TrackingConfig) -> str:
    """What the settings name, else what MLflow's own variable names, else the store on this machine."""
    return cfg.uri or os.environ.get("MLFLOW_TRACKING_URI") or cfg.local


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def local_uri(cfg: TrackingConfig) -> str:
    """URI of the store on this machine."""
    named = named_uri(cfg)
    uri = cfg.local if cfg.name == "dagshub" or is_server(named) else named
    file = store_file(uri)
    return f"{SQLITE}{at_home(str(file))}" if file else uri


def store_file(uri: str) -> Path | None:
    """The SQLite file behind a URI; None for any other store."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200].rstrip(".") if str(error).strip() else type(error).__name__


def prepare(uri: str) -> None:
    """Makes the SQLite store where there is none, or only a half-made one without runs. Other stores are MLflow's.

    Raises TrackingError, within WAIT_SECONDS, where the file cannot be used.
    """
    from filelock import FileLock, Timeout

    file = store_file(uri)
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=WAIT_SECONDS):
            if not _has_tables(file):
                _make(file)
            elif problem := _problem(uri):
                if _holds_runs(file):
                    raise TrackingError(
                        f"MLflow cannot open {file}, which holds runs ({problem}). After an update of MLflow: "
                        f"mlflow db upgrade {uri}. Else move the file away, or set tracking.uri."
                    )
                aside = file.with_name(f"{file.name}.half-made")
                shutil.copyfile(file, aside)
                _make(file)
                print(f"The MLflow store {file} was half made and held no runs: made anew, the old one is {aside}.")
    except Timeout:
        raise TrackingError(f"Another process holds {file}.lock. Wait for it or stop it.") from None
    except (OSError, sqlite3.Error) as error:
        raise TrackingError(
            f"The MLflow store {file} cannot be used ({first_line(error)}). Choose another with "
            "tracking.local=sqlite:///FILE, or record nothing with tracking=off."
        ) from None


def _has_tables(file: Path) -> bool:
    """Raises sqlite3.Error for a file that is no database or cannot be written; MLflow would retry for 140 s."""
    if not file.exists():
        return False
    with closing(sqlite3.connect(file, timeout=WAIT_SECONDS)) as database:
        database.execute("BEGIN IMMEDIATE")
        return database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 0


def _holds_runs(file: Path) -> bool:
    with closing(sqlite3.connect(file)) as database:
        known = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'runs'").fetchone()
        return bool(known) and database.execute("SELECT 1 FROM runs LIMIT 1").fetchone() is not None


def _problem(uri: str) -> str | None:
    """Why MLflow cannot open the store."""
    from mlflow import MlflowClient

    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow's, SQLAlchemy's or Alembic's, by what was under way when it was killed
        return first_line(error)
    return None


def _make(file: Path) -> None:
    """A fresh store in place of `file`, in one step."""
    from mlflow import MlflowClient

    part = file.with_name(f"{file.name}.making")
    for left in (part, Path(f"{part}-journal")):
        left.unlink(missing_ok=True)
    MlflowClient(f"{SQLITE}{part}").search_experiments(max_results=1)
    if not file.exists():
        part.rename(file)
        return
    # Not renamed over it: this process may have the old file open. SQLite copies all pages in one transaction.
    with closing(sqlite3.connect(part)) as fresh, closing(sqlite3.connect(file, timeout=WAIT_SECONDS)) as old:
        fresh.backup(old)
    part.unlink()
