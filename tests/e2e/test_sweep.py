"""Grids and searches through the command line: what they leave behind, how they go on, and how they fail."""

import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient

from chestct.config.compose import CONF, compose
from tests.conftest import SMALL

ROOT = CONF.parent
QUICK = ("trainer.max_epochs=2", "trainer.patience=0")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "sweep").glob("*.yaml")))
def test_every_sweep_composes_and_searches_settings_that_there_are(name):
    assert not compose(f"sweep={name}").evaluation.report
    space = yaml.safe_load((CONF / "sweep" / f"{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
    for key, values in space.items():
        first = re.sub(r"^(tag\(log, )?(choice|interval)\(|\)+$", "", str(values)).split(",")[0]
        compose(f"{key}={first}")


def table(folder):
    return pd.read_csv(folder / "sweep.csv")


def runs(tmp_path):
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    known = client.search_runs([client.get_experiment_by_name("chestct").experiment_id])
    parents = [run for run in known if "mlflow.parentRunId" not in run.data.tags]
    return client, parents, [run for run in known if run not in parents]


@pytest.mark.slow
def test_a_search_ends_with_its_winner_and_the_command_that_makes_it_again(call, tmp_path):
    status, out, err = call("train.py", "-m", "sweep=head", "hydra.sweeper.trials=3", "tracking=mlflow", *QUICK)
    assert status == 0, err
    folder = tmp_path / "runs" / "sweep-head"
    results = table(folder)
    assert len(results) == 3
    assert results["valid/loss"].is_monotonic_increasing
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*/evaluation"))
    assert not list(folder.glob("*/bundle"))
    # parent and children
    client, (parent,), children = runs(tmp_path)
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert len(children) == 3
    assert {"sweep/sweep.csv", "sweep/sweep.png"} == {
        a.path for a in client.list_artifacts(parent.info.run_id, "sweep")
    }
    assert not [name for run in children for name in run.data.metrics if "test" in name]
    # the winner again
    (line,) = [line for line in out.splitlines() if line.startswith("  python train.py")]
    settings = shlex.split(line)[2:]
    assert parent.data.tags["sweep.winner"] == line.strip()
    status, _, err = call("train.py", *settings, small=False)
    assert status == 0, err
    (run,) = [path for path in (tmp_path / "runs").iterdir() if path != folder]
    again = pd.read_csv(run / "history.csv")["valid/loss"].min()
    assert again == pytest.approx(results["valid/loss"].iloc[0], abs=1e-6)
    assert (run / "bundle" / "bundle.json").is_file()


@pytest.mark.slow
def test_a_search_that_was_cut_short_makes_the_trials_that_it_would_have_made(call, tmp_path):
    for folder, trials in (("whole", (7,)), ("cut", (3, 7))):
        for n in trials:
            settings = (f"hydra.sweeper.trials={n}", f"hydra.sweep.dir={tmp_path}/{folder}")
            status, _, err = call("train.py", "-m", "sweep=head", *settings, "trainer.max_epochs=1")
            assert status == 0, err
    whole, cut = table(tmp_path / "whole"), table(tmp_path / "cut")
    assert len(cut) == 7
    pd.testing.assert_frame_equal(cut, whole)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [("sweep=head", "hydra.sweeper.trials=1"), ("optim.lr=1e-2,1e-4",)])
def test_a_finished_sweep_is_summed_up_again_and_nothing_is_trained(call, tmp_path, settings):
    folder = tmp_path / "named"
    command = ("train.py", "-m", *settings, f"hydra.sweep.dir={folder}", "trainer.max_epochs=1")
    first = call(*command)
    before = (folder / "0" / "history.csv").stat().st_mtime_ns
    second = call(*command)
    assert first[0] == second[0] == 0
    assert (folder / "0" / "history.csv").stat().st_mtime_ns == before
    assert second[1].splitlines()[-6:] == first[1].splitlines()[-6:]


@pytest.mark.slow
def test_a_search_with_other_settings_does_not_go_on_in_the_same_folder(call, tmp_path):
    command = ("train.py", "-m", "sweep=head", "hydra.sweeper.trials=1", "trainer.max_epochs=1")
    assert call(*command)[0] == 0
    for other, says in (("seed=1", "another settings"), ("optim.lr=interval(0.1,0.2)", "another space")):
        status, _, err = call(*command, other)
        assert status == 2
        assert says in err
        assert "hydra.sweep.dir=FOLDER" in err
        assert "Traceback" not in err


@pytest.mark.slow
def test_a_metric_that_grows_is_maximised(call, tmp_path):
    settings = ("trainer.monitor=valid/auroc", "hydra.sweeper.trials=3", *QUICK)
    status, out, err = call("train.py", "-m", "sweep=head", *settings)
    assert status == 0, err
    results = table(tmp_path / "runs/sweep-head")
    assert results["valid/auroc"].is_monotonic_decreasing
    assert f"job {results['job'].iloc[0]}, valid/auroc" in out


@pytest.mark.slow
def test_a_grid_has_a_table_and_a_parent_too(call, tmp_path):
    status, out, err = call("train.py", "-m", "optim.lr=1e-2,1e-4", "tracking=mlflow", *QUICK)
    assert status == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert sorted(table(folder)["optim.lr"]) == [1e-4, 1e-2]
    assert "python train.py" in out
    _, (parent,), children = runs(tmp_path)
    assert parent.info.status == "FINISHED"
    assert [run.data.tags["mlflow.parentRunId"] for run in children] == [parent.info.run_id] * 2


@pytest.mark.parametrize("override", ["optim.lrr=1,2", "optim.lrr=interval(1,2)"])
def test_a_misspelt_key_in_a_sweep_is_named_before_anything_runs(call, tmp_path, override):
    mode = ("sweep=head",) if "interval" in override else ()
    status, out, err = call("train.py", "-m", *mode, override)
    assert status == 2
    assert "Did you mean optim.lr?" in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_value_that_fails_in_a_search_is_one_message_and_the_others_run(call, tmp_path):
    settings = ("hydra.sweeper.trials=3", "optim.lr=choice(-1,0.01)", "trainer.max_epochs=1")
    status, _, err = call("train.py", "-m", "sweep=head", *settings)
    states = table(tmp_path / "runs/sweep-head").set_index("optim.lr")["state"]
    assert dict(states.items()) == {-1: "failed", 0.01: "done"}
    assert status == 2
    assert "out of range" in err


def test_an_interval_needs_a_search(call):
    status, out, err = call("train.py", "-m", "optim.lr=interval(1e-4,1e-2)")
    assert status == 2
    assert "interval" in err.lower()
    assert "Traceback" not in out + err


def test_what_hydra_itself_refuses_is_one_message_without_a_traceback(call):
    status, out, err = call("train.py", "-m", "--cfg", "job")
    assert status == 2
    assert "--multirun" in err
    assert "Traceback" not in out + err


def started(tmp_path, phantoms, *arguments):
    settings = [s for s in SMALL if "max_epochs" not in s] + [f"data.root={phantoms}", f"cache_dir={tmp_path}/cache"]
    settings += ["tracking=mlflow", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "trainer.patience=0"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", "sweep=head", *settings, *arguments]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_search_goes_on_with_the_trial_it_was_at(tmp_path, phantoms, signum):
    settings = ("trainer.max_epochs=150", "hydra.sweeper.trials=3")
    process = started(tmp_path, phantoms, *settings)
    folder = tmp_path / "runs" / "sweep-head"
    deadline = time.monotonic() + 180
    while not list(folder.glob("1/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert not (folder / "2").exists()
    if signum != signal.SIGKILL:
        assert process.returncode == 130, errors
        assert "The same command goes on with it." in errors
        assert "Traceback" not in errors
        assert len(table(folder)) == 1
    first = (folder / "0" / "history.csv").stat().st_mtime_ns
    process = started(tmp_path, phantoms, *settings)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert sorted(table(folder)["job"]) == [0, 1, 2]
    assert (folder / "0" / "history.csv").stat().st_mtime_ns == first
    _, (parent,), children = runs(tmp_path)
    assert len(children) == 3
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}


@pytest.mark.slow
def test_jobs_in_parallel_processes_find_what_one_process_finds(call, tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = ("sweep=head", "hydra.sweeper.trials=2", "tracking=mlflow", *QUICK)
    status, _, err = call("train.py", "-m", *settings, "launcher=joblib")
    assert status == 0, err
    parallel = table(tmp_path / "runs/sweep-head")
    _, (parent,), children = runs(tmp_path)
    assert [run.data.tags["mlflow.parentRunId"] for run in children] == [parent.info.run_id] * 2
    status, _, err = call("train.py", "-m", *settings, f"hydra.sweep.dir={tmp_path}/alone", "tracking=off")
    assert status == 0, err
    pd.testing.assert_frame_equal(parallel, table(tmp_path / "alone"), atol=1e-6)


@pytest.mark.slow
def test_hopeless_trials_end_early_and_cannot_win(call, tmp_path):
    space = "optim.lr=choice(1e-2,5e-3,2e-2,1e-9)"
    settings = ("hydra.sweeper.prune=true", "hydra.sweeper.trials=8", "trainer.max_epochs=8", "trainer.patience=0")
    status, _, err = call("train.py", "-m", "sweep=head", *settings, space)
    assert status == 0, err
    results = table(tmp_path / "runs/sweep-head")
    assert (results["state"] == "pruned").any()
    for job, state in zip(results["job"], results["state"], strict=True):
        epochs = len(pd.read_csv(Path(tmp_path, "runs/sweep-head", str(job), "history.csv")))
        assert (epochs == 8) == (state == "done")


@pytest.mark.slow
def test_jobs_of_a_cluster_run_in_processes_of_their_own(call, tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # stands for an installed package
    here = ("launcher=slurm", "hydra/launcher=submitit_local")  # Submitit's own stand-in for a cluster
    settings = ("optim.lr=1e-2,-1", "evaluation.report=false", "trainer.max_epochs=1")
    status, _, err = call("train.py", "-m", *settings, *here)
    assert status == 2
    assert "out of range" in err
    assert "Traceback" not in err
    (folder,) = (tmp_path / "runs").iterdir()
    assert list(table(folder)["state"]) == ["done", "failed"]
