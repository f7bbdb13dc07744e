"""Copies of local runs on a server.

The local store is the truth and the server is brought up to date with it. What is on the server is read, never
remembered, so that a copy that was cut short goes on where it stopped, and sending twice makes nothing twice.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chestct.config.schema import Config
from chestct.errors import ConfigError
from chestct.files import file_digest, json_digest
from chestct.tracking.local_store import TrackingError, first_line, local_uri
from chestct.tracking.remote_store import probe, refuse_elsewhere, server_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities import Run as MlflowRun

ORIGIN = "chestct.origin"  # tag: id of the local run that this is a copy of, or goes on with
ARTIFACTS = "chestct.artifacts"  # tag: hash of all artifacts, and `sending` until all are there
FOLDER = "folder"  # tag: the run folder on the machine that trained
PARENT = "mlflow.parentRunId"
KIND = {"mlflow.experimentKind": "custom_model_development"}  # else MLflow's page shows it as one of language models
LOCK_FILE = ".lock"
RUN_ID = re.compile("[0-9a-f]{32}")


class DeletedThereError(Exception):
    """Somebody deleted the copy on the server: it is not made again."""

    def __str__(self) -> str:
        return "the run was deleted on the server, and stays so"


def sync(cfg: Config) -> int:
    """Sends every finished run of the local store to the server of the settings; returns how many are there now.

    May be called again at any time: what the server has is not sent again, and a transfer that was cut short goes on.
    Raises ConfigError without a server, TrackingError where it cannot be used.
    """
    from filelock import FileLock, Timeout
    from mlflow import MlflowClient

    server = server_uri(cfg.tracking)
    if server is None:
        raise ConfigError(
            "Which server? tracking.uri=https://..., MLFLOW_TRACKING_URI in the environment, or tracking=dagshub with "
            "tracking.owner and tracking.repo."
        )
    if problem := probe(server, cfg.tracking.experiment):
        raise TrackingError(problem)
    cfg.cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cfg.cache / "sync.lock", timeout=0):
            return _send_all(MlflowClient(local_uri(cfg.tracking)), MlflowClient(server))
    except Timeout:
        raise TrackingError("Another process sends these runs already. Wait for it.") from None


def send(local: "MlflowClient", remote: "MlflowClient", run_id: str, artifacts: bool = True) -> str:
    """Sends what the server lacks of a run; returns the id of its copy.

    Raises MlflowException where the server does not answer, DeletedThereError, ConfigError where the server wants
    artifacts elsewhere.
    """
    from mlflow.entities import Param, RunTag

    run = local.get_run(run_id)
    copy = _find_or_create(local, remote, run)
    copy_id, sent = copy.info.run_id, set(map(_key, _history(remote, copy)))
    remote.log_batch(
        copy_id,
        [metric for metric in _history(local, run) if _key(metric) not in sent],
        [Param(key, value) for key, value in run.data.params.items() if key not in copy.data.params],
        [RunTag(key, value) for key, value in _tags(remote, copy, run).items() if copy.data.tags.get(key) != value],
    )
    known = {(one.dataset.name, one.dataset.digest) for one in copy.inputs.dataset_inputs}
    if inputs := [i for i in run.inputs.dataset_inputs if (i.dataset.name, i.dataset.digest) not in known]:
        remote.log_inputs(copy_id, inputs)
    if artifacts:
        _send_artifacts(local, remote, run_id, copy)
    if copy.info.status != run.info.status:
        if run.info.status == "RUNNING":
            remote.update_run(copy_id, status="RUNNING")
        else:
            remote.set_terminated(copy_id, run.info.status, run.info.end_time)
    return copy_id


def experiment_id(client: "MlflowClient", name: str, artifacts: str | None = None) -> str:
    """The experiment of that name, made where there is none; safe when several processes do so at once.

    artifacts: where a new one keeps its artifacts, if the client shall not choose.
    """
    from mlflow.exceptions import MlflowException

    known = client.get_experiment_by_name(name)
    if known is None:
        try:
            return client.create_experiment(name, artifacts, KIND)
        except MlflowException:
            known = client.get_experiment_by_name(name)
            if known is None:
                raise
    return known.experiment_id


def begun_as(run: "MlflowRun") -> str:
    """Id of the run that this is a copy of or goes on with, else its own. The tag is anybody's who can write there."""
    origin = run.data.tags.get(ORIGIN, "")
    return origin if RUN_ID.fullmatch(origin) else run.info.run_id


def _send_all(local: "MlflowClient", remote: "MlflowClient") -> int:
    from mlflow.exceptions import MlflowException

    server = remote.tracking_uri
    runs = list(_local_runs(local))
    finished = [run for run in runs if not _still_running(local, run)]
    sent = 0
    for run in finished:
        try:
            copy_id = send(local, remote, run.info.run_id)
        except DeletedThereError as error:
            print(f"{run.info.run_id}  {run.info.run_name}: {error}")
            continue
        except (MlflowException, OSError) as error:
            raise TrackingError(
                f"{sent} of {len(finished)} runs are on {server}; then: {first_line(error)}. The same command goes on."
            ) from None
        sent += 1
        print(f"{run.info.run_id}  {run.info.run_name} -> {copy_id}")
    if len(finished) < len(runs):
        print(f"{len(runs) - len(finished)} still running: left to the trainings that write them")
    print(f"{sent} runs are on {server}")
    return sent


def _local_runs(local: "MlflowClient") -> "Iterator[MlflowRun]":
    """Oldest first, so that the parent of a sweep comes before its children."""
    experiments, token = [e.experiment_id for e in local.search_experiments()], None
    while True:
        page = local.search_runs(experiments, order_by=["attributes.start_time ASC"], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


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


def _find_or_create(local: "MlflowClient", remote: "MlflowClient", run: "MlflowRun") -> "MlflowRun":
    experiment = experiment_id(remote, local.get_experiment(run.info.experiment_id).name)
    run_id, origin = run.info.run_id, begun_as(run)
    copy = None
    if origin != run_id:  # a run that began on another machine has a copy already, which goes on, unless it was deleted
        copy = _find(remote, experiment, origin)
        copy = None if copy and copy.info.lifecycle_stage == "deleted" else copy
    copy = copy or _find(remote, experiment, run_id)
    if copy is None:  # the tag comes with the run: no copy is ever without it
        copy = remote.create_run(experiment, run.info.start_time, {ORIGIN: run_id}, run.info.run_name)
    if copy.info.lifecycle_stage == "deleted":
        raise DeletedThereError
    return copy


def _find(client: "MlflowClient", experiment: str, run_id: str) -> "MlflowRun | None":
    """The copy of a local run, deleted ones included."""
    from mlflow.entities import ViewType

    runs = client.search_runs([experiment], f"tags.`{ORIGIN}` = '{run_id}'", ViewType.ALL, max_results=1)
    return runs[0] if runs else None


def _tags(remote: "MlflowClient", copy: "MlflowRun", run: "MlflowRun") -> dict[str, str]:
    tags = {key: value for key, value in run.data.tags.items() if key != ORIGIN}
    if PARENT in tags:
        parent = _find(remote, copy.info.experiment_id, tags.pop(PARENT))
        tags |= {PARENT: parent.info.run_id} if parent else {}
    return tags


def _send_artifacts(local: "MlflowClient", remote: "MlflowClient", run_id: str, copy: "MlflowRun") -> None:
    if not local.list_artifacts(run_id):
        return
    refuse_elsewhere(copy.info.artifact_uri, remote.tracking_uri)
    copy_id = copy.info.run_id
    root = Path(local.download_artifacts(run_id, ""))  # where they lie, for a local store
    files = sorted(path for path in root.rglob("*") if path.is_file())
    digest = json_digest({path.relative_to(root).as_posix(): file_digest(path) for path in files})
    state = copy.data.tags.get(ARTIFACTS, "")
    if state == digest:
        return
    # Sizes show what an interrupted transfer lacks; after a change of contents they show nothing.
    known = dict(_sizes(remote, copy_id)) if state == f"{digest} sending" else {}
    remote.set_tag(copy_id, ARTIFACTS, f"{digest} sending")
    for path in files:
        name = path.relative_to(root)
        if known.get(name.as_posix()) != path.stat().st_size:
            remote.log_artifact(copy_id, str(path), name.parent.as_posix() if name.parent != Path() else None)
    remote.set_tag(copy_id, ARTIFACTS, digest)


def _history(client: "MlflowClient", run: "MlflowRun") -> "list[Metric]":
    return [metric for key in run.data.metrics for metric in client.get_metric_history(run.info.run_id, key)]


def _key(metric: "Metric") -> tuple[Any, ...]:
    # Without the time: both loggers write the same value, each at its own. NaN differs from itself, its text does not.
    return metric.key, metric.step, repr(metric.value)


def _sizes(client: "MlflowClient", run_id: str, folder: str | None = None) -> Iterator[tuple[str, int]]:
    for item in client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from _sizes(client, run_id, item.path)
        else:
            yield item.path, item.file_size
