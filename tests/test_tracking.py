import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from chestct import tracking
from chestct.config.compose import CONF
from chestct.config.schema import TrackingConfig
from chestct.errors import ConfigError, Interrupted
from chestct.models.checkpoint import find_checkpoint
from chestct.tracking import TrackingError, open_run, probe, sole_writer
from chestct.tracking.push import push
from chestct.tracking.server import local_uri, server_uri
from chestct.tracking.storage import dagshub_remotes

ROOT = CONF.parent


@pytest.fixture
def uri(tmp_path, monkeypatch, empty_store):
    monkeypatch.chdir(tmp_path)  # MLflow puts artifacts beside it
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def runs(uri):
    client = MlflowClient(uri)
    return client.search_runs([client.get_experiment_by_name("chestct").experiment_id])


def test_a_run_keeps_settings_metrics_data_and_code(small, uri, tmp_path):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}", "tracking.run_name=first", "data.labels={a.b: cancer}")
    with open_run(cfg, tmp_path / "out") as run:
        run.metrics({"best/test/auroc": 0.9})
        run.tags({"data.split": "grouped"})
        run.data("phantom", "f" * 64, "somewhere", {"train": 3})
        (tmp_path / "plot.png").write_bytes(b"x")
        run.artifacts(tmp_path / "plot.png", "evaluation")
    (found,) = runs(uri)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "first"
    assert found.data.params["optim.lr"] == "0.01"
    assert found.data.params["data.augment.flip"] == "0.5"
    assert found.data.metrics["best/test/auroc"] == 0.9
    assert "git.commit" in found.data.tags
    assert found.inputs.dataset_inputs[0].dataset.name == "phantom"
    assert [a.path for a in MlflowClient(uri).list_artifacts(found.info.run_id, "evaluation")] == [
        "evaluation/plot.png"
    ]


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (Interrupted, "KILLED")])
def test_a_run_that_does_not_finish_says_so(small, uri, tmp_path, error, status):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}")
    with pytest.raises(error), open_run(cfg, tmp_path / "out"):
        raise error
    assert runs(uri)[0].info.status == status


def test_a_resumed_run_is_the_same_run(small, uri, tmp_path):
    for lr, more in (("0.1", ()), ("0.2", ("ckpt=last.ckpt",))):
        cfg = small("tracking=mlflow", f"tracking.uri={uri}", f"optim.lr={lr}", *more)
        with open_run(cfg, tmp_path / "out") as run:
            run.metrics({"m": float(lr)})
    (found,) = runs(uri)
    assert found.data.params["optim.lr"] == "0.1"
    assert found.data.metrics["m"] == 0.2


def test_a_training_that_begins_anew_in_the_same_folder_is_another_run(small, uri, tmp_path):
    for lr in ("0.1", "0.2"):
        with open_run(small("tracking=mlflow", f"tracking.uri={uri}", f"optim.lr={lr}"), tmp_path / "out"):
            pass
    assert [found.data.params["optim.lr"] for found in runs(uri)] == ["0.2", "0.1"]


@pytest.mark.parametrize("deleted", [True, False])
def test_a_run_that_is_gone_is_replaced_and_said(small, uri, tmp_path, capsys, deleted):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}", "ckpt=last.ckpt")
    note = tmp_path / "out" / "checkpoints" / tracking.RUN_ID_FILE
    with open_run(cfg, tmp_path / "out"):
        pass
    gone = note.read_text().strip()
    if deleted:
        MlflowClient(uri).delete_run(gone)
    else:
        note.write_text("0123456789abcdef0123456789abcdef")
    with open_run(cfg, tmp_path / "out") as run:
        assert run.run_id != gone
    assert "or was deleted; a new run" in capsys.readouterr().out
    assert note.read_text().strip() == run.run_id


def test_runs_and_caches_of_a_temporary_copy_lie_in_the_repository(small, empty_store, tmp_path, monkeypatch):
    home, copy = tmp_path / "home", tmp_path / "copy"
    for folder in (home, copy):
        folder.mkdir()
    shutil.copy(empty_store, home / "mlflow.db")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(home))  # what DVC tells the stages of a queued experiment
    cfg = small("tracking=mlflow", "cache_dir=.cache")
    with open_run(cfg, copy / "out") as run:
        run.artifacts(Path(__file__))
    assert cfg.cache == home / ".cache"
    (found,) = runs(f"sqlite:///{home}/mlflow.db")
    assert found.info.artifact_uri.startswith(f"{home}/mlruns/chestct/")
    assert list(copy.iterdir()) == [copy / "out"]


def test_off_records_nothing(small, tmp_path):
    with open_run(small("tracking=off"), tmp_path) as run:
        run.metrics({"m": 1.0})
        run.artifacts(tmp_path)
        assert run.logger() is None
    assert list(tmp_path.iterdir()) == []


def test_a_deleted_experiment_is_one_clear_error(small, uri, tmp_path):
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("chestct"))
    with (
        pytest.raises(TrackingError, match=r"tracking\.experiment=NAME"),
        open_run(small("tracking=mlflow", f"tracking.uri={uri}"), tmp_path),
    ):
        pass


@pytest.fixture
def server():
    """A server on loopback that answers every request with the status and text it is told, or never (None)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.auth = self.headers.get("Authorization")
            asked = self.path.split("/")[-1].split("?")[0]
            status, text = self.server.answers.get(asked, (404, "<html>"))
            if status is None:
                self.server.ended.wait(30)
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.ended, made.answers = threading.Event(), {}
    made.uri = f"http://127.0.0.1:{made.server_port}"
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.ended.set()
    made.shutdown()
    made.server_close()
    thread.join()


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
    found = probe(server.uri)
    assert found is None if says is None else says in found
    assert "secret-word" not in str(found)
    assert server.auth == "Basic bWU6c2VjcmV0LXdvcmQ="


def test_reading_needs_no_right_to_write(server):
    for server.answers, asked in (ANSWERS["write"], ANSWERS["create"]):
        assert asked in probe(server.uri)
        assert probe(server.uri, write=False) is None
    server.answers = ANSWERS["read"][0]
    assert "does not let this user read" in probe(server.uri, write=False)


def test_probe_gives_up_on_a_server_that_never_answers(server, monkeypatch):
    monkeypatch.setattr("chestct.tracking.server.PROBE_SECONDS", 1.0)
    server.answers = {"get-by-name": (None, "")}
    started = time.monotonic()
    assert "does not answer within 1 s" in probe(server.uri)
    assert time.monotonic() - started < 3


def test_an_unreachable_server_is_said_quickly_and_the_run_goes_on_locally(small, uri, tmp_path, capsys):
    asked = ("tracking=mlflow", "tracking.uri=http://127.0.0.1:9", f"tracking.local={uri}")
    started = time.monotonic()
    assert "cannot be reached" in probe("http://127.0.0.1:9")
    assert time.monotonic() - started < 5
    with open_run(small(*asked), tmp_path / "out") as run:
        assert run.uri == uri
    told = capsys.readouterr().out
    assert "cannot be reached" in told
    assert "chestct sync tracking.uri=http://127.0.0.1:9" in told
    with (
        pytest.raises(TrackingError, match=r"tracking\.required=false"),
        open_run(small(*asked, "tracking.required=true"), tmp_path / "b"),
    ):
        pass
    assert len(runs(uri)) == 1


@pytest.mark.parametrize("where", ["http://me:secret-word@127.0.0.1:9", "postgresql://me:secret-word@host/db"])
def test_a_password_in_the_uri_is_refused_and_not_repeated(small, tmp_path, where):
    with (
        pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as refused,
        open_run(small("tracking=mlflow", f"tracking.uri={where}"), tmp_path / "out"),
    ):
        pass
    assert "secret-word" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def no_token(monkeypatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "DAGSHUB_USER_TOKEN"):
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back, too
        monkeypatch.delenv(name)


def test_dagshub_takes_owner_and_repository_from_settings_and_the_token_from_the_environment(no_token, monkeypatch):
    monkeypatch.setenv("DAGSHUB_USER_TOKEN", "secret-word")
    cfg = TrackingConfig("dagshub", owner="ada", repo="chest-ct")
    assert server_uri(cfg) == "https://dagshub.com/ada/chest-ct.mlflow"
    assert local_uri(cfg) == cfg.local
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == os.environ["MLFLOW_TRACKING_PASSWORD"] == "secret-word"


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


def test_two_trainings_cannot_write_to_one_folder(tmp_path):
    code = (
        f"from chestct.tracking import sole_writer\nwith sole_writer(__import__('pathlib').Path({str(tmp_path)!r})):\n"
    )
    with sole_writer(tmp_path):
        done = subprocess.run([sys.executable, "-c", code + "    pass"], capture_output=True, text=True, cwd=ROOT)
        assert f"Another training is writing to {tmp_path}" in done.stderr
    with sole_writer(tmp_path):
        pass


def test_the_dvc_experiment_and_the_folder_are_on_the_run(small, uri, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "brave-fox")
    with open_run(small("tracking=mlflow", f"tracking.uri={uri}"), tmp_path / "out"):
        pass
    (found,) = runs(uri)
    assert found.data.tags["dvc.experiment"] == found.info.run_name == "brave-fox"
    assert found.data.tags["folder"] == str(tmp_path / "out")


@pytest.mark.slow
def test_system_metrics_are_recorded_where_asked_for(small, uri, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    for name, asked in (("a", "true"), ("b", "false")):
        cfg = small("tracking=mlflow", f"tracking.uri={uri}", f"tracking.system_metrics={asked}")
        with open_run(cfg, tmp_path / name):
            time.sleep(2)
        assert any(key.startswith("system/") for key in runs(uri)[0].data.metrics) is (asked == "true")


def test_the_checkpoint_of_a_run_is_found_by_its_id(small, uri, tmp_path):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}")
    out = tmp_path / "runs" / "first"
    best = out / "checkpoints" / "best.ckpt"
    with open_run(cfg, out) as run:
        best.write_bytes(b"weights")
        run.artifacts(best, "checkpoints")
    asked = f"runs:/{run.run_id}"
    assert find_checkpoint(asked, str(tmp_path / "runs"), cfg.tracking) == best
    elsewhere = find_checkpoint(asked, str(tmp_path / "new"), cfg.tracking)
    assert elsewhere.read_bytes() == b"weights"
    assert elsewhere.with_name(tracking.RUN_ID_FILE).read_text().strip() == run.run_id
    with pytest.raises(ConfigError, match="not found"):
        find_checkpoint("runs:/0123456789abcdef0123456789abcdef", str(tmp_path / "runs"), cfg.tracking)
    assert run.client is not None
    run.client.delete_run(run.run_id)
    with pytest.raises(ConfigError, match="was deleted"):
        find_checkpoint(asked, str(tmp_path / "third"), cfg.tracking)


def test_a_run_without_a_checkpoint_says_so(small, uri, tmp_path):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}")
    with open_run(cfg, tmp_path / "out") as run:
        pass
    with pytest.raises(ConfigError, match="kept no checkpoint"):
        find_checkpoint(f"runs:/{run.run_id}", str(tmp_path), cfg.tracking)


def test_push_without_a_server_says_how(small):
    with pytest.raises(ConfigError, match="tracking=dagshub"):
        push(small("tracking=mlflow"))


@pytest.mark.slow
def test_the_token_for_dvc_stands_in_config_local_only(no_token, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], check=True, env=os.environ | {"DVC_NO_ANALYTICS": "1"})
    cfg = TrackingConfig("dagshub", owner="ada", repo="ct")
    with pytest.raises(ConfigError, match="DAGSHUB_USER_TOKEN"):
        dagshub_remotes(cfg)
    monkeypatch.setenv("DAGSHUB_USER_TOKEN", "secret-word")
    for _ in range(2):
        dagshub_remotes(cfg)
    shared = (tmp_path / ".dvc" / "config").read_text()
    assert "endpointurl = https://dagshub.com/ada/ct.s3" in shared
    assert "url = https://dagshub.com/ada/ct.dvc" in shared
    assert "remote = dagshub\n" in shared
    holding = [p for p in tmp_path.rglob("*") if p.is_file() and b"secret-word" in p.read_bytes()]
    assert holding == [tmp_path / ".dvc" / "config.local"]
    ignored = subprocess.run(["git", "check-ignore", "-q", ".dvc/config.local"], check=False)
    assert ignored.returncode == 0
    assert "secret-word" not in capsys.readouterr().out
