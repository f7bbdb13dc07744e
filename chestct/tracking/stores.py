"""Where runs are kept: an SQLite file on this machine, and the server that the user named.

MLflow migrates a new file for seconds, and a kill or a second process in that time leaves one that no later run can
open: it is made next to its place under a lock and then renamed. User and token of a server come from the environment
alone, so that no setting, file or log can hold them.
"""

import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import SplitResult, urlsplit

from chestct.config.fields import at_home
from chestct.config.schema import TrackingConfig
from chestct.errors import ChestCTError, ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")
PROBE_SECONDS = 8.0
DAGSHUB = "dagshub.com"
CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
GIVEN: dict[str, tuple[str | None, str | None]] = {}
"""What `server_uri` set of CREDENTIALS, and what the user had there, which other servers than DagsHub get again."""

KIND = ("mlflow.experimentKind", "custom_model_development")
"""A tag without which MLflow's page shows an experiment as one of language models."""
SQLITE = "sqlite:///"
WAIT_SECONDS = 120  # for another process that makes the store
LOCATIONS = [("experiments", "artifact_location"), ("logged_models", "artifact_location"), ("runs", "artifact_uri")]
LOCATIONS += [("model_versions", "source"), ("model_versions", "storage_location")]
"""Tables and columns of MLflow's in which the path of an artifact stands."""


class TrackingError(ChestCTError):
    """A tracking server or store that cannot be used."""


def is_server(uri: str) -> bool:
    """Whether a tracking URI names a server, not a store on this machine."""
    return uri.lower().startswith(("http://", "https://"))


def local_uri(cfg: TrackingConfig) -> str:
    """URI of the store on this machine: what settings or MLflow's own variable name, unless that is a server."""
    refuse_password(cfg.local)
    named = cfg.uri or os.environ.get("MLFLOW_TRACKING_URI") or cfg.local
    uri = cfg.local if cfg.name == "dagshub" or is_server(named) else named
    refuse_password(uri)
    file = store_file(uri)
    return f"{SQLITE}{at_home(str(file))}" if file else uri


def store_file(uri: str) -> Path | None:
    """The SQLite file behind a URI; None for any other store."""
    return Path(uri.removeprefix(SQLITE)).expanduser() if uri.startswith(SQLITE) else None


def first_line(error: BaseException) -> str:
    """What an error says first, for a sentence of ours: 200 characters at most, without a full stop."""
    return str(error).strip().splitlines()[0][:200].rstrip(".") if str(error).strip() else type(error).__name__


def reason(cause: BaseException) -> str:
    """What went wrong with a server, for a sentence of ours: the network's own words, where there was no answer."""
    while not isinstance(cause, ChestCTError) and (deeper := cause.__cause__ or cause.__context__):
        cause = deeper
    return str(getattr(cause, "strerror", None) or first_line(cause))


@contextmanager
def usable(place: str, way_out: str, kinds: str = "sqlalchemy.") -> Iterator[None]:
    """Makes errors of a database behind MLflow or Optuna, or of the modules that `kinds` begins, a TrackingError."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause and not type(cause).__module__.startswith(kinds):
            cause = None if isinstance(cause, ChestCTError) else cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise TrackingError(f"{place} cannot be used ({first_line(cause)}). {way_out}") from None


def prepare(uri: str) -> None:
    """Makes the SQLite store where there is none, others are MLflow's; raises TrackingError where it cannot be used."""
    from filelock import FileLock
    from mlflow import MlflowClient

    file = store_file(uri)
    if file is None:
        way_out = (
            "Give sqlite:///FILE or https://SERVER with tracking.uri or MLFLOW_TRACKING_URI, sqlite:///FILE with "
            "tracking.local; tracking=off records nothing."
        )
        with usable(f"The MLflow store {uri}", way_out, kinds=""):  # as below, or of a driver that is not installed
            MlflowClient(uri).search_experiments(max_results=1)
        return
    way_out = (
        f"After an update of MLflow: mlflow db upgrade {uri}. Where MLflow was killed while it made the file, move it "
        "away. Or choose another with tracking.local=sqlite:///FILE; tracking=off records nothing."
    )
    with usable(f"The MLflow store {file}", way_out, kinds=""):  # of SQLite, MLflow, SQLAlchemy or Alembic
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=WAIT_SECONDS):
            if not _has_tables(file):
                part = file.with_name(f"{file.name}.making")
                for left in (f"{part}", f"{part}-journal", f"{file}-journal"):  # by a kill: SQLite would replay them
                    Path(left).unlink(missing_ok=True)
                MlflowClient(f"{SQLITE}{part}").search_experiments(max_results=1)
                part.replace(file)
            MlflowClient(uri).search_experiments(max_results=1)
            follow(file)


def follow(file: Path) -> None:
    """Makes a store that was moved or copied name the artifacts next to it; MLflow goes on with those it had before."""
    with closing(sqlite3.connect(file, timeout=WAIT_SECONDS)) as database, database:
        for (before,) in database.execute("SELECT artifact_location FROM experiments").fetchall():
            now = f"{file.resolve().parent}/mlruns/{str(before).rpartition('/mlruns/')[2]}"
            if now == before or "/mlruns/" not in str(before) or not Path(now).is_dir():
                continue
            part = {"now": now, "before": f"{before}/", "size": len(before) + 1}
            for table, column in LOCATIONS:
                change = f"UPDATE {table} SET {column} = :now || substr({column}, :size)"
                database.execute(f"{change} WHERE substr({column} || '/', 1, :size) = :before", part)
            print(f"{file} was moved or copied: the artifacts of its runs are those in {now}, no longer in {before}.")


def _has_tables(file: Path) -> bool:
    """Raises sqlite3.Error for a file that is no database or cannot be written; MLflow would retry for 140 s."""
    if not file.exists():
        return False
    with closing(sqlite3.connect(file, timeout=WAIT_SECONDS)) as database:
        database.execute("BEGIN IMMEDIATE")
        return database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 0


def server_uri(cfg: TrackingConfig) -> str | None:
    """URI of the server that runs are shared on; None where the store on this machine is all there is.

    MLflow's client is given DagsHub's token where it reads users; for any other server, what stood there before. Raises
    ConfigError where a password stands in the URI, or DagsHub's owner, repository or token is missing.
    """
    uri = cfg.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    if cfg.name == "dagshub":
        for key, value in (("tracking.owner", cfg.owner), ("tracking.repo", cfg.repo)):
            if not value or not re.fullmatch(r"[\w.-]+", value):
                raise ConfigError(
                    f"tracking=dagshub: {key}={value or 'null'} is not a name on DagsHub. Give both as in "
                    f"{DAGSHUB}/OWNER/REPO: tracking.owner=OWNER tracking.repo=REPO."
                )
        uri = f"https://{DAGSHUB}/{cfg.owner}/{cfg.repo}.mlflow"
    refuse_password(uri)
    before = [_own(name) for name in CREDENTIALS]
    user, password = before
    if _parts(uri).hostname == DAGSHUB:
        if token := os.environ.get("DAGSHUB_USER_TOKEN"):  # those there are may be of another server
            user = password = token  # DagsHub takes it for the user name, too
        if not password:
            raise ConfigError(
                f"No DagsHub token in the environment. Make one at {DAGSHUB} (User Settings, Tokens), then: "
                "export DAGSHUB_USER_TOKEN=..., or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
            )
        user = user or password
    for name, value, users_own in zip(CREDENTIALS, (user, password), before, strict=True):
        GIVEN[name] = value, users_own
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return uri.rstrip("/") if is_server(uri) else None


def _own(name: str) -> str | None:
    """What the user set: what stood there before `server_uri` gave another value, or what came after that."""
    value = os.environ.get(name)
    given, before = GIVEN.get(name, (value, value))
    return before if value == given else value


def _parts(uri: str) -> SplitResult:
    """Raises ConfigError for an address with a mistake; the message repeats nothing that may hold a password."""
    try:
        return urlsplit(uri)
    except ValueError:
        shown = f"{uri.partition(':')[0]}://..." if {"@", "?"} & set(uri) else uri
        raise ConfigError(
            f"{shown} is no address that can be read. Give https://SERVER or sqlite:///FILE with tracking.uri, "
            "tracking.local or MLFLOW_TRACKING_URI; the brackets of an IPv6 address, as in http://[::1]:5000, come in "
            "pairs."
        ) from None


def refuse_password(uri: str) -> None:
    """Raises ConfigError for a user or password in a URI, as in user:password@; the message does not repeat it."""
    parts = _parts(uri)
    if "@" in parts.netloc or re.search(r"(^|&)(user|password|passwd)=", parts.query, re.IGNORECASE):
        instead = "name the driver's own configuration file, such as `?read_default_file=FILE` of MySQL's"
        if parts.scheme in ("http", "https"):
            instead = f"set {' and '.join(CREDENTIALS)} instead"
        elif parts.scheme.startswith("postgres"):
            instead = "set PGUSER and PGPASSWORD, or name a service of PostgreSQL's instead"
        raise ConfigError(
            f"The tracking URI holds a user or password for {parts.netloc.rpartition('@')[2]}: settings are kept with "
            f"every run. Leave them out of the URI; {instead}."
        )


def refuse_elsewhere(artifacts: str, uri: str) -> None:
    """Raises ConfigError where a run on the server `uri` keeps its artifacts in a place that nobody named.

    Whoever made the experiment chose that place: another server would receive the user's password, and a folder would
    be one of this machine. Object stores (s3://, gs://) have credentials of their own.
    """
    if not is_server(uri):
        return
    place = _parts(artifacts)
    proxied = place.scheme in ("http", "https", "mlflow-artifacts")
    elsewhere = place.netloc not in ("", _parts(uri).netloc) if proxied else len(place.scheme) <= 1
    if elsewhere or place.scheme == "file":
        raise ConfigError(
            f"{uri} says that artifacts lie in {artifacts}, which is not on that server: not followed. Start the "
            "server with --serve-artifacts, or with an object store."
        )


def use_experiment(client: "MlflowClient", name: str, artifacts: str | None = None) -> str:
    """Id of the experiment of that name, made where there is none; safe when several processes do so at once.

    artifacts: where a new one keeps its artifacts, if MLflow shall not choose. Raises ConfigError for a deleted one.
    """
    from mlflow.exceptions import MlflowException

    try:
        return str(client.create_experiment(name, artifacts, dict([KIND])))
    except MlflowException:
        known = client.get_experiment_by_name(name)
        if known is None:
            raise
    if known.lifecycle_stage == "deleted":
        raise ConfigError(f"the experiment '{name}' was deleted: restore it, or give new runs tracking.experiment=NAME")
    return str(known.experiment_id)


def probe(uri: str, experiment: str = "chestct") -> str | None:
    """What keeps runs from being written to `experiment` on the MLflow server at `uri`, in two sentences; else None.

    Answers within PROBE_SECONDS, whatever the server does. Reading is no proof of writing, so it tags the experiment.
    """
    from mlflow import MlflowClient  # takes seconds, which are not the server's

    client = MlflowClient(uri)
    error = within(PROBE_SECONDS, lambda: client.set_experiment_tag(use_experiment(client, experiment), *KIND))
    if not isinstance(error, Exception):
        return None
    problem, way_out = reason(error), f" Is the address right, and are {' and '.join(CREDENTIALS)}?"
    if isinstance(error, ChestCTError):  # which says its own
        way_out = ""
    elif re.search(r"no answer|timed out", problem):
        way_out = " Is the address right? If it is, the server is overloaded or not well: try again later."
    elif re.search(r"\b(code|many) (429|5\d\d)\b", problem):
        way_out = " It is overloaded or not well: try again later, or ask who runs it."
    return f"The MLflow server {uri} cannot be written to: {problem}.{way_out}"


def within(seconds: float, work: Callable[[], T]) -> T | Exception:
    """What `work` returns, or the exception where it fails or takes longer: whatever a server does, the run goes on.

    In a thread, because no timeout of a socket ends a slow name server or an answer that drips.
    """
    results: list[T | Exception] = []

    def attempt() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else TimeoutError(f"no answer within {seconds:.0f} s")
