"""The store on this machine in its first minute: kills, two processes at once, and files that are no store."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest
from mlflow import MlflowClient

from chestct.config.compose import CONF
from chestct.tracking import TrackingError
from chestct.tracking.local_store import prepare

PREPARE = "import sys\nfrom chestct.tracking.local_store import prepare\nprepare(sys.argv[1])"
MLFLOW = "import sys\nfrom mlflow import MlflowClient\nMlflowClient(sys.argv[1]).search_experiments()"


def started(code, uri):
    environment = os.environ | {"PYTHONPATH": str(CONF.parent)}
    return subprocess.Popen([sys.executable, "-c", code, uri], env=environment, stderr=subprocess.PIPE, text=True)


def killed_when_there_is(process, file, size):
    """SIGKILL once the file has so many bytes, which it passes while it is migrated."""
    while not file.is_file() or file.stat().st_size < size:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def assert_usable(uri):
    client = MlflowClient(uri)
    run = client.create_run(client.create_experiment("new"))
    client.log_metric(run.info.run_id, "m", 1.0)
    assert client.get_run(run.info.run_id).data.metrics == {"m": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 200_000])
def test_a_kill_while_the_store_is_made_leaves_none_and_the_next_run_makes_it(tmp_path, size):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    killed_when_there_is(started(PREPARE, uri), tmp_path / "mlflow.db.making", size)
    assert not (tmp_path / "mlflow.db").exists()
    prepare(uri)
    assert_usable(uri)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 100_000, 300_000])
def test_a_store_that_mlflow_itself_left_half_made_is_mended(tmp_path, size):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    killed_when_there_is(started(MLFLOW, uri), tmp_path / "mlflow.db", size)
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


def test_a_store_with_runs_that_mlflow_cannot_open_is_left_alone(empty_store, tmp_path):
    store = tmp_path / "mlflow.db"
    store.write_bytes(empty_store.read_bytes())
    with closing(sqlite3.connect(store)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'gone'")
        database.execute("INSERT INTO runs (run_uuid, experiment_id) VALUES ('a', 0)")
    before = store.read_bytes()
    with pytest.raises(TrackingError, match="mlflow db upgrade"):
        prepare(f"sqlite:///{store}")
    assert store.read_bytes() == before


def test_the_same_without_runs_is_made_anew_and_the_old_one_kept(empty_store, tmp_path, capsys):
    store = tmp_path / "mlflow.db"
    store.write_bytes(empty_store.read_bytes())
    with closing(sqlite3.connect(store)) as database, database:
        database.execute("DROP TABLE alembic_version")
        database.execute("DROP TABLE registered_models")
    prepare(f"sqlite:///{store}")
    assert (tmp_path / "mlflow.db.half-made").read_bytes().startswith(b"SQLite")
    assert "made anew" in capsys.readouterr().out
    assert_usable(f"sqlite:///{store}")


def not_a_database(folder):
    (folder / "mlflow.db").write_bytes(b"no database at all, " * 50)
    return folder / "mlflow.db"


def a_folder(folder):
    (folder / "mlflow.db").mkdir()
    return folder / "mlflow.db"


def in_a_file(folder):
    (folder / "file").touch()
    return folder / "file" / "mlflow.db"


@pytest.mark.parametrize("make", [not_a_database, a_folder, in_a_file])
def test_a_place_that_cannot_hold_a_store_is_one_error_and_no_retries(tmp_path, make, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    with pytest.raises(TrackingError, match=r"tracking\.local=sqlite:///FILE"):
        prepare(f"sqlite:///{make(tmp_path)}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_without_the_right_to_write_is_one_error(empty_store, tmp_path):
    store = tmp_path / "mlflow.db"
    store.write_bytes(empty_store.read_bytes())
    store.chmod(0o444)
    with pytest.raises(TrackingError, match="tracking=off"):
        prepare(f"sqlite:///{store}")
