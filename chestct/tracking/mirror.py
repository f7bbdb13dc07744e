"""Copies of local runs on a server: one that grows while a run trains, and any number afterwards.

The local store is the truth and the server is brought up to date with it. What is there already is asked for, never
remembered, so that a copy that was cut short goes on where it stopped, and sending twice makes nothing twice.
"""

import hashlib
import math
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities import Run as MlflowRun

ORIGIN = "chestct.origin"  # tag: id of the local run that this is a copy of, or goes on with
ARTIFACTS = "chestct.artifacts"  # tag: hash of all artifacts, and `sending` until all are there
PARENT = "mlflow.parentRunId"
KIND = {"mlflow.experimentKind": "custom_model_development"}  # else MLflow's page shows it as one of language models

SYNC_SECONDS = 5.0
SHARE = 0.02  # of a processor, at most: long histories are read less often
PATIENCE = {True: 60.0, False: 3.0}  # seconds that the end of a run waits for a server that is well, or not


class DeletedThereError(Exception):
    """Somebody deleted the copy on the server: it is not made again."""


class Copy:
    """The copy of one run; `send` brings it up to date and may be called again at any time."""

    def __init__(self, local: "MlflowClient", remote: "MlflowClient", run_id: str) -> None:
        self.local, self.remote, self.run_id = local, remote, run_id
        self.copy_id = ""
        self.sent: set[tuple] = set()  # metrics that the server has, see _key

    def send(self, artifacts: bool) -> None:
        """Sends what the server lacks. Raises MlflowException where it does not answer, DeletedThereError."""
        from mlflow.entities import Param, RunTag

        run = self.local.get_run(self.run_id)
        if not self.copy_id:
            self._find_or_create(run)
        there = self.remote.get_run(self.copy_id)
        if there.info.lifecycle_stage == "deleted":
            raise DeletedThereError
        params = [Param(k, v) for k, v in run.data.params.items() if k not in there.data.params]
        tags = [RunTag(k, v) for k, v in self._tags(run).items() if there.data.tags.get(k) != v]
        metrics = [m for m in _history(self.local, run) if _key(m) not in self.sent]
        self.remote.log_batch(self.copy_id, metrics, params, tags)
        self.sent.update(map(_key, metrics))
        known = {(i.dataset.name, i.dataset.digest) for i in there.inputs.dataset_inputs}
        inputs = [i for i in run.inputs.dataset_inputs if (i.dataset.name, i.dataset.digest) not in known]
        if inputs:
            self.remote.log_inputs(self.copy_id, inputs)
        if artifacts:
            self._send_artifacts(there)
        if there.info.status != run.info.status:
            if run.info.status == "RUNNING":
                self.remote.update_run(self.copy_id, status="RUNNING")
            else:
                self.remote.set_terminated(self.copy_id, run.info.status, run.info.end_time)

    def _find_or_create(self, run: "MlflowRun") -> None:
        experiment = experiment_id(self.remote, self.local.get_experiment(run.info.experiment_id).name)
        # A run that began on another machine has a copy already, which goes on, unless it was deleted.
        begun = run.data.tags.get(ORIGIN)
        found = find_copy(self.remote, experiment, begun) if begun else None
        if found is None or found.info.lifecycle_stage == "deleted":
            found = find_copy(self.remote, experiment, self.run_id)
        if found is None:  # the tag comes with the run: no copy is ever without it
            tags = {ORIGIN: self.run_id}
            found = self.remote.create_run(experiment, run.info.start_time, tags, run.info.run_name)
        else:
            self.sent = {_key(metric) for metric in _history(self.remote, found)}
        self.copy_id = found.info.run_id

    def _tags(self, run: "MlflowRun") -> dict[str, str]:
        tags = {key: value for key, value in run.data.tags.items() if key != ORIGIN}
        if PARENT in tags:
            experiment = self.remote.get_run(self.copy_id).info.experiment_id
            parent = find_copy(self.remote, experiment, tags.pop(PARENT))
            tags |= {PARENT: parent.info.run_id} if parent else {}
        return tags

    def _send_artifacts(self, there: "MlflowRun") -> None:
        if not self.local.list_artifacts(self.run_id):
            return
        root = Path(self.local.download_artifacts(self.run_id, ""))  # where they lie, for a local store
        files = sorted(path for path in root.rglob("*") if path.is_file())
        digest = _digest(root, files)
        state = there.data.tags.get(ARTIFACTS, "")
        if state == digest:
            return
        # Sizes tell what an interrupted transfer lacks; after a change of contents they tell nothing.
        known = dict(_sizes(self.remote, self.copy_id)) if state == f"{digest} sending" else {}
        self.remote.set_tag(self.copy_id, ARTIFACTS, f"{digest} sending")
        for path in files:
            name = path.relative_to(root)
            if known.get(name.as_posix()) != path.stat().st_size:
                folder = name.parent.as_posix() if name.parent != Path() else None
                self.remote.log_artifact(self.copy_id, str(path), folder)
        self.remote.set_tag(self.copy_id, ARTIFACTS, digest)


class Mirror:
    """Keeps a copy up to date from a thread, until `finish`. The thread's troubles never reach the run."""

    def __init__(self, copy: Copy) -> None:
        self.copy = copy
        self.problem = ""
        self._began = math.inf  # when the transfer under way began
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def finish(self) -> bool:
        """Whether all is on the server; waits for that, but not for a server that is in trouble."""
        well = not self.problem and time.monotonic() - self._began < PATIENCE[False]
        self._end.set()
        self._thread.join(PATIENCE[well])
        if self._thread.is_alive():
            self.problem = self.problem or "it takes too long"
        return not self.problem

    def _work(self) -> None:
        while not self._end.is_set():
            began = time.thread_time()
            self._send(artifacts=False)
            self._end.wait(max(SYNC_SECONDS, (time.thread_time() - began) / SHARE))
        self._send(artifacts=True)

    def _send(self, artifacts: bool) -> None:
        self._began = time.monotonic()
        try:
            self.copy.send(artifacts)
            self.problem = ""
        except DeletedThereError:
            self.problem = "the run was deleted there"
        except Exception as error:  # whatever a server does, the run goes on
            self.problem = first_line(error)
        self._began = math.inf


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def experiment_id(client: "MlflowClient", name: str, artifacts: str | None = None) -> str:
    """The experiment of that name, made where there is none; safe when several processes ask at once.

    artifacts: where a new one keeps its artifacts, if the client shall not choose.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifacts, KIND)
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def find_copy(client: "MlflowClient", experiment: str, run_id: str) -> "MlflowRun | None":
    """The copy of a local run, deleted ones included."""
    from mlflow.entities import ViewType

    found = client.search_runs([experiment], f"tags.`{ORIGIN}` = '{run_id}'", ViewType.ALL, max_results=1)
    return found[0] if found else None


def _history(client: "MlflowClient", run: "MlflowRun") -> "list[Metric]":
    return [m for key in run.data.metrics for m in client.get_metric_history(run.info.run_id, key)]


def _key(metric: "Metric") -> tuple[Any, ...]:
    return metric.key, metric.step, metric.timestamp, repr(metric.value)  # nan differs from itself, its text does not


def _sizes(client: "MlflowClient", run_id: str, folder: str | None = None) -> Iterator[tuple[str, int]]:
    for item in client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from _sizes(client, run_id, item.path)
        else:
            yield item.path, item.file_size


def _digest(root: Path, files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for path in files:
        found.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return found.hexdigest()
