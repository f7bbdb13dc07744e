"""The run that a training or an evaluation writes to: begun, resumed, shared, ended.

A run belongs to a folder, where its id is noted, so that a resumed training goes on with it. It begins when settings
and data are known to be usable, so that a mistake leaves no failed run behind.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from chestct.config.schema import Config, TrackingConfig
from chestct.errors import ChestCTError
from chestct.files import write_atomic
from chestct.tracking.local_store import TrackingError, first_line, local_uri, prepare, store_file
from chestct.tracking.record import Run, code_version
from chestct.tracking.registry import RUN_ID_FILE, remembered_run
from chestct.tracking.remote_store import probe, server_uri, within
from chestct.tracking.sync import FOLDER, LOCK_FILE, ORIGIN, PARENT, experiment_id, send

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from mlflow import MlflowClient

BEGIN_SECONDS, END_SECONDS = 20.0, 300.0
"""How long the beginning and the end of a run wait for a server; what it has not got then, `sync` sends."""


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
            copy_id = within(BEGIN_SECONDS, lambda: send(client, remote, self.run_id, artifacts=False))
            if isinstance(copy_id, str):
                self.copy = Run(remote, copy_id, self.server)
        if self.cfg.tracking.system_metrics:
            self._monitor()

    def loggers(self) -> "list[Logger]":
        from chestct.tracking.logger import RunLogger

        runs = [run for run in (self, self.copy) if run.client]
        return [RunLogger(run.uri, run.run_id, shared=run is self.copy) for run in runs]

    def end(self, status: str) -> None:
        """Ends the run in the local store, and brings the server's copy up to date."""
        if self.client is None:
            return
        if self.monitor:
            self.monitor.finish()
        if status == "FINISHED":
            self.register(self.cfg.tracking.register)
        self.client.set_terminated(self.run_id, status)  # waits for MLflow's threads
        if self.server:
            problem = probe(self.server, self.cfg.tracking.experiment) or self._complete(
                self.client, self.server, status
            )
            print(
                f"The MLflow server {self.server} has not all of this run ({problem.rstrip('.')}). Nothing is lost: it "
                f"is in {self.uri}; send the rest with: {_sync_command(self.cfg.tracking)}"
                if problem
                else f"MLflow copy      {self.copy.run_id} on {self.server}"
            )

    def _complete(self, client: "MlflowClient", server: str, status: str) -> str | None:
        """Sends what the server has not got; why that failed, if it did."""

        def work() -> str:
            if self.copy.client:  # waits for MLflow's threads, so that no metric is sent twice
                self.copy.client.set_terminated(self.copy.run_id, status)
            return send(client, remote, self.run_id)

        from mlflow import MlflowClient

        remote = MlflowClient(server)
        copy_id = within(END_SECONDS, work)
        if isinstance(copy_id, Exception):
            return first_line(copy_id)
        self.copy = Run(remote, copy_id, server)
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
