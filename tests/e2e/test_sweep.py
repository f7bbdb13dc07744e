"""Grids and searches through the command line: what they leave behind, how they go on, and how they fail."""

import re
import shlex
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient

from chestct.config.compose import CONF, compose
from tests.conftest import SMALL

ROOT = CONF.parent
QUICK = ("trainer.max_epochs=1", "trainer.patience=0")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "sweep").glob("*.yaml")))
def test_every_sweep_composes_and_searches_settings_that_there_are(name):
    assert not compose(f"sweep={name}").evaluation.report
    space = yaml.safe_load((CONF / "sweep" / f"{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
    for key, values in space.items():
        first = re.sub(r"^(tag\(log, )?(choice|interval)\(|\)+$", "", str(values)).split(",")[0]
        compose(f"{key}={first}")


def table(folder):
    return pd.read_csv(folder / "sweep.csv")


def assert_one_family(tmp_path, jobs):
    """One parent run in MLflow with so many children, all of them finished; returns the parent."""
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    known = client.search_runs([client.get_experiment_by_name("chestct").experiment_id])
    (parent,) = (run for run in known if "mlflow.parentRunId" not in run.data.tags)
    children = [run.data.tags["mlflow.parentRunId"] for run in known if run is not parent]
    assert children == [parent.info.run_id] * jobs
    assert {run.info.status for run in known} == {"FINISHED"}
    assert not [name for run in known for name in run.data.metrics if "test" in name]
    return parent


@pytest.mark.slow
def test_a_search_ends_with_its_winner_and_the_command_that_makes_it_again(call, tmp_path):
    settings = ("hydra.sweeper.trials=3", "trainer.monitor=valid/auroc", "tracking=mlflow", *QUICK)
    status, out, err = call("train.py", "-m", "sweep=head", *settings)
    assert status == 0, err
    folder = tmp_path / "runs" / "sweep-head"
    results = table(folder)
    assert len(results) == 3
    assert results["valid/auroc"].is_monotonic_decreasing
    assert not list(folder.glob("*/evaluation"))
    parent = assert_one_family(tmp_path, 3)
    (line,) = [line for line in out.splitlines() if line.startswith("  python train.py")]
    assert parent.data.tags["sweep.winner"] == line.strip()
    status, _, err = call("train.py", *shlex.split(line)[2:], small=False)
    assert status == 0, err
    (run,) = [path for path in (tmp_path / "runs").iterdir() if path != folder]
    again = pd.read_csv(run / "history.csv")["valid/auroc"].max()
    assert again == pytest.approx(results["valid/auroc"].iloc[0], abs=1e-6)
    assert (run / "bundle" / "bundle.json").is_file()


@pytest.mark.slow
def test_a_search_that_was_cut_short_makes_the_trials_that_it_would_have_made(call, tmp_path):
    for folder, trials in (("whole", (7,)), ("cut", (3, 7))):
        for n in trials:
            settings = (f"hydra.sweeper.trials={n}", f"hydra.sweep.dir={tmp_path}/{folder}")
            status, _, err = call("train.py", "-m", "sweep=head", *settings, *QUICK)
            assert status == 0, err
    assert len(table(tmp_path / "cut")) == 7
    pd.testing.assert_frame_equal(table(tmp_path / "cut"), table(tmp_path / "whole"))


@pytest.mark.slow
def test_a_grid_goes_on_past_a_mistake_and_is_summed_up_again_but_not_with_other_settings(call, tmp_path):
    folder = tmp_path / "named"
    command = ("train.py", "-m", "optim.lr=-1,0.01", f"hydra.sweep.dir={folder}", "tracking=mlflow", *QUICK)
    first = call(*command)
    before = (folder / "1" / "history.csv").stat().st_mtime_ns
    second = call(*command)
    assert first[0] == second[0] == 2
    assert "out of range" in first[2]
    assert (folder / "1" / "history.csv").stat().st_mtime_ns == before
    assert second[1].splitlines()[-6:] == first[1].splitlines()[-6:]
    assert dict(table(folder).set_index("optim.lr")["state"]) == {-1: "failed", 0.01: "done"}
    for other in ("seed=1", "optim.lr=0.1,0.2"):
        status, _, err = call(*command, other)
        assert status == 2
        assert "hydra.sweep.dir=FOLDER" in err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("optim.lrr=1,2",), "Did you mean optim.lr?"),
        (("sweep=head", "optim.lrr=interval(1,2)"), "Did you mean optim.lr?"),
        (("optim.lr=interval(1e-4,1e-2)",), "hydra.sweeper.trials=N"),
        (("hydra.sweeper.trials=3",), "Nothing to search"),
        (("--cfg", "job"), "--multirun"),  # what Hydra itself refuses
    ],
)
def test_a_mistake_in_a_sweep_is_one_message_before_anything_runs(call, tmp_path, arguments, says):
    status, out, err = call("train.py", "-m", *arguments)
    assert status == 2
    assert says in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "runs").exists()


def started(tmp_path, phantoms, *arguments):
    settings = [s for s in SMALL if "max_epochs" not in s] + [f"data.root={phantoms}", f"cache_dir={tmp_path}/cache"]
    settings += ["tracking=mlflow", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "trainer.patience=0"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", "sweep=head", *settings, *arguments]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
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
        assert "The same command goes on with it" in errors
        assert "Traceback" not in errors
        assert len(table(folder)) == 1
    first = (folder / "0" / "history.csv").stat().st_mtime_ns
    process = started(tmp_path, phantoms, *settings)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert sorted(table(folder)["job"]) == [0, 1, 2]
    assert (folder / "0" / "history.csv").stat().st_mtime_ns == first
    assert_one_family(tmp_path, 3)


@pytest.mark.slow
def test_jobs_in_parallel_processes_find_what_one_process_finds(call, tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = ("sweep=head", "hydra.sweeper.trials=2", *QUICK)
    status, _, err = call("train.py", "-m", *settings, "launcher=joblib", "tracking=mlflow")
    assert status == 0, err
    assert_one_family(tmp_path, 2)
    status, _, err = call("train.py", "-m", *settings, f"hydra.sweep.dir={tmp_path}/alone")
    assert status == 0, err
    pd.testing.assert_frame_equal(table(tmp_path / "runs/sweep-head"), table(tmp_path / "alone"), atol=1e-6)


@pytest.mark.slow
def test_jobs_of_a_cluster_run_in_processes_of_their_own(call, tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # stands for an installed package
    here = ("launcher=slurm", "hydra/launcher=submitit_local")  # Submitit's own stand-in for a cluster
    status, _, err = call("train.py", "-m", "optim.lr=1e-2,-1", "evaluation.report=false", *QUICK, *here)
    assert status == 2
    assert "out of range" in err
    assert "Traceback" not in err
    (folder,) = (tmp_path / "runs").iterdir()
    assert list(table(folder)["state"]) == ["done", "failed"]
