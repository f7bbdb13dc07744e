"""Runs in MLflow: what was set, what came out, from which code and data.

Everything goes through one `Run`. A server is probed before training, because MLflow's client retries for minutes
where none answers; a run that may not use its server goes on in the local store and says so. Nothing phones home.
"""

import base64
import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chestct.config import Config, TrackingConfig, leaves
from chestct.errors import ChestCTError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import MLFlowLogger
    from mlflow import MlflowClient

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported

LOCAL = TrackingConfig().uri
RUN_ID_FILE = "mlflow_run_id.txt"
PROBE_SECONDS = 5.0


class TrackingError(ChestCTError):
    """A tracking server that cannot be used, though `tracking.required=true`."""


class Run:
    """One MLflow run; without a client (tracking=off) every method does nothing."""

    def __init__(self, client: "MlflowClient | None" = None, run_id: str = "", uri: str = "") -> None:
        self.client, self.run_id, self.uri = client, run_id, uri

    def logger(self) -> "MLFlowLogger | None":
        """For Lightning's Trainer: writes what modules log into this run."""
        if self.client is None:
            return None
        from lightning.pytorch.loggers import MLFlowLogger

        return MLFlowLogger(tracking_uri=self.uri, run_id=self.run_id)

    def tags(self, tags: Mapping[str, object]) -> None:
        if self.client:
            for key, value in tags.items():
                self.client.set_tag(self.run_id, key, str(value))

    def metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        from mlflow.entities import Metric

        if self.client:
            self.client.log_batch(self.run_id, [Metric(k, float(v), 0, step) for k, v in metrics.items()])

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

    def data(self, name: str, digest: str, source: str, profile: Mapping[str, object]) -> None:
        """The data that the run used: their hash, where they lie and how many slices stand in which split."""
        from mlflow.entities import Dataset, DatasetInput

        if self.client:
            # MLflow keeps 36 characters of a digest.
            found = Dataset(name, digest[:36], "local", json.dumps({"uri": source}), profile=json.dumps(profile))
            self.client.log_inputs(self.run_id, [DatasetInput(found)])


@contextmanager
def open_run(cfg: Config, out: Path) -> Iterator[Run]:
    """The run that belongs to the folder `out`: the one noted there if it is resumed, else a new one.

    Ends as FINISHED, as KILLED when it was interrupted, as FAILED on any error. Raises TrackingError where a server
    cannot be used and tracking.required=true.
    """
    if cfg.tracking.name == "off":
        yield Run()
        return
    from mlflow.exceptions import MlflowException

    uri = _usable_uri(cfg.tracking)
    try:
        run = _start(cfg.tracking, uri, out)
    except MlflowException as error:
        raise TrackingError(
            f"MLflow cannot use {uri}: {str(error).splitlines()[0]} Set tracking.uri or tracking=off."
        ) from None
    run.settings(cfg)
    run.tags(code_version())
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        assert run.client is not None
        run.client.set_terminated(run.run_id, status)


def _start(cfg: TrackingConfig, uri: str, out: Path) -> Run:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(uri)
    note = out / RUN_ID_FILE
    if note.is_file():
        run_id = note.read_text().strip()
        try:
            client.update_run(run_id, status="RUNNING")
            return Run(client, run_id, uri)
        except MlflowException:
            print(f"The MLflow run {run_id} of this folder is not in {uri} any more; a new run is recorded.")
    found = client.get_experiment_by_name(cfg.experiment)
    if found is not None and found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"The MLflow experiment '{cfg.experiment}' was deleted in {uri}. Restore it, or choose another with "
            "tracking.experiment=NAME."
        )
    experiment = found.experiment_id if found else client.create_experiment(cfg.experiment)
    run_id = client.create_run(experiment, run_name=cfg.run_name).info.run_id
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(run_id + "\n")
    return Run(client, run_id, uri)


def _usable_uri(cfg: TrackingConfig) -> str:
    """The URI asked for, or the local store where its server cannot be used and need not be."""
    if not cfg.uri.startswith(("http://", "https://")):
        return cfg.uri
    problem = probe(cfg.uri)
    if problem is None:
        return cfg.uri
    if cfg.required:
        raise TrackingError(f"{problem} Set tracking.required=false to go on with the local store {LOCAL}.")
    print(f"{problem} This run is recorded in {LOCAL} instead.")
    return LOCAL


def probe(uri: str) -> str | None:
    """What keeps the MLflow server at `uri` from being used, in one sentence; None where it answers.

    Credentials come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, as for MLflow's client.
    """
    request = urllib.request.Request(f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1")
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    if user:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    try:
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code == 401:
            return (
                f"The MLflow server {uri} does not accept the user and password in MLFLOW_TRACKING_USERNAME/PASSWORD."
            )
        if error.code == 403:
            return f"The MLflow server {uri} knows the user, who may not read experiments there."
        return f"The server {uri} answers with status {error.code}: is it an MLflow server?"
    except (OSError, ValueError) as error:
        return f"The MLflow server {uri} cannot be reached ({getattr(error, 'reason', error)})."
    return None


def code_version() -> dict[str, Any]:
    """Commit of the code that runs, and whether files differ from it; empty outside a git checkout."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {}
