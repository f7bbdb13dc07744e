"""Grids and searches through the command line: what they leave behind, how they go on, and how they fail."""

import re
import shlex
import signal
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from hydra.core.utils import JobReturn, JobStatus

from chestct.config.compose import CONF, compose
from chestct.errors import ChestCTError
from chestct.sweep import _errors, _next_trials, _open_study, _record
from chestct.tracking import TrackingError
from tests.conftest import SMALL, until
from tests.tracking.conftest import runs

ROOT = CONF.parent
QUICK = ("trainer.max_epochs=1", "trainer.patience=0")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "sweep").glob("*.yaml")))
def test_every_sweep_composes_and_searches_settings_that_there_are(name):
    assert not compose(f"sweep={name}").evaluation.report
    space = yaml.safe_load((CONF / "sweep" / f"{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
    for key, values in space.items():
        first = re.sub(r"^(tag\(log, )?(choice|interval)\(|\)+$", "", str(values)).split(",")[0]
        compose(f"{key}={first}")


def test_a_search_takes_any_seed_and_draws_by_it():
    import optuna

    values = []
    for seed in (20250101, 20250102):
        study = optuna.create_study()
        _next_trials(study, {"x": optuna.distributions.FloatDistribution(0, 1)}, total=1, jobs=1, seed=seed)
        values.append(study.trials[0].params["x"])
    assert values[0] != values[1]


def test_a_job_whose_settings_were_not_all_proposed_when_the_search_was_killed_is_not_run(tmp_path):
    from optuna.distributions import FloatDistribution

    space = {"optim.lr": FloatDistribution(0, 1), "model.dropout": FloatDistribution(0, 1)}
    study = _open_study(tmp_path, "min", [], space, grid=False)
    study.ask(space)  # is run again
    study.ask({"optim.lr": space["optim.lr"]})
    study = _open_study(tmp_path, "min", [], space, grid=False)
    assert {number: "stopped" in text for number, text in _errors(study).items()} == {1: True}
    assert [trial.number for trial in _next_trials(study, space, total=3, jobs=1, seed=0)] == [0]
    study.tell(0, 1.0)
    (trial,) = _next_trials(study, space, total=3, jobs=1, seed=0)
    assert (trial.number, trial.params.keys()) == (2, space.keys())


def returned(value):
    job = JobReturn(status=JobStatus.FAILED if isinstance(value, Exception) else JobStatus.COMPLETED)
    job.return_value = value
    return job


def test_a_job_that_failed_on_a_mistake_runs_again_when_the_sweep_goes_on_and_one_that_diverged_does_not(tmp_path):
    from optuna.distributions import CategoricalDistribution

    space = {"optim.lr": CategoricalDistribution(["1", "2", "3"])}
    study = _open_study(tmp_path, "min", [], space, grid=True)
    ran = []
    for value in (ChestCTError("Out of memory"), float("nan"), 0.5):
        (trial,) = _next_trials(study, space, total=3, jobs=1, seed=0)
        ran.append(trial.params["optim.lr"])
        _record(study, trial.number, returned(value))
    assert ran == ["1", "2", "3"]
    assert not _next_trials(study, space, total=3, jobs=1, seed=0)  # not for ever
    assert list(_errors(study)) == [0, 1]
    study = _open_study(tmp_path, "min", [], space, grid=True)
    (trial,) = _next_trials(study, space, total=3, jobs=1, seed=0)
    assert (trial.number, trial.params) == (0, {"optim.lr": "1"})
    _record(study, 0, returned(0.25))
    assert not _next_trials(study, space, total=3, jobs=1, seed=0)
    assert list(_errors(study)) == [1]


def table(folder):
    return pd.read_csv(folder / "sweep.csv")


def assert_one_family(tmp_path, jobs):
    """One parent run in MLflow with so many children, all of them finished; returns the parent."""
    known = runs(f"sqlite:///{tmp_path}/mlflow.db")
    (parent,) = (run for run in known if "mlflow.parentRunId" not in run.data.tags)
    children = [run.data.tags["mlflow.parentRunId"] for run in known if run is not parent]
    assert children == [parent.info.run_id] * jobs
    assert {run.info.status for run in known} == {"FINISHED"}
    assert not [name for run in known for name in run.data.metrics if "test" in name]
    return parent


def test_a_store_or_study_that_cannot_be_used_ends_the_sweep_and_fails_no_job(tmp_path):
    (tmp_path / "study.db").write_bytes(b"no database at all")
    with pytest.raises(TrackingError, match=r"study\.db cannot be used .*not a database.*hydra\.sweep\.dir=FOLDER"):
        _open_study(tmp_path, "min", [], {}, grid=True)
    with pytest.raises(TrackingError, match="disk full"):
        _record(None, 0, returned(TrackingError("disk full")))


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
def test_a_grid_goes_on_past_a_mistake_and_is_summed_up_again_but_not_with_other_settings(call, tmp_path):
    folder = tmp_path / "named"
    command = ("train.py", "-m", "optim.lr=-1,0.01", f"hydra.sweep.dir={folder}", "tracking=mlflow", *QUICK)
    first = call(*command)
    before = (folder / "1" / "history.csv").stat().st_mtime_ns
    second = call(*command)
    assert first[0] == second[0] == 2
    assert "out of range" in first[2]
    assert f"The same command runs job 0 again (with hydra.sweep.dir={folder})." in first[2]
    assert (folder / "1" / "history.csv").stat().st_mtime_ns == before
    assert second[1].splitlines()[-6:] == first[1].splitlines()[-6:]
    assert dict(table(folder).set_index("optim.lr")["state"]) == {-1: "failed", 0.01: "done"}
    assert not (folder / "0").exists()  # a mistake leaves no empty run
    for other in ("seed=1", "optim.lr=0.1,0.2"):
        status, _, err = call(*command, other)
        assert status == 2
        assert "hydra.sweep.dir=FOLDER" in err
        assert "Traceback" not in err


@pytest.mark.slow
def test_a_sweep_of_which_every_job_failed_alike_says_so_once_and_keeps_its_table(call, tmp_path):
    folder = tmp_path / "gone"
    status, _, err = call("train.py", "-m", "model.weights=gone", "optim.lr=1,2", *QUICK, f"hydra.sweep.dir={folder}")
    assert status == 2
    assert "2 of 2 jobs failed.\njob 0, 1: model.weights=gone: no such file" in err
    assert table(folder)["state"].tolist() == ["failed"] * 2
    status, _, err = call("train.py", "-m", "optim.lr=1,2", *QUICK, f"hydra.sweep.dir={folder}")
    assert status == 2
    assert "or remove it, or begin another" in err


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_search_goes_on_with_the_trial_it_was_at_and_finds_what_it_would_have_found(
    call, tmp_path, phantoms, cache, signum
):
    small = [*SMALL, f"data.root={phantoms}", f"cache_dir={cache}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    settings = ["sweep=head", "hydra.sweeper.trials=3", "tracking=mlflow"]
    settings += ["trainer.max_epochs=100", "trainer.patience=0"]
    if signum == signal.SIGKILL:  # whose workers end, too: else `communicate` would wait, and their jobs run twice
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
        settings += ["launcher=joblib", "hydra.sweeper.jobs=1", "hydra.launcher.n_jobs=2"]
    folder = tmp_path / "runs" / "sweep-head"
    given = [setting for setting in small if not setting.startswith(("trainer.max_epochs", "tracking=off"))]
    command = [sys.executable, str(ROOT / "train.py"), "-m", *settings, *given]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until((folder / "1" / "checkpoints" / "last.ckpt").exists, 300, process)
    process.send_signal(signum)
    printed, _ = process.communicate(timeout=120)
    assert not (folder / "2").exists()
    if signum == signal.SIGTERM:
        assert process.returncode == 130, printed
        assert "The same command goes on with it" in printed
        assert "Traceback" not in printed
        assert len(table(folder)) == 1
    first = (folder / "0" / "history.csv").stat().st_mtime_ns
    assert call("train.py", "-m", *settings)[0] == 0
    assert (folder / "0" / "history.csv").stat().st_mtime_ns == first
    assert_one_family(tmp_path, 3)
    assert call("train.py", "-m", *settings, f"hydra.sweep.dir={tmp_path}/whole", "tracking=off")[0] == 0
    pd.testing.assert_frame_equal(table(folder), table(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit"])
def test_jobs_run_in_processes_of_their_own(call, tmp_path, monkeypatch, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher}_launcher")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # stands for an installed package
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Submitit's own stand-in for a cluster
    here = ("launcher=joblib",) if launcher == "joblib" else ("launcher=slurm", "hydra/launcher=submitit_local")
    status, _, err = call("train.py", "-m", "optim.lr=1e-2,-1", "evaluation.report=false", *QUICK, *here)
    assert status == 2
    assert "out of range" in err
    assert "Traceback" not in err
    (folder,) = (tmp_path / "runs").iterdir()
    assert list(table(folder)["state"]) == ["done", "failed"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("optim.lrr=1,2",), "Did you mean optim.lr?"),
        (("sweep=head", "optim.lrr=interval(1,2)"), "Did you mean optim.lr?"),
        (("optim.lr=interval(1e-4,1e-2)",), "hydra.sweeper.trials=N"),
        (("hydra.sweeper.trials=3",), "Nothing to search"),
        (("hydra.sweeper.trials=-1", "optim.lr=1,2"), "hydra.sweeper.trials=-1"),
        (("hydra.sweeper.jobs=0", "optim.lr=1,2"), "hydra.sweeper.jobs=0"),
        (("launcher=ray", "optim.lr=1,2"), "pip install hydra-ray-launcher"),
        (("data.root=.,gone", "optim.lr=1,2"), "No folder gone"),
        (("data.sources.a.root=.,gone", "optim.lr=1,2"), "No folder gone"),
        (("--cfg", "job"), "--multirun"),  # what Hydra itself refuses
    ],
)
def test_a_mistake_in_a_sweep_is_one_message_before_anything_runs(call, tmp_path, arguments, says):
    status, out, err = call("train.py", "-m", *arguments)
    assert status == 2
    assert says in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "runs").exists()
