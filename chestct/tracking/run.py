"""The run that a training or an evaluation writes to: begun, resumed, shared, ended.

A run belongs to a folder, where its id is noted, so that a resumed training goes on with it. It begins when settings
and data are known to be usable, so that a mistake leaves no failed run behind.
"""

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from chestct.config.fields import leaves
from chestct.config.schema import Config, TrackingConfig
from chestct.errors import ChestCTError
from chestct.files import write_atomic
from chestct.tracking import stores
from chestct.tracking.registry import ALIAS, BUNDLE, client_of, find_run
from chestct.tracking.stores import first_line, local_uri, prepare, probe, server_uri, store_file
from chestct.tracking.sync import PARENT, send
from chestct.version import code_version

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from mlflow import MlflowClient

BEGIN_SECONDS, END_SECONDS = 20.0, 300.0
"""How long the beginning and the end of a run wait for a server; what it has not got then, `sync` sends."""

RUN_ID_FILE = "mlflow_run_id.txt"
MODEL = "chestct"
"""Name of a run's LoggedModel: not that of its artifact, which MLflow would then look for among the models."""

HEADLINE = ("auroc", "auroc_low", "auroc_high", "balanced_accuracy", "sensitivity", "specificity", "margin")
"""What an evaluation shows on a run's page; all else is in its files."""


class Run:
    """One MLflow run; without a client (tracking=off, or not begun) every method does nothing."""

    def __init__(self, client: "MlflowClient | None" = None, run_id: str = "", uri: str = "") -> None:
        self.client, self.run_id, self.uri = client, run_id, uri
        self.model_id: str | None = None  # of the LoggedModel that `model` made
        self.children: list[str] = []

    def begin(self) -> None:
        """Records the run from here on; for a run of open_run. Raises TrackingError as that does."""

    def loggers(self) -> "list[Logger]":
        """For Lightning's Trainer: write what modules log into this run, here and on the server."""
        return []

    def tags(self, tags: Mapping[str, object]) -> None:
        if self.client:
            for name, value in tags.items():
                self.client.set_tag(self.run_id, name, str(value)[:5000])

    def metrics(self, metrics: Mapping[str, float]) -> None:
        if self.client:
            for name, value in metrics.items():
                self.client.log_metric(self.run_id, name, value, model_id=self.model_id)

    def artifacts(self, path: Path, folder: str | None = None) -> None:
        """A file, or everything in a folder."""
        if self.client:
            record = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
            record(self.run_id, str(path), folder)

    def child(self, name: str, metrics: Mapping[str, float]) -> None:
        """A run of its own below this one, which has ended: something that was made of what this one left."""
        if self.client is None:
            return
        from mlflow.tracking.context.registry import resolve_tags

        experiment = self.client.get_run(self.run_id).info.experiment_id
        tags = resolve_tags() | {PARENT: self.run_id}
        child = Run(self.client, self.client.create_run(experiment, tags=tags, run_name=name).info.run_id)
        child.metrics(metrics)
        self.client.set_terminated(child.run_id)
        self.children.append(child.run_id)

    def evaluation(self, values: Mapping[str, float | None], folder: Path) -> None:
        """The files in the report's folder, and of the test set's numbers (None where undefined) the HEADLINE.

        Not the folders in there, such as those of heads that were trained again.
        """
        shown = {name: values.get(name) for name in HEADLINE}
        self.metrics({f"test/{name}": value for name, value in shown.items() if value is not None})
        for path in sorted(folder.iterdir()):
            if path.is_file():
                self.artifacts(path, "evaluation")

    def model(self, folder: Path) -> None:
        """An MLflow model in a folder, as an artifact of the run and as a LoggedModel, which `evaluation` measures."""
        if self.client is None:
            return
        from mlflow.entities import LoggedModelOutput
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
        from mlflow.tracking.context.registry import resolve_tags

        self.artifacts(folder, BUNDLE)
        run = self.client.get_run(self.run_id)
        logged = self.client.create_logged_model(
            run.info.experiment_id, MODEL, self.run_id, tags=resolve_tags(), model_type="chestct"
        )
        self.model_id = logged.model_id
        # client.log_model_artifacts would ask the store of MLflow's own default, and make one in the working directory.
        get_artifact_repository(logged.artifact_location, self.client.tracking_uri).log_artifacts(str(folder))
        self.client.finalize_logged_model(self.model_id, "READY")
        self.client.log_outputs(self.run_id, [LoggedModelOutput(self.model_id, 0)])

    def register(self, name: str | None) -> None:
        """Makes the run's bundle, if it has one, the newest version of the model `name`, and its champion."""
        from mlflow.exceptions import MlflowException

        if self.client is None or name is None or not self.client.list_artifacts(self.run_id, BUNDLE):
            return
        try:
            if not self.client.search_registered_models(f"name = '{name}'"):
                self.client.create_registered_model(name)
            known = [v for v in self.client.search_model_versions(f"name = '{name}'") if v.run_id == self.run_id]
            source = f"{self.client.get_run(self.run_id).info.artifact_uri}/{BUNDLE}"
            version = (known or [self.client.create_model_version(name, source, self.run_id)])[0].version
            self.client.set_registered_model_alias(name, ALIAS, version)
        except MlflowException as error:
            print(f"Not registered as {name} in {self.uri}: {first_line(error)}.")
        else:
            print(f"registered       bundle=models:/{name}@{ALIAS} is now version {version} in {self.uri}")


class _OpenRun(Run):
    """The run of open_run: in the local store, and a copy on the server while that answers."""

    def __init__(self, cfg: Config, out: Path, sweep: bool) -> None:
        super().__init__(uri=local_uri(cfg.tracking))
        self.cfg, self.out, self.sweep, self.copy = cfg, out, sweep, Run()
        self.server = server_uri(cfg.tracking)
        # Next to the checkpoints, so that the id goes where they go: DVC removes, restores and shares them as one.
        self.folder = out if sweep else out / "checkpoints"
        # The sweep's folder, where `out` is that of a job, or with seeds=N in that of one.
        self.sweep_folder = None if sweep else next(filter(noted_run, out.parents[:2]), None)
        self.parent = noted_run(self.sweep_folder) if self.sweep_folder else None
        self.prepared = bool((file := store_file(self.uri)) and file.exists())  # a new one is made when the run begins
        if self.prepared:
            prepare(self.uri)

    def begin(self) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        if not self.prepared:
            prepare(self.uri)
        client, resumed = MlflowClient(self.uri), noted_run(self.folder)
        if resumed and (self.sweep or self.cfg.ckpt or self.parent):
            try:
                client.update_run(resumed, status="RUNNING")
                self.run_id = resumed
            except MlflowException:
                print(f"The MLflow run {resumed} of this folder is not in {self.uri} or was deleted; a new one begins.")
        self.run_id, self.client = self.run_id or self._create(client), client
        known = client.get_run(self.run_id).data.params  # if a resumed run changes one, MLflow keeps the first
        params = [Param(key, str(value)[:6000]) for key, value, _ in leaves(self.cfg) if key not in known]
        client.log_batch(self.run_id, params=params)
        self.tags(code_version() | {"folder": self.out.resolve()})
        if self.server is None:
            return
        if problem := probe(self.server, self.cfg.tracking.experiment):
            print(f"{problem} The run is recorded in {self.uri}.")
            return
        remote = MlflowClient(self.server)
        sent = stores.within(BEGIN_SECONDS, lambda: send(client, remote, self.run_id, artifacts=False))
        if isinstance(sent, str):
            self.copy = Run(remote, sent, self.server)

    def _create(self, client: "MlflowClient") -> str:
        from mlflow.tracking.context.registry import resolve_tags

        experiment, file = self.cfg.tracking.experiment, store_file(self.uri)
        # MLflow would keep artifacts in the working directory, which DVC may remove.
        artifacts = str(file.resolve().parent / "mlruns" / quote(experiment, safe="")) if file else None
        name = os.environ.get("DVC_EXP_NAME")
        if self.sweep_folder:
            name = " ".join([self.sweep_folder.name, *self.out.relative_to(self.sweep_folder).parts])
        run = client.create_run(
            stores.use_experiment(client, experiment, artifacts),
            tags=resolve_tags() | ({PARENT: self.parent} if self.parent else {}),  # user, program, commit
            run_name=self.cfg.tracking.run_name or (self.out.name if self.sweep else name),
        )
        write_atomic(self.folder / RUN_ID_FILE, f"{run.info.run_id}\n")
        return str(run.info.run_id)

    def loggers(self) -> "list[Logger]":
        from chestct.tracking.logger import RunLogger

        runs = [run for run in (self, self.copy) if run.client]
        return [RunLogger(run.uri, run.run_id, shared=run is self.copy) for run in runs]


@contextmanager
def open_run(cfg: Config, out: Path, sweep: bool = False) -> Iterator[Run]:
    """The run that belongs to the folder `out`: the one noted there if it is resumed, else a new one; see Run.begin.

    A training is resumed with cfg.ckpt or by its sweep; a sweep (whose jobs have folders in `out`) always.
    Ends as FINISHED, as KILLED when interrupted, as FAILED on any error. Raises TrackingError where the local store
    cannot be used; a server that cannot is reported, and misses nothing that `sync` does not send later.
    """
    if cfg.tracking.name == "off":
        yield Run()
        return
    run, status = _OpenRun(cfg, out, sweep), "FINISHED"
    again = "the same command" if sweep or run.sweep_folder else f"python train.py {shlex.quote(f'ckpt={out}')}"
    way_out = f"Mend it, and go on with: {again} (tracking=off needs none)"
    with stores.usable(f"The MLflow store {run.uri}", way_out):
        try:
            yield run
        except BaseException as error:
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            raise
        finally:
            if run.client:
                name = cfg.tracking.register if status == "FINISHED" else None
                run.register(name)
                run.client.set_terminated(run.run_id, status)  # waits for MLflow's threads
                _share(run, cfg.tracking, name, run.copy)


@contextmanager
def run_of(cfg: Config, ckpt: Path) -> Iterator[Run]:
    """The run that a checkpoint belongs to, which may long have ended, to add something to it.

    Prints which; where the run or its store is gone, it prints that, and gives a run that records nothing.
    """
    run_id, uri, run = noted_run(ckpt.resolve().parent), "the local store", Run()
    if run_id and cfg.tracking.name != "off":
        from mlflow.exceptions import MlflowException

        try:
            uri = local_uri(cfg.tracking)
            client = client_of(uri)
            run = Run(client, find_run(client, run_id).info.run_id, uri)
        except (MlflowException, LookupError, ChestCTError) as error:
            print(f"Not added to the MLflow run {run_id} in {uri}: {first_line(error)}.")
    if run.client is None:
        yield run
        return
    try:
        yield run
        run.register(cfg.tracking.register)
        _share(run, cfg.tracking, cfg.tracking.register)
        print(f"MLflow run {run_id} in {uri} (make ui)")
    except (MlflowException, ChestCTError, OSError) as error:  # what was computed stands in its files
        print(f"Not added to the MLflow run {run_id} in {uri}: {first_line(error)}.")


def _share(run: Run, cfg: TrackingConfig, name: str | None, copy: Run | None = None) -> None:
    """Sends what the server, if any, lacks of a run, and registers its copy there as `name`; prints what came of it."""
    from mlflow import MlflowClient

    if (server := server_uri(cfg)) is None:
        return

    def work() -> None:
        assert run.client
        if copy and copy.client:  # waits for MLflow's threads, so that no metric is sent twice
            copy.client.set_terminated(copy.run_id)
        remote = MlflowClient(server)
        sent, *_ = [send(run.client, remote, one) for one in (run.run_id, *run.children)]
        print(f"MLflow copy      {sent or 'none: it was deleted there'} on {server}")
        Run(remote if sent else None, sent or "", server).register(name)

    if problem := probe(server, cfg.experiment) or stores.within(END_SECONDS, work):
        problem = problem if isinstance(problem, str) else f"{stores.reason(problem)}."
        settings = [f"tracking.uri={server}"]
        settings += [f"tracking.local={cfg.local}"] if cfg.local != TrackingConfig().local else []
        print(
            f"Not all of this run is on the server: {problem} Nothing is lost: it is in {run.uri}; send the rest with: "
            f"chestct sync {shlex.join(settings)}"
        )


def noted_run(folder: Path) -> str | None:
    """The id of the run that is noted in a folder."""
    note = folder / RUN_ID_FILE
    return note.read_text(encoding="utf-8").strip() if note.is_file() else None
