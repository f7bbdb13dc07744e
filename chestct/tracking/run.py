"""The run that a training or an evaluation writes to.

Everything goes through one `Run`, which always writes to the store on this machine; open_run says whether a server gets
a copy while it lasts. A run belongs to a folder, where its id is noted, so that a resumed training goes on with it.
"""

import json
import logging
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from chestct.config.schema import Config, TrackingConfig, leaves
from chestct.errors import ChestCTError
from chestct.tracking.bundle import ALIAS, BUNDLE, register
from chestct.tracking.mirror import ORIGIN, PARENT, Copy, DeletedThereError, Mirror, experiment_id, first_line
from chestct.tracking.server import TrackingError, local_uri, probe, server_uri, store_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from chestct.tracking.logger import RunLogger

RUN_ID_FILE = "mlflow_run_id.txt"
LOCK_FILE = ".lock"
FOLDER = "folder"  # tag: the run folder on the machine that trained


class Run:
    """One MLflow run; without a client (tracking=off) every method does nothing."""

    def __init__(self, client: "MlflowClient | None" = None, run_id: str = "", uri: str = "") -> None:
        self.client, self.run_id, self.uri = client, run_id, uri

    def logger(self) -> "RunLogger | None":
        """For Lightning's Trainer: writes what modules log into this run."""
        if self.client is None:
            return None
        from chestct.tracking.logger import RunLogger

        return RunLogger(self.client, self.run_id)

    def tags(self, tags: Mapping[str, object]) -> None:
        from mlflow.entities import RunTag

        if self.client:
            self.client.log_batch(self.run_id, tags=[RunTag(key, str(value)[:5000]) for key, value in tags.items()])

    def metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        from mlflow.entities import Metric

        if self.client:
            now = int(time.time() * 1000)
            self.client.log_batch(self.run_id, [Metric(k, float(v), now, step) for k, v in metrics.items()])

    def settings(self, cfg: Config) -> None:
        """Every resolved setting as a parameter; MLflow keeps the first value if a resumed run changes one."""
        from mlflow.entities import Param

        if self.client:
            there = self.client.get_run(self.run_id).data.params
            flat = {key: str(value)[:6000] for key, value, _ in leaves(cfg) if key not in there}
            self.client.log_batch(self.run_id, params=[Param(key, value) for key, value in flat.items()])

    def artifacts(self, path: Path, folder: str | None = None) -> None:
        """A file, or everything in a folder."""
        if self.client:
            send = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
            send(self.run_id, str(path), folder)

    def evaluation(self, which: str, values: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """The report's folder, and the numbers of each split as `WHICH/SPLIT/NAME`.

        which: the checkpoint, best or last; values: split -> name -> number, or None where one is not defined.
        """
        flat = {f"{which}/{split}/{name}": value for split, part in values.items() for name, value in part.items()}
        self.metrics({key: value for key, value in flat.items() if value is not None})
        self.artifacts(folder, "evaluation")

    def data(self, name: str, digest: str, source: str, profile: Mapping[str, object]) -> None:
        """The data that the run used: their hash, where they lie and how many slices stand in which split."""
        from mlflow.entities import Dataset, DatasetInput

        if self.client:
            # MLflow keeps 36 characters of a digest.
            found = Dataset(name, digest[:36], "local", json.dumps({"uri": source}), profile=json.dumps(profile))
            self.client.log_inputs(self.run_id, [DatasetInput(found)])


@contextmanager
def open_run(cfg: Config, out: Path, sweep: bool = False) -> Iterator[Run]:
    """The run that belongs to the folder `out`: the one noted there if it is resumed, else a new one.

    A training is resumed with cfg.ckpt or by its sweep; a sweep (whose jobs have folders in `out`) always.

    Ends as FINISHED, as KILLED when it was interrupted, as FAILED on any error. Raises TrackingError where a server
    cannot be used and tracking.required=true.
    """
    if cfg.tracking.name == "off":
        yield Run()
        return
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    server = _usable_server(cfg.tracking)
    uri = local_uri(cfg.tracking)
    try:
        run = _start(cfg, uri, out, sweep)
    except MlflowException as error:
        raise TrackingError(f"MLflow cannot use {uri}: {first_line(error)} Set tracking.uri or tracking=off.") from None
    assert run.client is not None
    run.settings(cfg)
    run.tags(code_version() | _called_by() | {FOLDER: out.resolve()})
    mirror = Mirror(Copy(run.client, MlflowClient(server), run.run_id)) if server else None
    status = "FAILED"
    try:
        with _system_metrics(cfg.tracking, run):
            yield run
        status = "FINISHED"
        _register(run, cfg.tracking.register)
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        run.client.set_terminated(run.run_id, status)
        if mirror and _say_how_it_ended(mirror, cfg.tracking) and status == "FINISHED":
            _register(Run(mirror.copy.remote, mirror.copy.copy_id, str(server)), cfg.tracking.register)


@contextmanager
def run_of(cfg: Config, ckpt: Path) -> Iterator[Run]:
    """The run that a checkpoint belongs to, which may long have ended, to add something to it.

    Says so; where the run or its store is not there, it says that, and gives a run that records nothing.
    """
    note = ckpt.resolve().with_name(RUN_ID_FILE)
    if cfg.tracking.name == "off" or not note.is_file():
        yield Run()
        return
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    run_id, uri, run = note.read_text().strip(), cfg.tracking.local, Run()
    try:
        uri = local_uri(cfg.tracking)
        if (file := store_file(uri)) and not file.is_file():
            raise TrackingError("there is no such store")  # asking would make one
        client = MlflowClient(uri)
        if client.get_run(run_id).info.lifecycle_stage == "deleted":
            raise TrackingError("it was deleted")
        run = Run(client, run_id, uri)
        yield run
        _register(run, cfg.tracking.register)
        if server := _usable_server(cfg.tracking):
            copy = Copy(client, MlflowClient(server), run_id)
            copy.send(artifacts=True)
            _register(Run(copy.remote, copy.copy_id, server), cfg.tracking.register)
        print(f"MLflow run {run_id} in {uri} (make ui)")
    except (MlflowException, ChestCTError, DeletedThereError, OSError) as error:
        print(f"Not added to the MLflow run {run_id} in {uri}: {first_line(error)}")
        if run.client is None:
            yield run


def _register(run: Run, name: str | None) -> None:
    """Gives the run's bundle its name, where it has both; a name that cannot be given is said, and the run stands."""
    from mlflow.exceptions import MlflowException

    try:
        if run.client is None or not name or not run.client.list_artifacts(run.run_id, BUNDLE):
            return
        version = register(run.client, run.run_id, name)
    except MlflowException as error:
        print(f"Not registered as {name} in {run.uri}: {first_line(error)}")
    else:
        print(f"registered       bundle=models:/{name}@{ALIAS} is now version {version} in {run.uri}")


def _start(cfg: Config, uri: str, out: Path, sweep: bool) -> Run:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(uri)
    # Beside the checkpoints, so that it goes where they go: DVC removes, restores and shares them as one.
    note = (out if sweep else out / "checkpoints") / RUN_ID_FILE
    parent = out.parent / RUN_ID_FILE
    tags = {}
    if note.is_file() and (sweep or cfg.ckpt or parent.is_file()):
        run_id = note.read_text().strip()
        try:
            client.update_run(run_id, status="RUNNING")
            return Run(client, run_id, uri)
        except MlflowException:
            print(f"The MLflow run {run_id} of this folder is not in {uri}, or was deleted; a new run is recorded.")
            tags[ORIGIN] = run_id
    name = cfg.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"The MLflow experiment '{name}' was deleted in {uri}. Restore it, or choose another with "
            "tracking.experiment=NAME."
        )
    file = store_file(uri)  # MLflow would keep artifacts in the working directory, which DVC may remove
    artifacts = str(file.resolve().parent / "mlruns" / quote(name, safe="")) if file else None
    experiment = experiment_id(client, name, artifacts)
    given = out.name if sweep else os.environ.get("DVC_EXP_NAME")
    if not sweep and parent.is_file():
        tags[PARENT] = parent.read_text().strip()
        given = f"{out.parent.name} {out.name}"
    run_id = client.create_run(experiment, tags=tags, run_name=cfg.tracking.run_name or given).info.run_id
    note.parent.mkdir(parents=True, exist_ok=True)
    fresh = note.with_suffix(".new")
    fresh.write_text(run_id + "\n")
    fresh.replace(note)
    return Run(client, run_id, uri)


def _usable_server(cfg: TrackingConfig) -> str | None:
    """The server that gets a copy; None where none is asked for, or it cannot be used and need not be."""
    server = server_uri(cfg)
    problem = probe(server, cfg.experiment) if server else None
    if problem is None:
        return server
    if cfg.required:
        raise TrackingError(f"{problem} Set tracking.required=false to go on with the local store {cfg.local}.")
    print(f"{problem} This run is recorded in {cfg.local}; send it later with: {_push_command(cfg)}")
    return None


def _push_command(cfg: TrackingConfig) -> str:
    where = (
        f"tracking=dagshub tracking.owner={cfg.owner} tracking.repo={cfg.repo}"
        if cfg.name == "dagshub"
        else f"tracking.uri={cfg.uri}"
    )
    where += "" if cfg.local == TrackingConfig().local else f" tracking.local={cfg.local}"
    return f"chestct sync {where}"


def _say_how_it_ended(mirror: Mirror, cfg: TrackingConfig) -> bool:
    """Whether all of the run is on the server, which is told too."""
    server = server_uri(cfg)
    if mirror.finish():
        print(f"MLflow copy      {mirror.copy.copy_id} on {server}")
        return True
    print(
        f"The MLflow server {server} has not all of this run ({mirror.problem}). Nothing is lost: it is in "
        f"{cfg.local}; send the rest with: {_push_command(cfg)}"
    )
    return False


@contextmanager
def _system_metrics(cfg: TrackingConfig, run: Run) -> Iterator[None]:
    """MLflow's own monitor of processor, memory, disk, network and GPU, where it is asked for."""
    if not cfg.system_metrics:
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
    monitor = SystemMetricsMonitor(run.run_id, resume_logging=True, tracking_uri=run.uri)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


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
