"""Tracking against a real MLflow server on loopback, which stands for DagsHub's."""

import json
import shutil
import signal
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import requests
from mlflow import MlflowClient

from chestct.tracking import TrackingError, probe, sync
from tests.conftest import until
from tests.e2e.loopback import log_in
from tests.tracking.conftest import fit, recorded

pytestmark = pytest.mark.slow


def test_wrong_password_and_missing_permission_are_told_apart(server, monkeypatch):
    log_in(monkeypatch, "writer")
    assert probe(server.uri) is None
    log_in(monkeypatch, "writer", "wrong-password-123")
    assert "not authenticated" in probe(server.uri)
    log_in(monkeypatch, "reader")
    assert "Permission denied" in probe(server.uri)


@pytest.fixture
def settings(server, empty_store, tmp_path, monkeypatch):
    """Settings of a run of `writer` that is recorded on the server, with its local store in an empty folder."""
    shutil.copy(empty_store, tmp_path / "local.db")
    monkeypatch.chdir(tmp_path)
    log_in(monkeypatch, "writer")
    local = f"tracking.local=sqlite:///{tmp_path}/local.db"
    return ("tracking=mlflow", f"tracking.uri={server.uri}", local, f"cache_dir={tmp_path}/cache")


def copies(server, local):
    """(local run, its copies on the server), for the newest local run."""
    client, here = MlflowClient(server.uri), MlflowClient(local.tracking.local)
    (run,) = here.search_runs([e.experiment_id for e in here.search_experiments()], max_results=1)
    experiment = client.get_experiment_by_name("chestct").experiment_id
    return run, client.search_runs([experiment], f"tags.`chestct.origin` = '{run.info.run_id}'")


def assert_same(server, cfg, twice=False):
    """The newest local run is on the server once, and whole; twice: a metric may stand there twice."""
    run, (copy,) = copies(server, cfg)
    here, there = MlflowClient(cfg.tracking.local), MlflowClient(server.uri)
    assert copy.data.params == run.data.params
    assert run.data.tags.items() <= copy.data.tags.items()
    assert (copy.info.status, copy.info.run_name) == (run.info.status, run.info.run_name)
    for key in run.data.metrics:
        histories = [
            sorted((m.step, m.value) for m in client.get_metric_history(one.info.run_id, key))
            for client, one in ((here, run), (there, copy))
        ]
        assert histories[0] == (sorted(set(histories[1])) if twice else histories[1])
    assert contents(there, copy) == contents(here, run)
    return copy


def contents(client, run):
    root = Path(client.download_artifacts(run.info.run_id, ""))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def act(run, steps, folder):
    """What a training does with its run."""
    fit(run, steps)
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({"steps": len(steps)}))
    (folder / "plot.png").write_bytes(bytes(100_000))
    run.artifacts(folder, "evaluation")


def test_a_run_is_on_the_server_while_it_lasts_and_whole_at_its_end(server, settings, small, tmp_path):
    cfg = small(*settings)
    with recorded(cfg, tmp_path / "out") as run:
        act(run, range(20), tmp_path / "evaluation")
        (there,) = until(lambda: [copy for copy in copies(server, cfg)[1] if copy.data.metrics], 60, every=0.2)
        assert there.info.status == "RUNNING"
        assert there.data.params["optim.lr"] == "0.01"
    assert_same(server, cfg)


def test_a_server_that_hangs_neither_slows_the_run_nor_loses_anything(
    settings, server, small, tmp_path, capsys, monkeypatch
):
    cfg = small(*settings)
    request, waited = requests.Session.request, []

    def watched(self, *args, **kwargs):
        waited.append(threading.current_thread())
        return request(self, *args, **kwargs)

    with recorded(cfg, tmp_path / "out") as run:
        act(run, range(5), tmp_path / "evaluation")
        server.signal(signal.SIGSTOP)
        try:
            monkeypatch.setattr(requests.Session, "request", watched)
            act(run, range(5, 45), tmp_path / "evaluation")  # ends while the server hangs
            assert "no answer" in probe(server.uri)
        except BaseException:
            server.signal(signal.SIGCONT)
            raise
    server.signal(signal.SIGCONT)
    assert threading.main_thread() not in waited
    assert "chestct sync" in capsys.readouterr().out
    sync(cfg)
    assert_same(server, cfg, twice=True)  # what the server took late, after the client had given up


def test_sync_sends_what_was_trained_offline_once_and_goes_on_after_a_break(
    settings, server, small, tmp_path, monkeypatch, capsys
):
    with recorded(small(*settings, "tracking.uri=http://127.0.0.1:9"), tmp_path / "out") as run:  # out of reach
        act(run, range(5), tmp_path / "evaluation")
    assert "cannot be written to" in capsys.readouterr().out
    cfg, send = small(*settings), MlflowClient.log_artifacts

    monkeypatch.setattr(MlflowClient, "log_artifacts", Mock(side_effect=ConnectionError("cable pulled")))
    with pytest.raises(TrackingError, match=r"cable pulled\.\nThe same command goes on"):
        sync(cfg)
    monkeypatch.setattr(MlflowClient, "log_artifacts", send)
    for _ in range(2):
        assert sync(cfg) == 1
    copy = assert_same(server, cfg)
    MlflowClient(server.uri).delete_run(copy.info.run_id)
    assert sync(cfg) == 0
    assert "stays so" in capsys.readouterr().out
    assert copies(server, cfg)[1] == []
