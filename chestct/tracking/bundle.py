"""The bundle that a name in MLflow stands for: `bundle=models:/NAME@ALIAS`, models:/NAME/VERSION or runs:/RUN_ID.

Names are resolved anew on every call, because an alias may have moved; what was fetched stays in the cache under the
run it came from.
"""

import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from chestct.config.schema import Config
from chestct.errors import ConfigError
from chestct.tracking.mirror import ORIGIN, first_line
from chestct.tracking.server import local_uri, probe, server_uri, store_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIAS = "champion"
"""The alias that `tracking.register=NAME` moves to the newest version."""

BUNDLE = "bundle"  # artifacts of a run: the bundle as an MLflow model
FACTS = "bundle.json"  # what makes a folder a bundle


def fetch_bundle(source: str, cfg: Config) -> str:
    """A path (or `packaged`) as it is; for a name in MLflow, the path of the bundle, fetched where it is elsewhere.

    Models are looked for on the server of the settings first, where aliases are shared, runs in the local store first.
    Raises ConfigError where there is none, and says what there is.
    """
    scheme, _, name = source.partition(":/")
    if scheme not in ("models", "runs"):
        return source
    uris = [uri for uri in (server_uri(cfg.tracking), local_uri(cfg.tracking)) if uri]
    troubles = []
    for uri in uris if scheme == "models" else reversed(uris):
        found = _fetch(uri, scheme, name.strip("/"), cfg.cache / "bundles")
        if isinstance(found, Path):
            return str(found)
        troubles.append(f"{uri}: {found}")
    raise ConfigError(
        f"bundle={source}: {'; '.join(troubles)}. Names are models:/NAME@ALIAS, models:/NAME/VERSION and runs:/RUN_ID; "
        "python train.py tracking.register=NAME registers a model. A store elsewhere: tracking.uri=..."
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


def _fetch(uri: str, scheme: str, name: str, cache: Path) -> Path | str:
    """The folder of the bundle, or why there is none."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if uri.startswith("http") and (problem := probe(uri, write=False)):
        return problem.rstrip(".")
    if (file := store_file(uri)) and not file.is_file():
        return "there is no such store"  # asking would make one
    client = MlflowClient(uri)
    try:
        run_id = _version(client, name) if scheme == "models" else name
        run = client.get_run(run_id)
        if run.info.lifecycle_stage == "deleted":
            return f"the run {run_id} was deleted"
        return _of_run(client, run_id, cache / run.data.tags.get(ORIGIN, run_id))
    except (MlflowException, LookupError) as error:
        return first_line(error).strip("'\"").rstrip(".")


def _version(client: "MlflowClient", name: str) -> str:
    """Id of the run behind NAME@ALIAS or NAME/VERSION. Raises LookupError with what there is instead."""
    from mlflow.exceptions import MlflowException

    parts = re.fullmatch(r"([^@/]+)(@|/)([^@/]+)", name)
    if not parts:
        raise LookupError(f"{name} has neither @ALIAS nor /VERSION")
    model, kind, which = parts.groups()
    try:
        found = client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        there = ", ".join(m.name for m in client.search_registered_models()) or "none"
        raise LookupError(f"no registered model {model} (there: {there})") from None
    versions = {str(v.version): v for v in client.search_model_versions(f"name = '{model}'")}
    number = str(found.aliases.get(which, "")) if kind == "@" else which
    if number not in versions:
        there = ", ".join([*(f"@{alias}" for alias in found.aliases), *(f"/{n}" for n in sorted(versions, key=int))])
        raise LookupError(f"{model} has no {'alias' if kind == '@' else 'version'} {which} (there: {there or 'none'})")
    return str(versions[number].run_id)


def _of_run(client: "MlflowClient", run_id: str, folder: Path) -> Path | str:
    """The run's bundle: where it lies in a local store, else fetched into `folder`, whole or not at all."""
    if (folder / FACTS).is_file():
        return folder
    if not client.list_artifacts(run_id, BUNDLE):
        return f"the run {run_id} kept no bundle (tracking.log_model=false, or it did not finish)"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as fetched:
        there = Path(client.download_artifacts(run_id, BUNDLE, fetched))
        facts = next(there.rglob(FACTS), None)
        if facts is None:
            return f"the artifacts of the run {run_id} hold no bundle"
        shutil.copytree(facts.parent, Path(fetched) / "whole")
        if not (folder / FACTS).is_file():
            (Path(fetched) / "whole").replace(folder)
    return folder
