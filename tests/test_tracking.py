import http.server
import threading
import time

import pytest
from mlflow import MlflowClient

from chestct import tracking
from chestct.errors import Interrupted
from chestct.tracking import TrackingError, open_run, probe


@pytest.fixture
def uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MLflow puts artifacts beside it
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
    for lr in ("0.1", "0.2"):
        with open_run(small("tracking=mlflow", f"tracking.uri={uri}", f"optim.lr={lr}"), tmp_path / "out") as run:
            run.metrics({"m": float(lr)})
    (found,) = runs(uri)
    assert found.data.params["optim.lr"] == "0.1"
    assert found.data.metrics["m"] == 0.2


def test_a_run_that_was_deleted_is_replaced_and_said(small, uri, tmp_path, capsys):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}")
    with open_run(cfg, tmp_path / "out"):
        pass
    (tmp_path / "out" / tracking.RUN_ID_FILE).write_text("0123456789abcdef0123456789abcdef")
    with open_run(cfg, tmp_path / "out"):
        pass
    assert "a new run" in capsys.readouterr().out
    assert len(runs(uri)) == 2


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
    """A server that answers every request with the status it is told."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.auth = self.headers.get("Authorization")
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    thread.join()


@pytest.mark.parametrize(
    ("status", "says"), [(200, None), (401, "does not accept the user"), (403, "may not read"), (404, "status 404")]
)
def test_probe_tells_what_is_wrong_with_a_server(server, status, says, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret-word")
    server.status = status
    found = probe(f"http://127.0.0.1:{server.server_port}")
    assert found is None if says is None else says in found
    assert "secret-word" not in str(found)
    assert server.auth == "Basic bWU6c2VjcmV0LXdvcmQ="


def test_an_unreachable_server_is_said_quickly_and_the_run_goes_on_locally(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with open_run(small("tracking=mlflow", "tracking.uri=http://127.0.0.1:9"), tmp_path / "out") as run:
        assert run.uri == tracking.LOCAL
    assert time.monotonic() - started < 10
    assert "cannot be reached" in capsys.readouterr().out
    with (
        pytest.raises(TrackingError, match=r"tracking\.required=false"),
        open_run(small("tracking=mlflow", "tracking.uri=http://127.0.0.1:9", "tracking.required=true"), tmp_path / "b"),
    ):
        pass
