"""The store on this machine in its first minute, and servers: which one is named, and what it may not decide."""

import http.server
import json
import os
import shlex
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from chestct.config.compose import CONF
from chestct.config.schema import TrackingConfig
from chestct.errors import ConfigError
from chestct.tracking import TrackingError, fetch_bundle, open_run, probe, run_of, sync
from chestct.tracking.stores import CREDENTIALS, local_uri, prepare, refuse_elsewhere, server_uri
from tests.conftest import until
from tests.tracking.conftest import recorded, runs

PREPARE = "import sys\nfrom chestct.tracking.stores import prepare\nprepare(sys.argv[1])"
MLFLOW = "import sys\nfrom mlflow import MlflowClient\nMlflowClient(sys.argv[1]).search_experiments()"


def started(code, uri):
    environment = os.environ | {"PYTHONPATH": str(CONF.parent)}
    return subprocess.Popen([sys.executable, "-c", code, uri], env=environment, stderr=subprocess.PIPE, text=True)


def assert_usable(uri):
    client = MlflowClient(uri)
    run = client.create_run(client.create_experiment("new"))
    client.log_metric(run.info.run_id, "m", 1.0)
    assert client.get_run(run.info.run_id).data.metrics == {"m": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "file", "size"), [(PREPARE, "mlflow.db.making", 1), (MLFLOW, "mlflow.db", 300_000)], ids=["ours", "mlflow"]
)
def test_a_kill_while_the_store_is_made_leaves_none_or_one_that_is_recognised(tmp_path, code, file, size):
    uri, file = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / file
    process = started(code, uri)
    until(lambda: file.is_file() and file.stat().st_size >= size, 120, process, every=0.001)  # as it is migrated
    process.kill()
    process.communicate()
    if (tmp_path / "mlflow.db").exists():
        _, errors = started(PREPARE, uri).communicate()  # in this process MLflow would hold on to the file
        assert "move it away" in errors
        (tmp_path / "mlflow.db").unlink()
    prepare(uri)
    assert_usable(uri)


@pytest.mark.slow
def test_two_processes_at_once_make_one_store(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for process in [started(PREPARE, uri) for _ in range(2)]:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    assert_usable(uri)
    assert not (tmp_path / "mlflow.db.making").exists()


@pytest.mark.parametrize("place", ["not a database", "a folder", "in a file", "of another version"])
def test_a_place_that_cannot_hold_a_store_is_one_error_and_no_retries(tmp_path, place, monkeypatch, empty_store):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    file = tmp_path / "mlflow.db"
    if place == "a folder":
        file.mkdir()
    else:
        file.write_bytes(empty_store.read_bytes() if place == "of another version" else b"no database at all, " * 50)
    if place == "of another version":
        with closing(sqlite3.connect(file)) as database, database:
            database.execute("UPDATE alembic_version SET version_num = 'gone'")
    with pytest.raises(TrackingError, match=r"mlflow db upgrade.*tracking\.local=sqlite:///FILE"):
        prepare(f"sqlite:///{file / 'below' if place == 'in a file' else file}")


@pytest.mark.parametrize("place", ["mlruns", "file:./mlruns", "sqlite://x.db", "databricks"])
def test_what_is_no_store_is_one_error_with_a_way_out(small, tmp_path, monkeypatch, capsys, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    cfg = small("tracking=mlflow")
    with pytest.raises(TrackingError, match=r"cannot be used .*sqlite:///FILE"), recorded(cfg, tmp_path / "out"):
        pass
    with pytest.raises(ConfigError, match="cannot be used"):
        fetch_bundle("models:/chest@champion", cfg)
    (tmp_path / "mlflow_run_id.txt").write_text("0" * 32)
    with run_of(cfg, tmp_path / "best.ckpt") as run:
        assert run.client is None
    assert "cannot be used" in capsys.readouterr().out


def test_artifacts_that_may_not_be_read_are_one_error(server, small, tmp_path):
    info = {"run_id": "a" * 32, "run_uuid": "a" * 32, "experiment_id": "1", "status": "FINISHED"}
    info |= {"artifact_uri": "mlflow-artifacts:/1/x/artifacts", "lifecycle_stage": "active", "start_time": 1}
    server.answers = {"get": (200, json.dumps({"run": {"info": info, "data": {}}})), "artifacts": (403, "no")}
    settings = (f"tracking.uri={server.uri}", f"tracking.local=sqlite:///{tmp_path}/none.db")
    with pytest.raises(ConfigError, match=r"403.*runs:/RUN_ID"):
        fetch_bundle(f"runs:/{'a' * 32}", small("tracking=mlflow", *settings))


def test_sync_makes_no_store_and_names_the_missing_one(server, small, tmp_path, monkeypatch, empty_store):
    monkeypatch.chdir(tmp_path)
    server.answers = ANSWERS["known experiment"][0]
    cfg = small("tracking=mlflow", f"tracking.uri={server.uri}", f"tracking.local=sqlite:///{tmp_path}/typo.db")
    with pytest.raises(TrackingError, match=r"typo\.db to send.*tracking\.local=sqlite:///FILE"):
        sync(cfg)
    assert not list(tmp_path.iterdir())
    (tmp_path / "typo.db").write_bytes(empty_store.read_bytes())
    assert sync(cfg) == 0
    cfg.tracking.uri = "http://127.0.0.1:9"
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9"):
        sync(cfg)


@pytest.fixture
def server(monkeypatch):
    """Answers every request with the status and text that `answers` has for it, or never (None)."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret-word")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.auth = self.headers.get("Authorization")
            status, text = self.server.answers.get(self.path.split("/")[-1].split("?")[0], (404, "<html>"))
            if status is None:
                self.server.ended.wait(30)
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.uri = f"http://127.0.0.1:{made.server_port}"
    made.ended, made.answers, made.auth = threading.Event(), {}, None
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.ended.set()
    made.shutdown()
    made.server_close()


EXISTS = {"create": (400, '{"error_code": "RESOURCE_ALREADY_EXISTS"}')}
KNOWN = EXISTS | {"get-by-name": (200, '{"experiment": {"experiment_id": "1", "lifecycle_stage": "active"}}')}
DELETED = EXISTS | {"get-by-name": (200, '{"experiment": {"experiment_id": "1", "lifecycle_stage": "deleted"}}')}
ANSWERS = {
    "new experiment": ({"create": (200, '{"experiment_id": "1"}'), "set-experiment-tag": (200, "{}")}, None),
    "known experiment": (KNOWN | {"set-experiment-tag": (200, "{}")}, None),
    "password": ({"create": (401, "no"), "get-by-name": (401, "no")}, "error code 401"),
    "no right to write": (KNOWN | {"set-experiment-tag": (403, "Permission denied")}, "Permission denied"),
    "a page": ({"create": (200, "<html>"), "get-by-name": (200, "<html>")}, "not in a valid JSON format"),
    "another server": ({}, "error code 404"),
    "deleted": (DELETED, "new runs tracking.experiment=NAME."),
    "silent": ({"create": (None, "")}, "no answer within 1 s. Is the address right? If it is, the server"),
    "overloaded": ({"create": (429, ""), "get-by-name": (429, "")}, "too many 429 error responses. It is overloaded"),
    "broken": ({"create": (500, "no"), "get-by-name": (500, "no")}, "too many 500 error responses. It is overloaded"),
}


@pytest.mark.parametrize("case", list(ANSWERS))
def test_probe_tells_what_is_wrong_with_a_server(server, case, monkeypatch):
    monkeypatch.setattr("chestct.tracking.stores.PROBE_SECONDS", 1.0 if case == "silent" else 20.0)
    server.answers, says = ANSWERS[case]
    problem = probe(server.uri)
    assert problem is None if says is None else says in problem
    assert ("PASSWORD" in str(problem)) == (case in ("password", "no right to write", "a page", "another server"))
    assert "secret-word" not in str(problem)
    assert server.auth == "Basic bWU6c2VjcmV0LXdvcmQ="


def test_an_unreachable_server_is_one_sentence_and_the_run_goes_on_locally(small, uri, tmp_path, capsys):
    (tmp_path / "mlflow.db").rename(tmp_path / "my runs.db")
    uri = uri.replace("mlflow", "my runs")
    cfg = small("tracking=mlflow", "tracking.uri=http://127.0.0.1:9", f"tracking.local={uri}")
    with recorded(cfg, tmp_path) as run:
        assert run.uri == uri
        assert len(run.loggers()) == 1
    printed = capsys.readouterr().out
    assert "http://127.0.0.1:9 cannot be written to: Connection refused" in printed
    pasted = shlex.split(printed.rpartition("send the rest with: ")[2])
    assert pasted == ["chestct", "sync", "tracking.uri=http://127.0.0.1:9", f"tracking.local={uri}"]
    assert len(runs(uri)) == 1


@pytest.mark.parametrize(
    ("artifacts", "followed"),
    [
        ("mlflow-artifacts:/1/a/artifacts", True),
        ("mlflow-artifacts://host:5000/1/a", True),
        ("s3://bucket/1/a", True),
        ("mlflow-artifacts://evil.example/1/a", False),
        ("https://host:5000@evil.example/1/a", False),
        ("https://[evil.example/1/a", False),
        ("file:///home/me/.ssh", False),
        ("/home/me/.ssh", False),
    ],
)
def test_artifacts_are_exchanged_with_the_named_server_alone(artifacts, followed):
    refuse_elsewhere(artifacts, "sqlite:///mlflow.db")
    if followed:
        refuse_elsewhere(artifacts, "https://host:5000")
    else:
        with pytest.raises(ConfigError, match=r"not followed|no address"):
            refuse_elsewhere(artifacts, "https://host:5000")


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("uri=http://me:secret-word@127.0.0.1:9", "MLFLOW_TRACKING_PASSWORD"),
        ("uri=postgresql://me:secret-word@host/db", "PGPASSWORD"),
        ("local=postgresql://me:secret-word@host/db", "PGPASSWORD"),
        ("uri=mysql+pymysql://me:secret-word@host/db", r"URI; name the driver's .*read_default_file=FILE"),
        ("local=postgresql+psycopg2://host/db?user=me&password=secret-word", "PGPASSWORD"),
        ("uri='http://[::1:5000'", r"^http://\[::1:5000 is no address.*https://SERVER"),
        ("uri='http://me:secret-word@[::1:5000'", r"^http://\.\.\. is no address"),
    ],
)
def test_a_mistake_or_a_password_in_the_uri_is_refused_and_not_repeated(small, tmp_path, where, says):
    with (
        pytest.raises(ConfigError, match=says) as refused,
        open_run(small("tracking=mlflow", f"tracking.{where}"), tmp_path / "out"),
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
        ("HTTPS://host", "sqlite:///~/theirs.db", "HTTPS://host", "sqlite:///mlflow.db"),
        (None, "sqlite:///~/theirs.db", None, f"sqlite:///{Path.home()}/theirs.db"),
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
    server_uri(TrackingConfig(uri="https://other.example"))
    assert not {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"} & os.environ.keys()


@pytest.mark.parametrize("own", ["corporate", "secret-word"])  # the latter: for a DagsHub of one's own
def test_other_servers_get_what_the_user_set_for_them(token, own):
    other, dagshub = TrackingConfig(uri="https://other.example"), TrackingConfig("dagshub", owner="ada", repo="ct")
    for name in CREDENTIALS:
        os.environ[name] = own
    for cfg, expected in ((other, own), (dagshub, "secret-word"), (dagshub, "secret-word"), (other, own)):
        server_uri(cfg)
        assert [os.environ[name] for name in CREDENTIALS] == [expected] * 2
    os.environ["DAGSHUB_USER_TOKEN"] = ""
    del os.environ["MLFLOW_TRACKING_USERNAME"]
    server_uri(dagshub)
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == own
    server_uri(other)
    assert "MLFLOW_TRACKING_USERNAME" not in os.environ


@pytest.mark.parametrize(
    ("owner", "repo", "says"),
    [(None, "ct", "tracking.owner"), ("ada/ct", "ct", "OWNER/REPO"), ("ada", "ct", "DAGSHUB_USER_TOKEN")],
)
def test_dagshub_says_what_is_missing(token, monkeypatch, owner, repo, says):
    monkeypatch.delenv("DAGSHUB_USER_TOKEN")
    with pytest.raises(ConfigError, match=says):
        server_uri(TrackingConfig("dagshub", owner=owner, repo=repo))
