"""Runs in the local store: what they keep, when they begin, how they end, and which one a folder goes on with."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from mlflow import MlflowClient

from chestct import program
from chestct.config.compose import CONF
from chestct.errors import ChestCTError, ConfigError, Interrupted
from chestct.files import sole_writer
from chestct.tracking import TrackingError, open_run, run_of, stores, sync
from chestct.tracking import run as tracking_run
from chestct.tracking.run import RUN_ID_FILE
from chestct.version import code_version
from tests.conftest import SMALL
from tests.tracking.conftest import fit, recorded, runs


def test_a_run_keeps_settings_code_files_and_a_dozen_metrics(small, uri, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "brave-fox")
    cfg = small("tracking=mlflow", f"tracking.uri={uri}", "data.labels={a.b: cancer}")
    with recorded(cfg, tmp_path / "out") as run:
        run.tags({"data.split": "grouped"})
        (tmp_path / "report").mkdir()
        (tmp_path / "report" / "metrics.json").write_bytes(b"x")
        heads = tmp_path / "report" / "refits" / "within" / "checkpoints"  # of the protocol: gigabytes
        heads.mkdir(parents=True)
        (heads / "last.ckpt").write_bytes(b"x")
        run.evaluation({"auroc": 0.9, "auroc_low": 0.8, "margin": None, "f1": 0.7}, tmp_path / "report")
    (made,) = runs(uri)
    assert made.info.status == "FINISHED"
    assert made.info.run_name == "brave-fox"
    assert made.data.params["data.augment.flip"] == "0.5"
    assert made.data.metrics == {"test/auroc": 0.9, "test/auroc_low": 0.8}
    assert {"git.commit", "mlflow.user", "mlflow.source.name"} <= made.data.tags.keys()
    assert made.data.tags["folder"] == str(tmp_path / "out")
    files = [a.path for a in MlflowClient(uri).list_artifacts(made.info.run_id, "evaluation")]
    assert files == ["evaluation/metrics.json"]


def test_an_export_is_a_run_below_the_training_that_its_checkpoint_belongs_to(small, uri, tmp_path):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}")
    with recorded(cfg, tmp_path) as training:
        pass
    with run_of(cfg, tmp_path / "checkpoints" / "best.ckpt") as run:
        run.child("export openvino", {"decisions": 0.01})
    (child,) = [made for made in runs(uri) if made.info.run_id != training.run_id]
    assert (child.info.run_name, child.info.status) == ("export openvino", "FINISHED")
    assert child.data.tags["mlflow.parentRunId"] == training.run_id
    assert child.data.metrics == {"decisions": 0.01}
    assert not MlflowClient(uri).get_run(training.run_id).data.metrics


def test_seeds_of_a_job_belong_to_its_sweep(small, uri, tmp_path):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}")
    with open_run(cfg, tmp_path / "search", sweep=True) as sweep:
        sweep.begin()
        for job in ("3", "4/seed-0"):
            with recorded(cfg, tmp_path / "search" / job):
                pass
    jobs = {run.info.run_name: run.data.tags.get("mlflow.parentRunId") for run in runs(uri)}
    assert jobs == {"search": None, "search 3": sweep.run_id, "search 4 seed-0": sweep.run_id}


@pytest.mark.parametrize(("tracking", "says"), [("off", ""), ("mlflow", "the local store: The tracking URI holds")])
def test_a_password_in_the_uri_ends_no_evaluation(small, tmp_path, monkeypatch, capsys, tracking, says):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret-word@host/db")
    (tmp_path / "mlflow_run_id.txt").write_text("0" * 32)
    with run_of(small(f"tracking={tracking}"), tmp_path / "best.ckpt") as run:
        assert run.client is None
    assert says in (printed := capsys.readouterr().out)
    assert bool(printed) == bool(says)


def test_the_curves_of_a_training_are_in_its_run_and_no_variable_of_the_environment_changes(small, uri, tmp_path):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}")
    before = dict(os.environ)
    with recorded(cfg, tmp_path / "out") as run:
        fit(run, range(3))
        run.loggers()[0].log_metrics({"train/loss": 1.0, "train/f1": 1.0, "test/auroc": 1.0, "epoch": 1.0, "mine": 1.0})
        assert runs(uri)[0].info.status == "RUNNING"  # evaluation and report are to come
    history = MlflowClient(uri).get_metric_history(run.run_id, "valid/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert runs(uri)[0].info.status == "FINISHED"
    assert runs(uri)[0].data.metrics.keys() == {"valid/loss", "train/loss", "mine"}  # the details are in history.csv
    assert dict(os.environ) == before


def log_and_end(logger):
    """What a process that Lightning spawned does."""
    for step in range(3):
        logger.log_metrics({"m": float(step)}, step)
    logger.finalize("success")


@pytest.mark.slow
def test_no_metric_of_a_spawned_process_is_lost_when_it_ends(small, uri, tmp_path):
    with recorded(small("tracking=mlflow", f"tracking.uri={uri}"), tmp_path / "out") as run:
        process = multiprocessing.get_context("spawn").Process(target=log_and_end, args=run.loggers())
        process.start()
        process.join()
    assert [metric.value for metric in MlflowClient(uri).get_metric_history(run.run_id, "m")] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("opened", "error", "ends"),
    [(recorded, ValueError, ["FAILED"]), (recorded, Interrupted, ["KILLED"]), (open_run, ValueError, [])],
)
def test_a_run_that_does_not_finish_is_marked_and_none_is_left_by_what_never_began(
    small, uri, tmp_path, opened, error, ends
):
    with pytest.raises(error), opened(small("tracking=mlflow", f"tracking.uri={uri}"), tmp_path / "out"):
        raise error
    assert [made.info.status for made in runs(uri)] == ends


@pytest.mark.parametrize("sweep", [True, False])
def test_a_store_that_breaks_in_the_middle_is_one_error_with_the_way_out(small, uri, tmp_path, sweep):
    says = f"mlflow.db cannot be used .*not a database.*(the same command|python train.py ckpt={tmp_path}/out) "
    cfg, file = small("tracking=mlflow", f"tracking.uri={uri}"), tmp_path / "mlflow.db"
    with pytest.raises(TrackingError, match=says), recorded(cfg, tmp_path / "out", sweep):
        file.write_bytes(b"no database at all, " * 5000)


def test_what_a_server_refuses_of_one_run_or_experiment_keeps_no_other_run_back(small, uri, monkeypatch):
    local = MlflowClient(uri)
    mine, gone = map(local.create_experiment, ("mine", "gone"))
    known = local.search_experiments()  # in which `gone` comes first
    large = [local.create_run(experiment).info.run_id for experiment in (gone, mine, mine)][1]
    monkeypatch.setitem(sync.__globals__, "send", Mock(side_effect=[OSError("413 too large"), "copy"]))
    monkeypatch.setitem(sync.__globals__, "probe", lambda _, name: "'gone' was deleted." if name == "gone" else None)
    monkeypatch.setattr(MlflowClient, "search_experiments", lambda *_, **__: known)  # the server answers
    says = f"^1 of 3 runs are on .*\n'gone' was deleted\\.\n{large}: 413 too large\\.\nThe same command goes on"
    with pytest.raises(TrackingError, match=says):
        sync(small("tracking=mlflow", "tracking.uri=http://127.0.0.1:9", f"tracking.local={uri}"))


def test_a_server_that_is_gone_is_asked_once_not_for_each_experiment(small, uri, monkeypatch):
    for name in "abc":
        MlflowClient(uri).create_run(MlflowClient(uri).create_experiment(name))
    monkeypatch.setitem(sync.__globals__, "probe", asked := Mock(return_value="The server is gone."))
    with pytest.raises(TrackingError, match=r"^0 of 3 runs are on .*\nThe server is gone\.\nThe same command"):
        sync(small("tracking=mlflow", "tracking.uri=http://127.0.0.1:9", f"tracking.local={uri}"))
    asked.assert_called_once()


@pytest.mark.parametrize("known", [True, False])
def test_a_store_is_made_ready_once_and_a_new_one_not_before_the_run_begins(small, uri, tmp_path, monkeypatch, known):
    calls, file = [], tmp_path / "mlflow.db"
    made = file.read_bytes()
    if not known:
        file.unlink()

    def prepare(store):
        calls.append(store)
        file.write_bytes(made)

    monkeypatch.setattr(tracking_run, "prepare", prepare)
    cfg = small("tracking=mlflow", f"tracking.uri={uri}")
    with open_run(cfg, tmp_path / "out") as run:
        assert file.exists() == known  # settings or data may yet prove wrong, which shall leave no store
        assert calls == [uri] * known
        run.begin()
    assert calls == [uri]
    assert len(runs(uri)) == 1


@pytest.mark.parametrize(("resumed", "kept"), [(["ckpt=x.ckpt"], [("0.1", 0.2)]), ([], [("0.2", 0.2), ("0.1", 0.1)])])
def test_a_resumed_run_is_the_same_run_and_one_that_begins_anew_another(small, uri, tmp_path, resumed, kept):
    for lr, more in (("0.1", []), ("0.2", resumed)):
        cfg = small("tracking=mlflow", f"tracking.uri={uri}", f"optim.lr={lr}", *more)
        with recorded(cfg, tmp_path / "out") as run:
            run.metrics({"m": float(lr)})
    assert [(made.data.params["optim.lr"], made.data.metrics["m"]) for made in runs(uri)] == kept


@pytest.mark.parametrize("deleted", [True, False])
def test_a_run_that_is_gone_is_replaced_with_a_message(small, uri, tmp_path, capsys, deleted):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}", "ckpt=last.ckpt")
    note = tmp_path / "out" / "checkpoints" / RUN_ID_FILE
    with recorded(cfg, tmp_path / "out"):
        pass
    gone = note.read_text().strip()
    if deleted:
        MlflowClient(uri).delete_run(gone)
    else:
        note.write_text("0123456789abcdef0123456789abcdef")
    with recorded(cfg, tmp_path / "out") as run:
        assert run.run_id != gone
    assert "or was deleted; a new one" in capsys.readouterr().out
    assert note.read_text().strip() == run.run_id


def test_runs_and_caches_of_a_temporary_copy_lie_in_the_repository(small, empty_store, tmp_path, monkeypatch):
    home, copy = tmp_path / "home", tmp_path / "copy"
    for folder in (home, copy):
        folder.mkdir()
    shutil.copy(empty_store, home / "mlflow.db")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(home))  # what DVC tells the stages of a queued experiment
    cfg = small("tracking=mlflow", "cache_dir=.cache")
    with recorded(cfg, copy / "out") as run:
        run.artifacts(Path(__file__))
    assert cfg.cache == home / ".cache"
    (made,) = runs(f"sqlite:///{home}/mlflow.db")
    assert made.info.artifact_uri.startswith(f"{home}/mlruns/chestct/")
    assert list(copy.iterdir()) == [copy / "out"]


def test_a_project_that_was_copied_reads_and_writes_its_own_artifacts(small, uri, tmp_path, capsys):
    second = tmp_path / "second" / "mlflow.db"
    with recorded(small("tracking=mlflow", f"tracking.uri={uri}"), tmp_path / "out") as run:
        run.artifacts(Path(__file__))
    shutil.copytree(tmp_path / "mlruns", second.parent / "mlruns")
    shutil.copy(tmp_path / "mlflow.db", second)
    with recorded(small("tracking=mlflow", f"tracking.uri=sqlite:///{second}"), tmp_path / "new"):
        pass
    assert f"no longer in {tmp_path}/mlruns/chestct." in capsys.readouterr().out
    places = [Path(made.info.artifact_uri) for made in runs(f"sqlite:///{second}")]
    assert [place.relative_to(second.parent / "mlruns" / "chestct").name for place in places] == ["artifacts"] * 2
    assert (places[1] / Path(__file__).name).is_file()
    stores.prepare(f"sqlite:///{second}")
    assert capsys.readouterr().out == ""
    (tmp_path / "second").rename(third := tmp_path / "third")  # and an evaluation is the first that looks
    with run_of(
        small("tracking=mlflow", f"tracking.uri=sqlite:///{third}/mlflow.db"),
        tmp_path / "new" / "checkpoints" / "best.ckpt",
    ):
        assert f"no longer in {tmp_path}/second/mlruns/chestct." in capsys.readouterr().out


def test_a_deleted_experiment_is_one_clear_error(small, uri, tmp_path):
    client, cfg = MlflowClient(uri), small("tracking=mlflow", f"tracking.uri={uri}")
    client.delete_experiment(client.create_experiment("chestct"))
    with pytest.raises(ConfigError, match=r"tracking\.experiment=NAME"), recorded(cfg, tmp_path):
        pass


def test_the_commit_is_that_of_the_code_and_not_of_the_project_that_it_is_installed_in(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for name in ("tracked.py", "installed.py"):
        (tmp_path / name).touch()
    for command in ("init -q", "add tracked.py", "commit -qm x"):
        subprocess.run([*git, *command.split()], check=True)
    monkeypatch.setattr("chestct.version.__file__", str(tmp_path / "tracked.py"))
    assert len(code_version()["git.commit"]) == 40
    monkeypatch.setattr("chestct.version.__file__", str(tmp_path / "installed.py"))
    assert code_version() == {}


def test_two_trainings_cannot_write_to_one_folder(tmp_path):
    refused = pytest.raises(ChestCTError, match=f"Another training is writing to {tmp_path}")
    with sole_writer(tmp_path), refused, sole_writer(tmp_path):
        pass
    with sole_writer(tmp_path):
        pass


def test_an_empty_folder_is_removed_while_it_is_held(tmp_path, monkeypatch):
    def remove(out, **_):
        with pytest.raises(ChestCTError, match="Another training"), sole_writer(out):
            pass
        removed.append(out)

    removed = []
    monkeypatch.setattr("shutil.rmtree", remove)
    program._remove_if_empty(tmp_path)
    assert removed == [tmp_path]


def test_a_folder_that_cannot_be_removed_hides_no_mistake(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)  # which rmtree refuses
    program._remove_if_empty(tmp_path / "link")
    (tmp_path / "file").touch()
    program._remove_if_empty(tmp_path / "file" / "below")


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [(), ("optim.lr=-1",)])
def test_a_second_start_in_a_folder_leaves_the_training_there_in_peace(tmp_path, phantoms, cache, mistake):
    command = [sys.executable, str(CONF.parent / "train.py"), *SMALL, f"data.root={phantoms}", f"cache_dir={cache}"]
    command.append(f"hydra.run.dir={tmp_path}/run")
    with sole_writer(tmp_path / "run"):
        (tmp_path / "run" / "settings.yaml").touch()  # all that there is while slices are decoded
        done = subprocess.run([*command, *mistake], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert ("out of range" if mistake else "Another training is writing to") in done.stderr
        assert (tmp_path / "run" / "settings.yaml").is_file()
    subprocess.run([*command, "optim.lr=-1"], cwd=tmp_path, capture_output=True)
    assert not (tmp_path / "run").exists()
