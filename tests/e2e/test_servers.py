"""Tracking and storage against real servers on loopback, which stand for DagsHub's."""

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
    assert "does not accept the user and password" in probe(server.uri)
    log_in(monkeypatch, "reader")
    assert "does not let this user write" in probe(server.uri)


@pytest.fixture
def settings(server, empty_store, tmp_path, monkeypatch):
    """Settings of a run of `writer` that is recorded on the server, with its local store in an empty folder."""
    shutil.copy(empty_store, tmp_path / "local.db")
    monkeypatch.chdir(tmp_path)
    log_in(monkeypatch, "writer")
    return (
        f"tracking.uri={server.uri}",
        f"tracking.local=sqlite:///{tmp_path}/local.db",
        "tracking.required=true",
        f"cache_dir={tmp_path}/cache",
    )


def copies(server, local, **kwargs):
    """(local run, its copies on the server), for the newest local run."""
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    here = MlflowClient(local.tracking.local)
    (run,) = here.search_runs([e.experiment_id for e in here.search_experiments()], max_results=1)
    experiment = client.get_experiment_by_name("chestct").experiment_id
    return run, client.search_runs([experiment], f"tags.`chestct.origin` = '{run.info.run_id}'", **kwargs)


def assert_same(server, cfg, twice=False):
    """The newest local run is on the server once, and whole; twice: a metric may stand there twice."""
    from mlflow import MlflowClient

    run, (copy,) = copies(server, cfg)
    here, there = MlflowClient(cfg.tracking.local), MlflowClient(server.uri)
    assert copy.data.params == run.data.params
    assert run.data.tags.items() <= copy.data.tags.items()
    assert copy.info.status == run.info.status
    assert copy.info.run_name == run.info.run_name
    assert [i.dataset.digest for i in copy.inputs.dataset_inputs] == [
        i.dataset.digest for i in run.inputs.dataset_inputs
    ]
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
    run.data("phantom", "f" * 64, "somewhere", {"train": 3})


def test_a_run_is_on_the_server_while_it_lasts_and_whole_at_its_end(server, settings, small, tmp_path, empty_store):
    cfg = small("tracking=mlflow", *settings)
    with recorded(cfg, tmp_path / "out") as run:
        act(run, range(20), tmp_path / "evaluation")
        deadline = time.monotonic() + 60
        while not (there := copies(server, cfg)[1]) or not there[0].data.metrics:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert there[0].info.status == "RUNNING"
        assert there[0].data.params["optim.lr"] == "0.01"
    copy = assert_same(server, cfg)

    # Another machine, with the run folder but without the local store, goes on in the same copy.
    shutil.copy(empty_store, tmp_path / "other.db")
    elsewhere = small("tracking=mlflow", *settings, f"tracking.local=sqlite:///{tmp_path}/other.db", "ckpt=last.ckpt")
    with recorded(elsewhere, tmp_path / "out") as run:
        run.metrics({"valid/loss": 0.01}, 20)
    _, more = copies(server, cfg)
    assert [one.info.run_id for one in more] == [copy.info.run_id]
    assert more[0].data.metrics["valid/loss"] == 0.01


def test_a_server_killed_and_restarted_in_mid_run_loses_nothing(settings, server, small, tmp_path, capfd):
    cfg = small("tracking=mlflow", *settings)
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
    cfg = small("tracking=mlflow", *settings)
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
            assert threading.main_thread() not in waited
            assert "does not answer" in probe(server.uri)
        except BaseException:
            server.signal(signal.SIGCONT)
            raise
    server.signal(signal.SIGCONT)
    assert threading.main_thread() not in waited
    assert "chestct sync" in capsys.readouterr().out
    sync(cfg)
    assert_same(server, cfg, twice=True)  # what the server took late, after the client had given up


def test_push_sends_what_was_trained_offline_once(settings, server, small, tmp_path, monkeypatch, capsys):
    away = small("tracking=mlflow", *settings, "tracking.uri=http://127.0.0.1:9", "tracking.required=false")
    with recorded(away, tmp_path / "out") as run:
        act(run, range(5), tmp_path / "evaluation")
    assert "cannot be reached" in capsys.readouterr().out
    cfg = small("tracking=mlflow", *settings)
    for _ in range(2):
        assert sync(cfg) == 1
    copy = assert_same(server, cfg)
    from mlflow import MlflowClient

    MlflowClient(server.uri).delete_run(copy.info.run_id)
    sync(cfg)
    assert "stays so" in capsys.readouterr().out
    assert copies(server, cfg)[1] == []


def test_push_goes_on_where_it_was_interrupted(settings, server, small, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    away = small("tracking=mlflow", *settings, "tracking.uri=http://127.0.0.1:9", "tracking.required=false")
    with recorded(away, tmp_path / "out") as run:
        act(run, range(5), tmp_path / "evaluation")
    cfg = small("tracking=mlflow", *settings)
    sent = []
    send = MlflowClient.log_artifact

    def breaks(self, run_id, path, folder=None):
        if len(sent) == 1:
            sent.append("broken")
            raise ConnectionError("cable pulled")
        send(self, run_id, path, folder)
        sent.append(Path(path).name)

    monkeypatch.setattr(MlflowClient, "log_artifact", breaks)
    with pytest.raises(TrackingError, match="The same command goes on"):
        sync(cfg)
    sync(cfg)
    assert sent == ["metrics.json", "broken", "plot.png"]
    assert_same(server, cfg)


def train(*overrides, cwd, **environment):
    """python train.py in a process of its own."""
    given = {override.split("=")[0] for override in overrides}
    settings = [setting for setting in SMALL if setting.split("=")[0] not in given]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *settings, *overrides],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_a_training_is_shared_whole_and_no_file_holds_a_password(settings, server, small, phantoms, cache, tmp_path):
    more = [*settings[:3], f"data.root={phantoms}", f"cache_dir={cache}", "tracking=mlflow"]
    done = train(*more, cwd=tmp_path, DVC_EXP_NAME="brave-fox", DAGSHUB_USER_TOKEN=PASSWORDS["writer"])
    printed, _ = done.communicate(timeout=200)
    assert done.returncode == 0, printed
    copy = assert_same(server, small(*settings))
    assert copy.data.tags["dvc.experiment"] == "brave-fox"
    assert "data.root=" in copy.data.tags["hydra.overrides"]
    assert copy.data.tags["data.leakage"] == "none"
    places = [path for root in (tmp_path, cache, server.folder) for path in root.rglob("*") if path.is_file()]
    assert len(places) > 20
    assert [path for path in places if PASSWORDS["writer"].encode() in path.read_bytes()] == []
    assert PASSWORDS["writer"] not in printed

    from chestct.models.checkpoint import find_checkpoint

    cfg = small(*settings)
    run, _ = copies(server, cfg)
    folder = next((tmp_path / "runs").iterdir())
    assert find_checkpoint(f"runs:/{run.info.run_id}", str(tmp_path / "runs"), cfg.tracking).parent.parent == folder
    fetched = find_checkpoint(f"runs:/{copy.info.run_id}", str(tmp_path / "elsewhere"), cfg.tracking)
    assert fetched.read_bytes() == (folder / "checkpoints" / "best.ckpt").read_bytes()


def logged(store):
    """Whether the newest run of a local store holds a validation loss: a checkpoint is written shortly before it."""
    from mlflow import MlflowClient

    client = MlflowClient(store)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=1)
    return bool(runs) and "valid/loss" in runs[0].data.metrics


def test_a_killed_training_is_pushed_as_killed(settings, server, small, phantoms, cache, tmp_path):
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path}/local.db"
    more = [f"tracking.uri={store}", f"data.root={phantoms}", f"cache_dir={cache}", "tracking=mlflow"]
    going = train(*more, "trainer.max_epochs=2000", "trainer.patience=0", cwd=tmp_path)
    try:
        deadline = time.monotonic() + 90
        cfg = small(*settings)
        while not (logged(store) and list(tmp_path.glob("runs/*/checkpoints/last.ckpt"))):
            assert going.poll() is None, going.communicate()[0]
            assert time.monotonic() < deadline, "no epoch ended within 90 s"
            time.sleep(0.3)
        assert sync(cfg) == 0  # still running: left alone
        going.send_signal(signal.SIGSTOP)  # it keeps its folder and leaves the processor to the other
        again = train(*more, "ckpt=last", cwd=tmp_path)
        printed, _ = again.communicate(timeout=150)
        assert again.returncode == 2
        assert "Another training is writing to" in printed
        assert "Traceback" not in printed
    finally:
        going.kill()
        going.communicate()
    assert sync(cfg) == 1
    assert assert_same(server, cfg).info.status == "KILLED"
    assert MlflowClient(store).get_metric_history(copies(server, cfg)[0].info.run_id, "valid/loss")
