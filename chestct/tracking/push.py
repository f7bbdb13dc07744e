"""Sends the runs of the local store to a server: what was trained offline, and what a server missed."""

from pathlib import Path
from typing import TYPE_CHECKING

from chestct.config.schema import Config
from chestct.errors import ConfigError
from chestct.tracking.mirror import Copy, DeletedThereError, first_line
from chestct.tracking.run import FOLDER, LOCK_FILE
from chestct.tracking.server import TrackingError, local_uri, probe, server_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun


def push(cfg: Config) -> int:
    """Sends every finished run of tracking.local to the server of the settings; returns how many are there now.

    May be called again at any time: what the server has is not sent again, and a transfer that was cut short goes on.
    Raises ConfigError without a server, TrackingError where it cannot be used.
    """
    from filelock import FileLock, Timeout
    from mlflow import MlflowClient

    server = server_uri(cfg.tracking)
    if server is None:
        raise ConfigError("push needs a server: tracking.uri=https://..., or tracking=dagshub with owner and repo.")
    if problem := probe(server, cfg.tracking.experiment):
        raise TrackingError(problem)
    cfg.cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cfg.cache / "push.lock", timeout=0):
            return _push(MlflowClient(local_uri(cfg.tracking)), MlflowClient(server), server)
    except Timeout:
        raise TrackingError("Another push is under way. Wait for it: it sends the same runs.") from None


def _push(local: "MlflowClient", remote: "MlflowClient", server: str) -> int:
    from mlflow.exceptions import MlflowException

    runs = _local_runs(local)
    finished = [run for run in runs if not _still_running(local, run)]
    sent = 0
    for run in finished:
        copy = Copy(local, remote, run.info.run_id)
        try:
            copy.send(artifacts=True)
        except DeletedThereError:
            print(f"{run.info.run_id}  {run.info.run_name}: was deleted on the server, and stays so")
            continue
        except (MlflowException, OSError) as error:
            raise TrackingError(
                f"{sent} of {len(finished)} runs are on {server}; then: {first_line(error)}. Run push again to go on."
            ) from None
        sent += 1
        print(f"{run.info.run_id}  {run.info.run_name} -> {copy.copy_id}")
    if len(finished) < len(runs):
        print(f"{len(runs) - len(finished)} still running: left to the trainings that write them")
    print(f"{sent} runs are on {server}")
    return sent


def _local_runs(local: "MlflowClient") -> "list[MlflowRun]":
    """Oldest first, so that the parent of a sweep comes before its children."""
    experiments = [e.experiment_id for e in local.search_experiments()]
    found, token = [], None
    while True:
        page = local.search_runs(experiments, order_by=["attributes.start_time ASC"], page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _still_running(local: "MlflowClient", run: "MlflowRun") -> bool:
    """Whether a process is writing the run. One that was killed left its lock behind, free: its run ends here."""
    from filelock import FileLock, Timeout

    if run.info.status != "RUNNING":
        return False
    lock = Path(run.data.tags.get(FOLDER, "")) / LOCK_FILE
    if not lock.is_file():
        return True
    try:
        with FileLock(lock, timeout=0):
            local.set_terminated(run.info.run_id, "KILLED")
    except Timeout:
        return True
    return False
