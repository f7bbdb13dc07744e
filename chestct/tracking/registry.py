"""What runs and names in MLflow stand for: bundles, as in `bundle=models:/NAME@ALIAS` and `bundle=runs:/RUN_ID`.

Names are resolved anew on every call, because an alias may have moved, or a run been exported again; a fetched bundle
stays in the cache under its store, run and digest. A server decides neither where a file is written nor where else the
user's password goes.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from chestct.config.schema import Config
from chestct.config.schema_serving import FACTS
from chestct.errors import ChestCTError, ConfigError
from chestct.files import digest, file_digest
from chestct.tracking import hub, stores
from chestct.tracking.stores import first_line, is_server, local_uri, refuse_elsewhere, server_uri, store_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

ALIAS = "champion"  # the alias that `tracking.register=NAME` moves to the newest version
BUNDLE = "bundle"  # artifacts of a run: the bundle as an MLflow model


def fetch_bundle(source: str, cfg: Config) -> str:
    """A path (or `packaged`) as it is; for a name in MLflow or on the hub, the path of the bundle, fetched if need be.

    Models are looked for on the server of the settings first, where aliases are shared, runs in the local store first.
    Raises ConfigError where there is none.
    """
    if source.startswith(hub.SCHEME):
        return hub.fetch(source)
    scheme, _, name = source.partition(":/")
    if scheme not in ("models", "runs"):
        return source
    from mlflow.exceptions import MlflowException

    uris = filter(None, (server_uri(cfg.tracking), local_uri(cfg.tracking)))
    problems = []
    for uri in uris if scheme == "models" else reversed(list(uris)):
        try:
            client = client_of(uri)
            run = find_run(client, _run_behind(client, name) if scheme == "models" else name)
            return str(_bundle_of(client, run, cfg.cache / "bundles"))
        except (MlflowException, LookupError, ChestCTError, OSError) as error:  # requests' are of the last kind
            problems.append(f"{uri}: {first_line(error)}")
    raise ConfigError(
        f"bundle={source}: {'; '.join(problems)}. Give models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN_ID, as in "
        "make ui. Another store or server: tracking.uri=..., or tracking=dagshub with tracking.owner and tracking.repo."
    )


def client_of(uri: str) -> "MlflowClient":
    """Raises LookupError where there is no such store, TrackingError for a folder or a database that is of no use."""
    from mlflow import MlflowClient

    if (file := store_file(uri)) and not file.is_file():
        raise LookupError("there is no such store")  # asking would make one
    if file:
        with stores.usable(f"The MLflow store {file}", "Give another: tracking.local=sqlite:///FILE.", kinds="sqlite3"):
            stores.follow(file)
    elif not is_server(uri):
        stores.prepare(uri)
    return MlflowClient(uri)


def find_run(client: "MlflowClient", run_id: str) -> "MlflowRun":
    """The run of that id, which names a folder. Raises LookupError where it was deleted, no run can be called so, or
    the server's answer is of another one; MlflowException where there is none.
    """
    if not re.fullmatch("[0-9a-f]{32}", run_id):
        raise LookupError(f"'{run_id}' is no id of a run (32 digits, as in make ui)")
    run = client.get_run(run_id)
    if run.info.run_id != run_id:
        raise LookupError(f"asked for the run {run_id}, the answer is of another run")
    if run.info.lifecycle_stage == "deleted":
        raise LookupError(f"the run {run_id} was deleted")
    return run


def _run_behind(client: "MlflowClient", name: str) -> str:
    """Id of the run behind NAME@ALIAS or NAME/VERSION. Raises LookupError for another form, else MlflowException."""
    parts = re.fullmatch(r"([^@/]+)([@/])([^@/]+)", name)
    if not parts:
        raise LookupError(f"{name} has neither @ALIAS nor /VERSION")
    find = client.get_model_version_by_alias if parts[2] == "@" else client.get_model_version
    return str(find(parts[1], parts[3]).run_id)


def _bundle_of(client: "MlflowClient", run: "MlflowRun", cache: Path) -> Path:
    """The bundle that a run holds now, fetched whole or not at all; MLflow checks that no listed file leaves it.

    A folder in `cache` is named by store, run and bundle.json, which knows the digests of all else. Where the artifacts
    cannot be listed, it prints why, and what was fetched last is taken.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    name = f"{run.info.run_id}-{digest(client.tracking_uri)[:12]}"
    refuse_elsewhere(run.info.artifact_uri, client.tracking_uri)
    cache.mkdir(parents=True, exist_ok=True)
    try:
        listed = [Path(file.path).name for file in client.list_artifacts(run.info.run_id, f"{BUNDLE}/data")]
    except (MlflowException, OSError) as error:
        folder = max(cache.glob(f"{name}-*"), key=lambda one: one.stat().st_mtime_ns, default=None)
        if folder is None:
            raise
        print(f"{client.tracking_uri}: {first_line(error)}. Taken is {folder}, fetched before.")
        return folder
    if not (names := [one for one in listed if not one.startswith(".")]):
        raise LookupError(f"the run {run.info.run_id} kept no bundle (tracking.log_model, or it did not finish)")
    # Not what MLflow keeps with it, nor the package; earlier versions called it as the folder of the export.
    source = f"{run.info.artifact_uri}/{BUNDLE}/data/{BUNDLE if BUNDLE in names else names[0]}"
    with tempfile.TemporaryDirectory(dir=cache) as part:
        facts = download_artifacts(f"{source}/{FACTS}", dst_path=part, tracking_uri=client.tracking_uri)
        folder = cache / f"{name}-{file_digest(Path(facts))[:12]}"
        if not folder.is_dir():
            whole = download_artifacts(source, dst_path=f"{part}/whole", tracking_uri=client.tracking_uri)
            try:
                Path(whole).replace(folder)
            except OSError:
                if not folder.is_dir():  # else another process fetched it meanwhile
                    raise
    os.utime(folder)  # the last fetched, however often it was before
    return folder
