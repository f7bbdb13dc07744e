"""What runs and names in MLflow stand for: bundles (`bundle=models:/NAME@ALIAS`) and checkpoints (`ckpt=runs:/RUN_ID`).

Names are resolved anew on every call, because an alias may have moved; a fetched bundle stays in the cache under its
store and run. A server decides neither where a file is written nor where else the user's password goes.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from chestct.config.schema import Config, TrackingConfig
from chestct.errors import ConfigError
from chestct.files import digest, write_atomic
from chestct.tracking.local_store import first_line, is_server, local_uri, store_file
from chestct.tracking.remote_store import probe, refuse_elsewhere, server_uri
from chestct.tracking.sync import RUN_ID, begun_as

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

ALIAS = "champion"
"""The alias that `tracking.register=NAME` moves to the newest version."""

BUNDLE = "bundle"  # artifacts of a run: the bundle as an MLflow model
FACTS = "bundle.json"  # what makes a folder a bundle
RUN_ID_FILE = "mlflow_run_id.txt"
SCHEME = "runs:/"


def fetch_bundle(source: str, cfg: Config) -> str:
    """A path (or `packaged`) as it is; for a name in MLflow, the path of the bundle, fetched where it is elsewhere.

    Models are looked for on the server of the settings first, where aliases are shared, runs in the local store first.
    Raises ConfigError where there is none, and says what there is.
    """
    scheme, _, name = source.partition(":/")
    if scheme not in ("models", "runs"):
        return source
    uris = [server_uri(cfg.tracking), local_uri(cfg.tracking)]
    name = name.strip("/")

    def fetch(client: "MlflowClient") -> Path:
        run = _run(client, _version(client, name) if scheme == "models" else name)
        return _bundle_of(client, run, cfg.cache / "bundles")

    path, troubles = _first(uris if scheme == "models" else uris[::-1], fetch)
    if path:
        return str(path)
    raise ConfigError(
        f"bundle={source}: {troubles}. Names are models:/NAME@ALIAS, models:/NAME/VERSION and runs:/RUN_ID; "
        "python train.py tracking.register=NAME registers a model. A store elsewhere: tracking.uri=..."
    )


def checkpoint_of_run(ckpt: str, cfg: TrackingConfig, runs_dir: str) -> Path:
    """Path of the best checkpoint of the run that `ckpt` (runs:/RUN_ID) names, wherever it was trained.

    Looks in runs_dir, the local store and the server of the settings, in this order. What is fetched goes to a run
    folder of its own with the id next to it, so that a training resumed from there goes on with that run. Raises
    ConfigError where no run has that id, it was deleted, or it kept no checkpoint.
    """
    run_id = ckpt.removeprefix(SCHEME).strip("/")
    for note in sorted(Path(runs_dir).glob(f"**/{RUN_ID_FILE}")):
        best = note.with_name("best.ckpt")
        if note.read_text(encoding="utf-8").strip() == run_id and best.is_file():
            return best
    path, troubles = _first(
        [local_uri(cfg), server_uri(cfg)],
        lambda client: _checkpoint_of(client, _run(client, run_id), Path(runs_dir) / run_id),
    )
    if path:
        return path
    raise ConfigError(
        f"ckpt={ckpt}: no checkpoint of that MLflow run. {troubles}. Ids of runs: make ui. A run on a "
        "server: add tracking.uri=..., or tracking=dagshub with tracking.owner and tracking.repo."
    )


def register(client: "MlflowClient", run_id: str, name: str) -> str:
    """Makes the run's bundle the newest version of the registered model `name`, and its champion; once for a run."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = [v for v in client.search_model_versions(f"name = '{name}'") if v.run_id == run_id]
    source = f"{client.get_run(run_id).info.artifact_uri}/{BUNDLE}"
    version = known[0] if known else client.create_model_version(name, source, run_id)
    client.set_registered_model_alias(name, ALIAS, version.version)
    return str(version.version)


def _first(uris: Iterable[str | None], fetch: "Callable[[MlflowClient], Path]") -> tuple[Path | None, str]:
    """What the first store has that has it; else why each of them has not."""
    from mlflow.exceptions import MlflowException

    troubles = []
    for uri in filter(None, uris):
        try:
            return fetch(_client(uri)), ""
        except (MlflowException, LookupError, ConfigError) as error:
            reason = first_line(error).strip("'\"")
            troubles.append(f"{uri}: {reason}")
    return None, "; ".join(troubles)


def _client(uri: str) -> "MlflowClient":
    """Raises LookupError where there is no such store, or the server cannot be used."""
    from mlflow import MlflowClient

    if is_server(uri) and (problem := probe(uri, write=False)):
        raise LookupError(problem)
    if (file := store_file(uri)) and not file.is_file():
        raise LookupError("there is no such store")  # asking would make one
    return MlflowClient(uri)


def _run(client: "MlflowClient", run_id: str) -> "MlflowRun":
    """Raises LookupError where the run was deleted, MlflowException where there is none."""
    if not RUN_ID.fullmatch(run_id):
        raise LookupError(f"'{run_id}' is no id of a run (32 digits, as in make ui)")
    run = client.get_run(run_id)
    if run.info.lifecycle_stage == "deleted":
        raise LookupError(f"the run {run_id} was deleted")
    return run


def _version(client: "MlflowClient", name: str) -> str:
    """Id of the run behind NAME@ALIAS or NAME/VERSION. Raises LookupError with what there is instead."""
    from mlflow.exceptions import MlflowException

    parts = re.fullmatch(r"([^@/]+)(@|/)([^@/]+)", name)
    if not parts:
        raise LookupError(f"{name} has neither @ALIAS nor /VERSION")
    name, kind, which = parts.groups()
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = ", ".join(m.name for m in client.search_registered_models()) or "none"
        raise LookupError(f"no registered model {name} (there: {known})") from None
    versions = {str(v.version): v for v in client.search_model_versions(f"name = '{name}'")}
    number = str(model.aliases.get(which, "")) if kind == "@" else which
    if number not in versions:
        known = ", ".join([*(f"@{alias}" for alias in model.aliases), *(f"/{n}" for n in sorted(versions, key=int))])
        raise LookupError(f"{name} has no {'alias' if kind == '@' else 'version'} {which} (there: {known or 'none'})")
    return str(versions[number].run_id)


def _bundle_of(client: "MlflowClient", run: "MlflowRun", cache: Path) -> Path:
    """The run's bundle, fetched whole or not at all."""
    folder = cache / f"{run.info.run_id}-{digest(client.tracking_uri)[:12]}"
    if (folder / FACTS).is_file():
        return folder
    if not client.list_artifacts(run.info.run_id, BUNDLE):
        raise LookupError(f"the run {run.info.run_id} kept no bundle (tracking.log_model=false, or it did not finish)")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as fetched:
        facts = next(_download(client, run, BUNDLE, fetched).rglob(FACTS), None)
        if facts is None:
            raise LookupError(f"the artifacts of the run {run.info.run_id} hold no bundle")
        shutil.copytree(facts.parent, Path(fetched) / "whole")
        if not (folder / FACTS).is_file():
            (Path(fetched) / "whole").replace(folder)
    return folder


def _checkpoint_of(client: "MlflowClient", run: "MlflowRun", folder: Path) -> Path:
    """The run's best checkpoint in a run folder, fetched whole or not at all."""
    items = client.list_artifacts(run.info.run_id, "checkpoints")
    kept = [item.path for item in items if item.path.endswith(".ckpt")]
    if not kept:
        raise LookupError("the run kept no checkpoint (tracking.log_model=false, or it did not finish)")
    target = folder / "checkpoints" / "best.ckpt"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as fetched:
        _download(client, run, kept[0], fetched).replace(target)
    write_atomic(target.with_name(RUN_ID_FILE), f"{begun_as(run)}\n")
    return target


def _download(client: "MlflowClient", run: "MlflowRun", path: str, folder: str) -> Path:
    """MLflow checks that no listed file leaves `folder`."""
    from mlflow.artifacts import download_artifacts

    refuse_elsewhere(run.info.artifact_uri, client.tracking_uri)
    source = f"{run.info.artifact_uri}/{path}"
    return Path(download_artifacts(source, dst_path=folder, tracking_uri=client.tracking_uri))


def remembered_run(folder: Path) -> str | None:
    """The id noted next to the checkpoints in `folder`; None without one, and where the note holds anything else."""
    note = folder / RUN_ID_FILE
    run_id = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
    return run_id if RUN_ID.fullmatch(run_id) else None
