"""Which tracking server the settings name, who we are there, and whether it can be used.

User and token come from the environment alone, so that no setting, file or log can hold them. A server is asked with
plain HTTP before MLflow's client sees it, because the client does not tell a wrong password from a dead server.
"""

import base64
import json
import os
import re
import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from chestct.config.schema import TrackingConfig, at_home
from chestct.errors import ChestCTError, ConfigError

SQLITE = "sqlite:///"
PROBE_SECONDS = 8.0
DAGSHUB = "https://dagshub.com"


class TrackingError(ChestCTError):
    """A tracking server or store that cannot be used."""


def server_uri(cfg: TrackingConfig) -> str | None:
    """URI of the server that runs are shared on; None where the store on this machine is all there is.

    Raises ConfigError where a password stands in the URI, or DagsHub's owner, repository or token is missing.
    """
    if cfg.name == "dagshub":
        return _dagshub_uri(cfg)
    refuse_password(cfg.uri)
    return cfg.uri.rstrip("/") if cfg.uri.startswith(("http://", "https://")) else None


def local_uri(cfg: TrackingConfig) -> str:
    """URI of the store on this machine."""
    uri = cfg.uri if server_uri(cfg) is None else cfg.local
    file = store_file(uri)
    return f"{SQLITE}{at_home(str(file))}" if file else uri


def store_file(uri: str) -> Path | None:
    """The SQLite file behind a URI; None for any other store."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def refuse_password(uri: str) -> None:
    """Raises ConfigError for user:password@ in a URI; the message does not repeat it."""
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        raise ConfigError(
            f"tracking.uri holds a user or password for {parts.netloc.rsplit('@', 1)[1]}: settings are kept with every "
            "run. Leave them out of the URI and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the "
            "environment."
        )


def dagshub_token() -> str:
    """The DagsHub token in the environment. Raises ConfigError where there is none."""
    token = os.environ.get("DAGSHUB_USER_TOKEN") or os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if not token:
        raise ConfigError(
            "No DagsHub token in the environment. Make one at dagshub.com (User Settings, Tokens), then: "
            "export DAGSHUB_USER_TOKEN=..., or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        )
    return token


def dagshub_repository(cfg: TrackingConfig) -> str:
    """Address of the repository on DagsHub. Raises ConfigError where owner or repository are missing or no names."""
    for key, value in (("tracking.owner", cfg.owner), ("tracking.repo", cfg.repo)):
        if not value or not re.fullmatch(r"[\w.-]+", value):
            raise ConfigError(
                f"tracking=dagshub: {key}={value or 'null'} is not a name on DagsHub. Give both as in "
                "dagshub.com/OWNER/REPO: tracking.owner=OWNER tracking.repo=REPO."
            )
    return f"{DAGSHUB}/{cfg.owner}/{cfg.repo}"


def _dagshub_uri(cfg: TrackingConfig) -> str:
    """DagsHub takes the token for the user name, too."""
    repository, token = dagshub_repository(cfg), dagshub_token()
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):  # where MLflow's client reads them
        os.environ.setdefault(name, token)
    return f"{repository}.mlflow"


def probe(uri: str, experiment: str = "chestct", write: bool = True) -> str | None:
    """What keeps runs from being written to `experiment` on the MLflow server at `uri`, in one sentence; else None.

    Answers within PROBE_SECONDS, whatever the server does. Reading is no proof of writing, so it makes the experiment
    where there is none, and marks it where there is one; with write=False it asks only.
    """
    answers: list[str | None] = []
    # A thread, because no timeout of a socket ends a slow name server or an answer that drips.
    thread = threading.Thread(target=lambda: answers.append(_ask(uri, experiment, write)), daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers[0] if answers else f"The MLflow server {uri} does not answer within {PROBE_SECONDS:.0f} s."


NOT_MLFLOW: dict[str, Any] = {}
"""Stands for an answer that MLflow would not give."""


def _ask(uri: str, experiment: str, write: bool) -> str | None:
    try:
        status, found = _exchange(uri, experiment, write)
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return f"The MLflow server {uri} does not answer within {PROBE_SECONDS:.0f} s."
        return f"The MLflow server {uri} cannot be reached ({reason})."
    if status == 401:
        return (
            f"The MLflow server {uri} does not accept the user and password in MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD."
        )
    if status == 403:
        verb = "write to" if write else "read"
        return f"The MLflow server {uri} does not let this user {verb} the experiment '{experiment}'."
    if found.get("experiment", {}).get("lifecycle_stage") == "deleted":
        return f"The experiment '{experiment}' was deleted on {uri}: restore it, or set tracking.experiment."
    if (status == 200 and found is not NOT_MLFLOW) or found.get("error_code") == "RESOURCE_ALREADY_EXISTS":
        return None
    return f"The server {uri} answers with status {status} and not as MLflow does: is it an MLflow server?"


def _exchange(uri: str, experiment: str, write: bool) -> tuple[int, dict[str, Any]]:
    """Asks for the experiment and then, where asked to, writes what changes nothing; the answer that decides."""
    status, found = _call(uri, f"experiments/get-by-name?experiment_name={quote(experiment)}")
    if status == 404 and found.get("error_code") == "RESOURCE_DOES_NOT_EXIST":
        return _call(uri, "experiments/create", {"name": experiment}) if write else (200, {})
    there = found.get("experiment")
    if status == 200 and not isinstance(there, dict):
        return status, NOT_MLFLOW
    if there is None or there.get("lifecycle_stage") == "deleted" or not write:
        return status, found
    mark = {"experiment_id": there["experiment_id"], "key": "chestct", "value": "yes"}
    return _call(uri, "experiments/set-experiment-tag", mark)


def _call(uri: str, path: str, body: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """Status and JSON of one request; NOT_MLFLOW for any other text. Raises OSError where nothing answers."""
    request = urllib.request.Request(f"{uri}/api/2.0/mlflow/{path}", headers=_identity())
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS) as answer:
            status, text = answer.status, answer.read(1_000_000)
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read(1_000_000)
    try:
        found = json.loads(text)
    except ValueError:
        return status, NOT_MLFLOW
    return status, found if isinstance(found, dict) else NOT_MLFLOW


def _identity() -> dict[str, str]:
    """The header that MLflow's client would send."""
    user, password, token = (os.environ.get(f"MLFLOW_TRACKING_{x}", "") for x in ("USERNAME", "PASSWORD", "TOKEN"))
    if user:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    return {"Authorization": f"Bearer {token}"} if token else {}
