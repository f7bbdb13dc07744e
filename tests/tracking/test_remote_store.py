"""Servers: which one is named, what is wrong with it, who is logged in, and what it may not decide."""

import http.server
import os
import threading

import pytest

from chestct.config.schema import TrackingConfig
from chestct.errors import ConfigError
from chestct.tracking import TrackingError, open_run, probe
from chestct.tracking.local_store import local_uri
from chestct.tracking.remote_store import refuse_elsewhere, server_uri
from tests.tracking.conftest import recorded, runs


def serve(answer):
    """A server on loopback whose handler's do_GET and do_POST are `answer`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *_):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.uri = f"http://127.0.0.1:{made.server_port}"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    return made


@pytest.fixture
def server():
    """Answers every request with the status and text that `answers` has for it, or never (None)."""

    def answer(self):
        self.server.auth = self.headers.get("Authorization")
        status, text = self.server.answers.get(self.path.split("/")[-1].split("?")[0], (404, "<html>"))
        if status is None:
            self.server.ended.wait(30)
            return
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    made = serve(answer)
    made.ended, made.answers = threading.Event(), {}
    yield made
    made.ended.set()
    made.shutdown()
    made.server_close()


KNOWN = (200, '{"experiment": {"experiment_id": "1"}}')
UNKNOWN = (404, '{"error_code": "RESOURCE_DOES_NOT_EXIST"}')
ANSWERS = {
    "well": ({"get-by-name": KNOWN, "set-experiment-tag": (200, "{}")}, None),
    "new experiment": ({"get-by-name": UNKNOWN, "create": (200, '{"experiment_id": "1"}')}, None),
    "made by another meanwhile": (
        {"get-by-name": UNKNOWN, "create": (400, '{"error_code": "RESOURCE_ALREADY_EXISTS"}')},
        None,
    ),
    "password": ({"get-by-name": (401, "no")}, "does not accept the user and password"),
    "read": ({"get-by-name": (403, "no")}, "does not let this user write"),
    "write": ({"get-by-name": KNOWN, "set-experiment-tag": (403, "Permission denied")}, "does not let this user write"),
    "create": ({"get-by-name": UNKNOWN, "create": (403, "Permission denied")}, "does not let this user write"),
    "page": ({"get-by-name": (200, "<html>")}, "is it an MLflow server"),
    "unknown JSON": ({"get-by-name": (200, '{"error": "not here"}')}, "is it an MLflow server"),
    "other JSON": ({"get-by-name": (200, "[1]")}, "is it an MLflow server"),
    "missing page": ({}, "is it an MLflow server"),
    "deleted": (
        {"get-by-name": (200, '{"experiment": {"experiment_id": "1", "lifecycle_stage": "deleted"}}')},
        "was deleted on",
    ),
}


@pytest.mark.parametrize("case", list(ANSWERS))
def test_probe_tells_what_is_wrong_with_a_server(server, case, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret-word")
    server.answers, says = ANSWERS[case]
    problem = probe(server.uri)
    assert problem is None if says is None else says in problem
    assert "secret-word" not in str(problem)
    assert server.auth == "Basic bWU6c2VjcmV0LXdvcmQ="


def test_reading_needs_no_right_to_write(server):
    for server.answers, problem in (ANSWERS["write"], ANSWERS["create"]):
        assert problem in probe(server.uri)
        assert probe(server.uri, write=False) is None
    server.answers = ANSWERS["read"][0]
    assert "does not let this user read" in probe(server.uri, write=False)


def test_probe_gives_up_on_a_server_that_never_answers(server, monkeypatch):
    monkeypatch.setattr("chestct.tracking.remote_store.PROBE_SECONDS", 1.0)
    server.answers = {"get-by-name": (None, "")}
    assert "does not answer within 1 s" in probe(server.uri)


def test_an_unreachable_server_is_one_sentence_and_the_run_goes_on_locally(small, uri, tmp_path, capsys):
    settings = ("tracking=mlflow", "tracking.uri=http://127.0.0.1:9", f"tracking.local={uri}")
    with recorded(small(*settings), tmp_path / "out") as run:
        assert run.uri == uri
        assert len(run.loggers()) == 1
    printed = capsys.readouterr().out
    assert "http://127.0.0.1:9 cannot be reached (Connection refused)" in printed
    assert "chestct sync tracking.uri=http://127.0.0.1:9" in printed
    with (
        pytest.raises(TrackingError, match=r"tracking\.required=false"),
        open_run(small(*settings, "tracking.required=true"), tmp_path / "b"),
    ):
        pass
    assert len(runs(uri)) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_does_not_take_the_password_elsewhere(server, monkeypatch, status):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret-word")
    server.answers = {"get-by-name": KNOWN, "set-experiment-tag": (200, "{}")}
    server.auth = "no request"

    def redirect(self):
        self.send_response(status)
        self.send_header("Location", f"http://localhost:{server.server_port}{self.path}")
        self.end_headers()

    elsewhere = serve(redirect)
    probe(elsewhere.uri)
    elsewhere.shutdown()
    elsewhere.server_close()
    assert server.auth in (None, "no request")


@pytest.mark.parametrize(
    ("artifacts", "followed"),
    [
        ("mlflow-artifacts:/1/a/artifacts", True),
        ("mlflow-artifacts://host:5000/1/a", True),
        ("https://host:5000/api/2.0/mlflow-artifacts/artifacts/1/a", True),
        ("s3://bucket/1/a", True),
        ("mlflow-artifacts://evil.example/1/a", False),
        ("https://host:5000@evil.example/1/a", False),
        ("http://evil.example/1/a", False),
        ("file:///home/me/.ssh", False),
        ("/home/me/.ssh", False),
    ],
)
def test_artifacts_are_exchanged_with_the_named_server_alone(artifacts, followed):
    refuse_elsewhere("/any/folder", "sqlite:///mlflow.db")
    if followed:
        refuse_elsewhere(artifacts, "https://host:5000")
    else:
        with pytest.raises(ConfigError, match="not followed"):
            refuse_elsewhere(artifacts, "https://host:5000")


@pytest.mark.parametrize("where", ["http://me:secret-word@127.0.0.1:9", "postgresql://me:secret-word@host/db"])
def test_a_password_in_the_uri_is_refused_and_not_repeated(small, tmp_path, where):
    with (
        pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as refused,
        open_run(small("tracking=mlflow", f"tracking.uri={where}"), tmp_path / "out"),
    ):
        pass
    assert "secret-word" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "variable", "server", "local"),
    [
        (None, None, None, "sqlite:///mlflow.db"),
        (None, "https://host", "https://host", "sqlite:///mlflow.db"),
        ("https://other", "https://host", "https://other", "sqlite:///mlflow.db"),
        ("sqlite:///mine.db", "https://host", None, "sqlite:///mine.db"),
        (None, "sqlite:///theirs.db", None, "sqlite:///theirs.db"),
    ],
)
def test_mlflows_own_variable_names_the_server_unless_a_setting_does(monkeypatch, setting, variable, server, local):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if variable:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    cfg = TrackingConfig(uri=setting)
    assert (server_uri(cfg), local_uri(cfg)) == (server, local)


def test_dagshub_takes_owner_and_repository_from_settings_and_the_token_from_the_environment(no_token, monkeypatch):
    monkeypatch.setenv("DAGSHUB_USER_TOKEN", "secret-word")
    cfg = TrackingConfig("dagshub", owner="ada", repo="chest-ct")
    assert server_uri(cfg) == "https://dagshub.com/ada/chest-ct.mlflow"
    assert local_uri(cfg) == cfg.local
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == os.environ["MLFLOW_TRACKING_PASSWORD"] == "secret-word"


def test_the_dagshub_token_goes_to_dagshub_alone(no_token, monkeypatch):
    monkeypatch.setenv("DAGSHUB_USER_TOKEN", "secret-word")
    server_uri(TrackingConfig(uri="https://dagshub.com.evil.example/ada/ct.mlflow"))
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ
    server_uri(TrackingConfig(uri="https://dagshub.com/ada/ct.mlflow"))
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "secret-word"


@pytest.mark.parametrize(
    ("owner", "repo", "token", "says"),
    [
        (None, "ct", "t", "tracking.owner"),
        ("ada", None, "t", "tracking.repo"),
        ("ada/ct", "ct", "t", "OWNER/REPO"),
        ("ada", "ct", None, "DAGSHUB_USER_TOKEN"),
    ],
)
def test_dagshub_says_what_is_missing(no_token, monkeypatch, owner, repo, token, says):
    if token:
        monkeypatch.setenv("DAGSHUB_USER_TOKEN", token)
    with pytest.raises(ConfigError, match=says):
        server_uri(TrackingConfig("dagshub", owner=owner, repo=repo))
