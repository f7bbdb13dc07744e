"""Copies of local runs on a server.

The local store is the truth and the server is brought up to date with it. What is on the server is read, never
remembered, so that the same command completes a copy that was cut short, and sending twice makes nothing twice.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from chestct.config.schema import Config
from chestct.errors import ConfigError
from chestct.files import file_digest, json_digest
from chestct.tracking.stores import (
    PROBE_SECONDS,
    TrackingError,
    local_uri,
    prepare,
    probe,
    reason,
    refuse_elsewhere,
    server_uri,
    store_file,
    use_experiment,
    within,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities import Run as MlflowRun

ORIGIN = "chestct.origin"  # tag: id of the local run that this is a copy of
ARTIFACTS = "chestct.artifacts"  # tag: hash of all artifacts, once they are there
PARENT = "mlflow.parentRunId"


def sync(cfg: Config) -> int:
    """Sends every run of the local store to the server of the settings; returns how many are there now.

    May be called again at any time. Raises ConfigError without a server, TrackingError where it cannot be used.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    server = server_uri(cfg.tracking)
    if server is None:
        raise ConfigError(
            "Which server? tracking.uri=https://..., MLFLOW_TRACKING_URI in the environment, or tracking=dagshub with "
            "tracking.owner and tracking.repo."
        )
    uri = local_uri(cfg.tracking)
    if (file := store_file(uri)) and not file.is_file():
        raise TrackingError(
            f"There is no store {file} to send runs of. Call this where the runs were made, or name their store with "
            "tracking.local=sqlite:///FILE."
        )
    prepare(uri)
    local, remote = MlflowClient(uri), MlflowClient(server)
    sent, total, left, gone = 0, 0, [], None
    for experiment in local.search_experiments():
        # Oldest first, so that the parent of a sweep comes before its children.
        oldest = ["attributes.start_time ASC"]
        runs = local.search_runs([experiment.experiment_id], max_results=50_000, order_by=oldest)
        total += len(runs)
        problem = gone or (probe(server, experiment.name) if runs else None)
        for run in runs:
            if problem:
                break
            try:
                copy_id = send(local, remote, run.info.run_id)
            except (MlflowException, ConfigError, OSError) as error:
                left.append(f"{run.info.run_id}: {reason(error)}.")
                problem = probe(server, experiment.name)  # is it the run, or is the server gone?
                continue
            print(f"{run.info.run_id}  {run.info.run_name} -> {copy_id or 'deleted on the server, and stays so'}")
            sent += copy_id is not None
        if problem and not gone:
            left.append(problem)
            # An experiment may be deleted there, or another user's. A server that is gone is asked once, not for each.
            known = within(PROBE_SECONDS, remote.search_experiments)
            gone = problem if isinstance(known, Exception) else None
    if not total and (problem := probe(server, cfg.tracking.experiment)):
        raise TrackingError(problem)
    if left:
        reasons = "\n".join(dict.fromkeys(left))
        raise TrackingError(f"{sent} of {total} runs are on {server}.\n{reasons}\nThe same command goes on.")
    print(f"{sent} runs are on {server}")
    return sent


def send(local: "MlflowClient", remote: "MlflowClient", run_id: str, artifacts: bool = True) -> str | None:
    """Sends what the server lacks of a run; returns the id of its copy, None where that was deleted there.

    Raises MlflowException where the server does not answer, ConfigError where it wants artifacts elsewhere.
    """
    from mlflow.entities import Param, RunTag

    run = local.get_run(run_id)
    experiment = use_experiment(remote, local.get_experiment(run.info.experiment_id).name)
    copy = _copy_of(remote, experiment, run_id) or remote.create_run(
        experiment, run.info.start_time, {ORIGIN: run_id}, run.info.run_name
    )
    copy_id = copy.info.run_id
    if copy.info.lifecycle_stage == "deleted":
        return None
    sent = set(map(_key, _history(remote, copy)))
    tags = run.data.tags
    if parent := PARENT in tags and _copy_of(remote, experiment, tags[PARENT]):
        tags = {**tags, PARENT: parent.info.run_id}
    remote.log_batch(
        copy_id,
        [metric for metric in _history(local, run) if _key(metric) not in sent],
        [Param(key, value) for key, value in run.data.params.items()],
        [RunTag(key, value) for key, value in tags.items()],
    )
    if artifacts and local.list_artifacts(run_id):
        refuse_elsewhere(copy.info.artifact_uri, remote.tracking_uri)
        root = Path(local.download_artifacts(run_id, ""))  # where they lie, for a local store
        files = sorted(path for path in root.rglob("*") if path.is_file())
        digest = json_digest({path.relative_to(root).as_posix(): file_digest(path) for path in files})
        if copy.data.tags.get(ARTIFACTS) != digest:
            remote.log_artifacts(copy_id, str(root))
            remote.set_tag(copy_id, ARTIFACTS, digest)
    if run.info.status == "RUNNING":
        remote.update_run(copy_id, status="RUNNING")
    elif copy.info.status != run.info.status:
        remote.set_terminated(copy_id, run.info.status, run.info.end_time)
    return copy_id


def _copy_of(client: "MlflowClient", experiment: str, run_id: str) -> "MlflowRun | None":
    """The copy of a local run, deleted ones included."""
    from mlflow.entities import ViewType

    runs = client.search_runs([experiment], f"tags.`{ORIGIN}` = '{run_id}'", ViewType.ALL, max_results=1)
    return runs[0] if runs else None


def _history(client: "MlflowClient", run: "MlflowRun") -> "list[Metric]":
    return [metric for key in run.data.metrics for metric in client.get_metric_history(run.info.run_id, key)]


def _key(metric: "Metric") -> tuple[Any, ...]:
    # Without the time: both loggers write the same value, each at its own. NaN differs from itself, its text does not.
    return metric.key, metric.step, repr(metric.value)
