"""What is written into one MLflow run: settings, numbers, files, data and code."""

import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chestct.config.schema import Config, leaves
from chestct.tracking.local_store import first_line
from chestct.tracking.registry import ALIAS, BUNDLE, register

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from mlflow import MlflowClient


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


def code_version() -> dict[str, Any]:
    """Commit of the code that runs, and whether files differ from it; empty outside a git checkout."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {}
