"""Which tracking server the user named, and whether it can be used.

User and token come from the environment alone, so that no setting, file or log can hold them. A server is asked before
runs are written, because a dead one and a wrong password are told apart only by the status of its answer.
"""

import json
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from chestct.config.schema import TrackingConfig
from chestct.errors import ConfigError
from chestct.tracking.dagshub import HOST, dagshub_repository, log_in
from chestct.tracking.local_store import first_line, is_server, named_uri

T = TypeVar("T")
PROBE_SECONDS = 8.0
NOT_MLFLOW: dict[str, Any] = {}
"""Stands for an answer that MLflow would not give."""


def server_uri(cfg: TrackingConfig) -> str | None:
    """URI of the server that runs are shared on; None where the store on this machine is all there is.

    Raises ConfigError where a password stands in the URI, or DagsHub's owner, repository or token is missing.
    """
    uri = f"{dagshub_repository(cfg)}.mlflow" if cfg.name == "dagshub" else named_uri(cfg)
    refuse_password(uri)
    if urlsplit(uri).hostname == HOST:
        log_in()
    return uri.rstrip("/") if is_server(uri) else None


def refuse_password(uri: str) -> None:
    """Raises ConfigError for user:password@ in a URI; the message does not repeat it."""
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        raise ConfigError(
            f"The tracking URI holds a user or password for {parts.netloc.rsplit('@', 1)[1]}: settings are kept with "
            "every run. Leave them out of the URI and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the "
            "environment."
        )


def refuse_elsewhere(artifacts: str, uri: str) -> None:
    """Raises ConfigError where a run on the server `uri` keeps its artifacts in a place that nobody named.

    Whoever made the experiment chose that place: another server would receive the user's password, and a folder would
    be one of this machine. Object stores (s3://, gs://) have credentials of their own.
    """
    if not is_server(uri):
        return
    place = urlsplit(artifacts)
    proxied = place.scheme in ("http", "https", "mlflow-artifacts")
    if proxied and place.netloc in ("", urlsplit(uri).netloc):
        return
    if proxied or place.scheme in ("", "file") or len(place.scheme) == 1:
        raise ConfigError(
            f"{uri} says that artifacts lie in {artifacts}, which is not on that server: not followed. Start the "
            "server with --serve-artifacts, or with an object store."
        )


def probe(uri: str, experiment: str = "chestct", write: bool = True) -> str | None:
    """What keeps runs from being written to `experiment` on the MLflow server at `uri`, in one sentence; else None.

    Answers within PROBE_SECONDS, whatever the server does. Reading is no proof of writing, so it makes the experiment
    where there is none, and marks it where there is one; with write=False it only reads.
    """
    import mlflow.utils.rest_utils  # noqa: F401  (takes seconds, which are not the server's)

    problem = within(PROBE_SECONDS, lambda: _problem(uri, experiment, write))
    return f"The MLflow server {uri} {problem}." if isinstance(problem, Exception) else problem


def within(seconds: float, work: Callable[[], T]) -> T | Exception:
    """What `work` returns; the exception where it fails or takes longer: whatever a server does, the run goes on.

    In a thread, because no timeout of a socket ends a slow name server or an answer that drips.
    """
    results: list[T | Exception] = []

    def attempt() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else TimeoutError(f"does not answer within {seconds:.0f} s")


def _problem(uri: str, experiment: str, write: bool) -> str | None:
    try:
        status, answer = _exchange(uri, experiment, write)
    except Exception as error:  # MLflow wraps whatever the network does
        return _unreachable(uri, error)
    if status == 401:
        return (
            f"The MLflow server {uri} does not accept the user and password in MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD."
        )
    if status == 403:
        verb = "write to" if write else "read"
        return f"The MLflow server {uri} does not let this user {verb} the experiment '{experiment}'."
    if answer.get("experiment", {}).get("lifecycle_stage") == "deleted":
        return f"The experiment '{experiment}' was deleted on {uri}: restore it, or set tracking.experiment."
    if (status == 200 and answer is not NOT_MLFLOW) or answer.get("error_code") == "RESOURCE_ALREADY_EXISTS":
        return None
    return f"The server {uri} answers with status {status} and not as MLflow does: is it an MLflow server?"


def _unreachable(uri: str, error: BaseException) -> str:
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    if any(isinstance(one, TimeoutError) for one in chain):
        return f"The MLflow server {uri} does not answer within {PROBE_SECONDS:.0f} s."
    reason = next((one.strerror for one in chain if isinstance(one, OSError) and one.strerror), first_line(chain[-1]))
    return f"The MLflow server {uri} cannot be reached ({reason})."


def _exchange(uri: str, experiment: str, write: bool) -> tuple[int, dict[str, Any]]:
    """Asks for the experiment and then, where `write`, writes what changes nothing; the answer that decides."""
    status, answer = _call(uri, "get-by-name", params={"experiment_name": experiment})
    if status == 404 and answer.get("error_code") == "RESOURCE_DOES_NOT_EXIST":
        return _call(uri, "create", json={"name": experiment}) if write else (200, {})
    known = answer.get("experiment")
    if status == 200 and not isinstance(known, dict):
        return status, NOT_MLFLOW
    if known is None or known.get("lifecycle_stage") == "deleted" or not write:
        return status, answer
    mark = {"experiment_id": known["experiment_id"], "key": "chestct", "value": "yes"}
    return _call(uri, "set-experiment-tag", json=mark)


def _call(uri: str, action: str, **content: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """Status and JSON of one request, sent as MLflow's client would; NOT_MLFLOW for any other text."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    response = http_request(
        get_default_host_creds(uri),
        f"/api/2.0/mlflow/experiments/{action}",
        "POST" if "json" in content else "GET",
        timeout=PROBE_SECONDS,
        raise_on_status=False,
        **content,
    )
    try:
        answer = json.loads(response.text)
    except ValueError:
        return response.status_code, NOT_MLFLOW
    return response.status_code, answer if isinstance(answer, dict) else NOT_MLFLOW
