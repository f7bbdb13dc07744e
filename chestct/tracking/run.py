"""The run that a training or an evaluation writes to.

A run belongs to a folder, where its id is noted, so that a resumed training goes on with it. It begins when settings
and data are known to be usable, so that a mistake leaves no failed run behind.
"""

import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from chestct.config.schema import Config, TrackingConfig, leaves
from chestct.errors import ChestCTError
from chestct.files import write_atomic
from chestct.tracking.local_store import TrackingError, first_line, local_uri, prepare, store_file
from chestct.tracking.registry import ALIAS, BUNDLE, RUN_ID_FILE, register, remembered_run
from chestct.tracking.remote_store import probe, server_uri
from chestct.tracking.sync import FOLDER, LOCK_FILE, ORIGIN, PARENT, experiment_id, send

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from mlflow import MlflowClient

BEGIN_SECONDS, END_SECONDS = 20.0, 300.0
"""How long the beginning and the end of a run wait for a server; what it has not got then, `sync` sends."""


class Run:
    """One MLflow run; without a client (tracking=off, or not begun) every method does nothing."""

    def __init__(self, client: "MlflowClient | None" = None, run_id: str = "", uri: str = "") -> None:
        self.client, self.run_id, self.uri = client, run_id, uri

    def begin(self) -> None:
        """Records the run from here on; for a run of open_run."""

    def loggers(self) -> "list[Logger]":
        """For Lightning's Trainer: write what modules log into this run, here and on the server."""
        return []

    def tags(self, tags: Mapping[str, object]) -> None:
        if self.client:
            from mlflow.entities import RunTag

            self.client.log_batch(self.run_id, tags=[RunTag(key, str(value)[:5000]) for key, value in tags.items()])

    def metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        if self.client:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            self.client.log_batch(self.run_id, [Metric(k, float(v), now, step) for k, v in metrics.items()])

    def settings(self, cfg: Config) -> None:
        """Every resolved setting as a parameter; MLflow keeps the first value if a resumed run changes one."""
        if self.client:
            from mlflow.entities import Param

            known = self.client.get_run(self.run_id).data.params
            params = [Param(key, str(value)[:6000]) for key, value, _ in leaves(cfg) if key not in known]
            self.client.log_batch(self.run_id, params=params)

    def artifacts(self, path: Path, folder: str | None = None) -> None:
        """A file, or everything in a folder."""
        if self.client:
            record = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
            record(self.run_id, str(path), folder)

    def evaluation(self, which: str, values: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """The report's folder, and the numbers of each split as `WHICH/SPLIT/NAME`.

        which: the checkpoint, best or last; values: split -> name -> number, or None where one is not defined.
        """
        flat = {f"{which}/{split}/{name}": value for split, part in values.items() for name, value in part.items()}
        self.metrics({key: value for key, value in flat.items() if value is not None})
        self.artifacts(folder, "evaluation")

    def data(self, name: str, digest: str, source: str, profile: Mapping[str, object]) -> None:
        """The data that the run used: their hash, where they lie and how many slices stand in which split."""
        if self.client:
            from mlflow.entities import Dataset, DatasetInput

            # MLflow keeps 36 characters of a digest.
            dataset = Dataset(name, digest[:36], "local", json.dumps({"uri": source}), profile=json.dumps(profile))
            self.client.log_inputs(self.run_id, [DatasetInput(dataset)])

    def register(self, name: str | None) -> None:
        """Gives the run's bundle its name, where it has both; the run stands if that fails, with a line about it."""
        from mlflow.exceptions import MlflowException

        try:
            if self.client is None or not name or not self.client.list_artifacts(self.run_id, BUNDLE):
                return
            version = register(self.client, self.run_id, name)
        except MlflowException as error:
            print(f"Not registered as {name} in {self.uri}: {first_line(error)}.")
        else:
            print(f"registered       bundle=models:/{name}@{ALIAS} is now version {version} in {self.uri}")


class _OpenRun(Run):
    """The run of open_run: in the local store, and a copy on the server while that answers."""

    def __init__(self, cfg: Config, out: Path, sweep: bool, uri: str, server: str | None) -> None:
        super().__init__(uri=uri)
        self.cfg, self.out, self.sweep, self.server = cfg, out, sweep, server
        self.copy = Run()
        self.monitor: Any = None

    def begin(self) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            client = MlflowClient(self.uri)
            self.run_id = _start(client, self.cfg, self.uri, self.out, self.sweep)
        except MlflowException as error:
            raise TrackingError(f"MLflow cannot use {self.uri}: {first_line(error)}.") from None
        self.client = client
        self.settings(self.cfg)
        self.tags(code_version() | _called_by() | {FOLDER: self.out.resolve()})
        if self.server:
            remote = MlflowClient(self.server)
            copy_id = _attempt(lambda: send(client, remote, self.run_id, artifacts=False), BEGIN_SECONDS)
            if isinstance(copy_id, str):
                self.copy = Run(remote, copy_id, self.server)
        if self.cfg.tracking.system_metrics:
            self._monitor()

    def loggers(self) -> "list[Logger]":
        from chestct.tracking.logger import RunLogger

        runs = [run for run in (self, self.copy) if run.client]
        return [RunLogger(run.client, run.run_id, shared=run is self.copy) for run in runs if run.client]

    def end(self, status: str) -> None:
        """Ends the run in the local store, and brings the server's copy up to date."""
        if self.client is None:
            return
        if self.monitor:
            self.monitor.finish()
        if status == "FINISHED":
            self.register(self.cfg.tracking.register)
        self.client.set_terminated(self.run_id, status)  # waits for MLflow's threads
        if self.server is None:
            return
        problem = self._complete(status)
        if problem is None:
            print(f"MLflow copy      {self.copy.run_id} on {self.server}")
            return
        print(
            f"The MLflow server {self.server} has not all of this run ({problem}). Nothing is lost: it is in "
            f"{self.uri}; send the rest with: {_sync_command(self.cfg.tracking)}"
        )

    def _complete(self, status: str) -> str | None:
        """Sends what the server has not got; why that failed, if it did."""
        from mlflow import MlflowClient

        assert self.client is not None
        assert self.server is not None
        client, remote = self.client, MlflowClient(self.server)
        if problem := probe(self.server, self.cfg.tracking.experiment):
            return problem.rstrip(".")

        def work() -> str:
            if self.copy.client:  # waits for MLflow's threads, so that no metric is sent twice
                self.copy.client.set_terminated(self.copy.run_id, status)
            return send(client, remote, self.run_id)

        copy_id = _attempt(work, END_SECONDS)
        if not isinstance(copy_id, str):
            return first_line(copy_id)
        self.copy = Run(remote, copy_id, self.server)
        if status == "FINISHED":
            self.copy.register(self.cfg.tracking.register)
        return None

    def _monitor(self) -> None:
        """MLflow's own record of processor, memory, disk, network and GPU."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
        self.monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.uri)
        self.monitor.start()


@contextmanager
def open_run(cfg: Config, out: Path, sweep: bool = False) -> Iterator[Run]:
    """The run that belongs to the folder `out`: the one noted there if it is resumed, else a new one; see Run.begin.

    A training is resumed with cfg.ckpt or by its sweep; a sweep (whose jobs have folders in `out`) always.

    Ends as FINISHED, as KILLED when it was interrupted, as FAILED on any error. Raises TrackingError where the local
    store cannot be used, or a server cannot and tracking.required=true.
    """
    if cfg.tracking.name == "off":
        yield Run()
        return
    server = _usable_server(cfg.tracking)
    uri = local_uri(cfg.tracking)
    prepare(uri)
    run = _OpenRun(cfg, out, sweep, uri, server)
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        run.end(status)


@contextmanager
def run_of(cfg: Config, ckpt: Path) -> Iterator[Run]:
    """The run that a checkpoint belongs to, which may long have ended, to add something to it.

    Prints which; where the run or its store is gone, it prints that, and gives a run that records nothing.
    """
    run_id = remembered_run(ckpt.resolve().parent)
    if cfg.tracking.name == "off" or run_id is None:
        yield Run()
        return
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri, run = cfg.tracking.local, Run()
    try:
        uri = local_uri(cfg.tracking)
        if (file := store_file(uri)) and not file.is_file():
            raise TrackingError("there is no such store")  # asking would make one
        client = MlflowClient(uri)
        if client.get_run(run_id).info.lifecycle_stage == "deleted":
            raise TrackingError("it was deleted")
        run = Run(client, run_id, uri)
        yield run
        run.register(cfg.tracking.register)
        if server := _usable_server(cfg.tracking):
            remote = MlflowClient(server)
            Run(remote, send(client, remote, run_id), server).register(cfg.tracking.register)
        print(f"MLflow run {run_id} in {uri} (make ui)")
    except (MlflowException, ChestCTError, OSError) as error:
        print(f"Not added to the MLflow run {run_id} in {uri}: {first_line(error)}.")
        if run.client is None:
            yield run


def _start(client: "MlflowClient", cfg: Config, uri: str, out: Path, sweep: bool) -> str:
    """Id of the run of the folder."""
    from mlflow.exceptions import MlflowException

    # Next to the checkpoints, so that it goes where they go: DVC removes, restores and shares them as one.
    folder = out if sweep else out / "checkpoints"
    known, parent = remembered_run(folder), None if sweep else remembered_run(out.parent)
    tags = {}
    if known and (sweep or cfg.ckpt or parent):
        try:
            client.update_run(known, status="RUNNING")
            return known
        except MlflowException:
            print(f"The MLflow run {known} of this folder is not in {uri}, or was deleted; a new run is recorded.")
            tags[ORIGIN] = known
    name = cfg.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is not None and experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"The MLflow experiment '{name}' was deleted in {uri}. Restore it, or choose another with "
            "tracking.experiment=NAME."
        )
    file = store_file(uri)  # MLflow would keep artifacts in the working directory, which DVC may remove
    artifacts = str(file.resolve().parent / "mlruns" / quote(name, safe="")) if file else None
    run_name = out.name if sweep else os.environ.get("DVC_EXP_NAME")
    if parent:
        tags[PARENT] = parent
        run_name = f"{out.parent.name} {out.name}"
    run = client.create_run(
        experiment_id(client, name, artifacts), tags=tags, run_name=cfg.tracking.run_name or run_name
    )
    write_atomic(folder / RUN_ID_FILE, f"{run.info.run_id}\n")
    return str(run.info.run_id)


def _attempt(work: Callable[[], str], seconds: float) -> str | Exception:
    """What `work` returns, or why it failed or was not done in time. Whatever a server does, the run goes on."""
    results: list[str | Exception] = []

    def attempt() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else TimeoutError(f"it takes longer than {seconds:.0f} s")


def _usable_server(cfg: TrackingConfig) -> str | None:
    """The server that gets a copy; None where none is named, or it cannot be used and need not be."""
    server = server_uri(cfg)
    problem = probe(server, cfg.experiment) if server else None
    if problem is None:
        return server
    if cfg.required:
        raise TrackingError(f"{problem} Set tracking.required=false to go on with the local store {cfg.local}.")
    print(f"{problem} This run is recorded in {cfg.local}; send it later with: {_sync_command(cfg)}")
    return None


def _sync_command(cfg: TrackingConfig) -> str:
    where = (
        f"tracking=dagshub tracking.owner={cfg.owner} tracking.repo={cfg.repo}"
        if cfg.name == "dagshub"
        else f"tracking.uri={server_uri(cfg)}"
    )
    where += "" if cfg.local == TrackingConfig().local else f" tracking.local={cfg.local}"
    return f"chestct sync {where}"


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Holds the folder `out` for this process. Raises ChestCTError where another training holds it."""
    from filelock import FileLock, Timeout

    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ChestCTError(
            f"Another training is writing to {out}. Wait for it or stop it, or start a run of its own: without ckpt, "
            "or with hydra.run.dir=FOLDER."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _called_by() -> dict[str, str]:
    """The DVC experiment and Hydra's overrides, where there are any."""
    from hydra.core.hydra_config import HydraConfig

    tags = {"dvc.experiment": os.environ["DVC_EXP_NAME"]} if os.environ.get("DVC_EXP_NAME") else {}
    if HydraConfig.initialized():
        tags["hydra.overrides"] = " ".join(HydraConfig.get().overrides.task)
    return tags


def code_version() -> dict[str, Any]:
    """Commit of the code that runs, and whether files differ from it; empty outside a git checkout."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {}
