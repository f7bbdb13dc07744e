"""The package as others get it: a wheel in an environment of its own, far from the repository, on an odd terminal."""

import json
import os
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import SMALL
from tests.e2e.test_commands import ROOT


def test_every_package_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    there = {f"chestct.{path.parent.name}" for path in (ROOT / "chestct").glob("*/__init__.py")}
    assert there | {"chestct", "chestct.conf"} == {name for name in listed if name.startswith("chestct")}


def test_uv_takes_the_tested_versions():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]
    assert listed["constraint-dependencies"] == pins, f"pyproject.toml should have: {json.dumps(pins)}"


@pytest.mark.slow
def test_the_wheel_trains_evaluates_and_predicts_anywhere(installed, tmp_path, phantoms):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["MPLCONFIGDIR"] = str(tmp_path / "fonts")  # that nobody looked at before

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(installed / "chestct"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return done

    def chestct(*arguments: str) -> str:
        return run(*arguments).stdout

    where = [str(installed / "python"), "-c", "import chestct; print(chestct.__file__)"]
    assert str(installed.parent) in subprocess.check_output(where, cwd=tmp_path, env=environment, text=True)
    assert "learning rate of the head" in chestct("train", "--help")
    seen = ("trainer.progress=true", "tracking=mlflow")
    train = [*SMALL, f"data.root={phantoms}", "hydra.run.dir=run", "evaluation.resamples=100", *seen]
    done = run("train", *train)
    lines = [line.split(" (")[0] for line in done.stdout.splitlines()[:7]]
    assert lines[0] == "Reading slices"
    assert lines[-2].startswith("Training on ")
    assert all(line.startswith("Features, ") for line in lines[1:-2])
    assert lines[-1] == "Measuring the best checkpoint, writing its report and bundle"
    assert "SYNTHETIC" in done.stdout
    assert "INFO" not in done.stdout + done.stderr  # MLflow's, Alembic's, Lightning's
    assert "AUROC" in chestct("evaluate", "ckpt=run", "hydra.run.dir=again")
    table = chestct("predict", str(phantoms / "test"), "--bundle", "run/bundle", "--out", "scores.csv")
    assert "not a medical device" in table.lower()
    assert len((tmp_path / "scores.csv").read_text(encoding="utf-8").splitlines()) > 10
    assert json.loads((tmp_path / "again" / "metrics.json").read_text(encoding="utf-8"))["test"]


@pytest.mark.slow
def test_a_terminal_that_lacks_characters_does_not_end_a_finished_training(tmp_path, phantoms):
    name = tmp_path / "Größe → 健康"  # no cp1252 terminal shows the last two words
    name.symlink_to(phantoms)
    terminal = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8"}
    environment = os.environ | terminal | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, f"data.root={name}", "hydra.run.dir=健康"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr.decode("cp1252")
    assert "SYNTHETIC" in done.stdout.decode("cp1252")
    assert (tmp_path / "健康" / "bundle" / "bundle.json").is_file()
