"""Tracking against a real MLflow server on loopback, which stands for DagsHub's."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient

from chestct.config.compose import CONF
from chestct.tracking import TrackingError, probe, sync
from tests.conftest import SMALL
from tests.e2e.loopback import PASSWORDS, log_in
from tests.tracking.conftest import fit, recorded

pytestmark = pytest.mark.slow

ROOT = CONF.parent


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


@pytest.fixture
def away(small, settings):
    """The same settings while the server cannot be reached."""
    return small(*settings, "tracking.uri=http://127.0.0.1:9")


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
        deadline = time.monotonic() + 60
        while not (there := copies(server, cfg)[1]) or not there[0].data.metrics:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert there[0].info.status == "RUNNING"
        assert there[0].data.params["optim.lr"] == "0.01"
    assert_same(server, cfg)


def test_a_server_killed_and_restarted_in_mid_run_loses_nothing(settings, server, small, tmp_path, capfd):
    cfg = small(*settings)
    with recorded(cfg, tmp_path / "out") as run:
        act(run, range(10), tmp_path / "evaluation")
        server.kill()
        act(run, range(10, 30), tmp_path / "evaluation")
        server.start()
        act(run, range(30, 40), tmp_path / "evaluation")
    printed = capfd.readouterr()
    assert "MLflow copy" in printed.out
    assert "Failed to log" not in printed.err
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
    settings, server, small, away, tmp_path, monkeypatch, capsys
):
    with recorded(away, tmp_path / "out") as run:
        act(run, range(5), tmp_path / "evaluation")
    assert "cannot be written to" in capsys.readouterr().out
    cfg, send = small(*settings), MlflowClient.log_artifacts

    def breaks(self, run_id, folder, path=None):
        raise ConnectionError("cable pulled")

    monkeypatch.setattr(MlflowClient, "log_artifacts", breaks)
    with pytest.raises(TrackingError, match=r"cable pulled\. The same command goes on"):
        sync(cfg)
    monkeypatch.setattr(MlflowClient, "log_artifacts", send)
    for _ in range(2):
        assert sync(cfg) == 1
    copy = assert_same(server, cfg)
    MlflowClient(server.uri).delete_run(copy.info.run_id)
    assert sync(cfg) == 0
    assert "stays so" in capsys.readouterr().out
    assert copies(server, cfg)[1] == []


def train(*overrides, cwd, **environment):
    """python train.py in a process of its own."""
    given = {override.split("=")[0] for override in overrides}
    command = [sys.executable, str(ROOT / "train.py"), *(s for s in SMALL if s.split("=")[0] not in given), *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, **out)


def test_a_training_is_shared_whole_and_no_file_holds_a_password(settings, server, small, phantoms, cache, tmp_path):
    more = [*settings[:3], f"data.root={phantoms}", f"cache_dir={cache}"]
    done = train(*more, cwd=tmp_path, DVC_EXP_NAME="brave-fox", DAGSHUB_USER_TOKEN=PASSWORDS["writer"])
    printed, _ = done.communicate(timeout=200)
    assert done.returncode == 0, printed
    copy = assert_same(server, small(*settings))
    assert copy.info.run_name == "brave-fox"
    assert copy.data.tags["data.leakage"] == "none"
    places = [path for root in (tmp_path, cache, server.folder) for path in root.rglob("*") if path.is_file()]
    assert len(places) > 20
    assert [path for path in places if PASSWORDS["writer"].encode() in path.read_bytes()] == []
    assert PASSWORDS["writer"] not in printed


def test_a_training_that_others_may_not_join_is_sent_while_it_runs_and_after_a_kill(
    settings, server, small, phantoms, cache, tmp_path
):
    store = f"sqlite:///{tmp_path}/local.db"
    more = ["tracking=mlflow", f"tracking.uri={store}", f"data.root={phantoms}", f"cache_dir={cache}"]
    going = train(*more, "trainer.max_epochs=2000", "trainer.patience=0", cwd=tmp_path)
    try:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("runs/*/checkpoints/last.ckpt")):
            assert going.poll() is None, going.communicate()[0]
            assert time.monotonic() < deadline, "no epoch ended within 90 s"
            time.sleep(0.3)
        going.send_signal(signal.SIGSTOP)  # it keeps its folder and leaves the processor to the other
        again = train(*more, "ckpt=last", cwd=tmp_path)
        printed, _ = again.communicate(timeout=150)
        assert again.returncode == 2
        assert "Another training is writing to" in printed
        assert "Traceback" not in printed
        assert sync(small(*settings)) == 1
    finally:
        going.kill()
        going.communicate()
    assert sync(small(*settings)) == 1
    assert_same(server, small(*settings))
