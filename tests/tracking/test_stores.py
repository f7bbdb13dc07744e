"""The store on this machine in its first minute, and servers: which one is named, and what it may not decide."""

import http.server
import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing

import pytest
from mlflow import MlflowClient

from chestct.config.compose import CONF
from chestct.config.schema import TrackingConfig
from chestct.errors import ConfigError
from chestct.tracking import TrackingError, open_run, probe
from chestct.tracking.stores import local_uri, prepare, refuse_elsewhere, server_uri


@pytest.mark.slow
def test_two_processes_at_once_make_one_store_over_what_a_kill_left(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "mlflow.db.making").write_bytes(b"half a store")
    command = [sys.executable, "-c", f"from chestct.tracking.stores import prepare; prepare({uri!r})"]
    started = [subprocess.Popen(command, cwd=CONF.parent, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in started:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    client = MlflowClient(uri)
    assert client.create_run(client.create_experiment("new")).info.status == "RUNNING"
    assert not (tmp_path / "mlflow.db.making").exists()


SPOILT = {
    "of another version": "UPDATE alembic_version SET version_num = 'gone'",
    "half made by MLflow": "DROP TABLE alembic_version; DROP TABLE metrics",
}


@pytest.mark.parametrize("place", ["no database", "a folder", "in a file", *SPOILT])
def test_a_place_that_cannot_hold_a_store_is_one_error_and_no_retries(tmp_path, place, monkeypatch, empty_store):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    file = tmp_path / "mlflow.db"
    if place == "a folder":
        file.mkdir()
    else:
        file.write_bytes(empty_store.read_bytes() if place in SPOILT else b"no database at all, " * 50)
    if place in SPOILT:
        with closing(sqlite3.connect(file)) as database, database:
            database.executescript(SPOILT[place])
    with pytest.raises(TrackingError, match=r"mlflow db upgrade.*move it away.*tracking\.local=sqlite:///FILE"):
        prepare(f"sqlite:///{file / 'below' if place == 'in a file' else file}")


class Page(http.server.BaseHTTPRequestHandler):
    """Answers at /STATUS/... with this status and a page."""

    def do_POST(self):
        self.send_response(int(self.path.split("/")[1]))
        self.end_headers()
        self.wfile.write(b"<html>")

    do_GET = do_POST  # noqa: N815


@pytest.mark.parametrize(
    ("status", "says"),
    [(200, "not in a valid JSON format"), (401, "error code 401"), (404, "error code 404"), (None, "no answer")],
)
def test_probe_tells_what_is_wrong_with_a_server(status, says, monkeypatch):
    monkeypatch.setattr("chestct.tracking.stores.PROBE_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret-word")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        if status:  # else it takes connections and is silent
            threading.Thread(target=server.serve_forever).start()
        problem = probe(f"http://127.0.0.1:{server.server_port}/{status}")
        if status:
            server.shutdown()
    assert says in problem
    assert "secret-word" not in problem


@pytest.mark.parametrize(
    ("artifacts", "followed"),
    [
        ("mlflow-artifacts:/1/a/artifacts", True),
        ("mlflow-artifacts://host:5000/1/a", True),
        ("s3://bucket/1/a", True),
        ("mlflow-artifacts://evil.example/1/a", False),
        ("https://host:5000@evil.example/1/a", False),
        ("file:///home/me/.ssh", False),
        ("/home/me/.ssh", False),
    ],
)
def test_artifacts_are_exchanged_with_the_named_server_alone(artifacts, followed):
    refuse_elsewhere(artifacts, "sqlite:///mlflow.db")
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
    monkeypatch.setenv("MLFLOW_TRACKING_URI", variable or "")
    cfg = TrackingConfig(uri=setting)
    assert (server_uri(cfg), local_uri(cfg)) == (server, local)


@pytest.fixture
def token(monkeypatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "DAGSHUB_USER_TOKEN"):
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back, too
        monkeypatch.delenv(name)
    monkeypatch.setenv("DAGSHUB_USER_TOKEN", "secret-word")


def test_the_dagshub_token_goes_to_dagshub_alone(token):
    server_uri(TrackingConfig(uri="https://dagshub.com.evil.example/ada/ct.mlflow"))
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ
    cfg = TrackingConfig("dagshub", owner="ada", repo="chest-ct")
    assert server_uri(cfg) == "https://dagshub.com/ada/chest-ct.mlflow"
    assert local_uri(cfg) == cfg.local
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == os.environ["MLFLOW_TRACKING_PASSWORD"] == "secret-word"


@pytest.mark.parametrize(
    ("owner", "repo", "says"),
    [(None, "ct", "tracking.owner"), ("ada/ct", "ct", "OWNER/REPO"), ("ada", "ct", "DAGSHUB_USER_TOKEN")],
)
def test_dagshub_says_what_is_missing(token, monkeypatch, owner, repo, says):
    monkeypatch.delenv("DAGSHUB_USER_TOKEN")
    with pytest.raises(ConfigError, match=says):
        server_uri(TrackingConfig("dagshub", owner=owner, repo=repo))
