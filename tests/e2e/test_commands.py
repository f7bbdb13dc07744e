"""The commands as a user meets them: what they print, where they write, and how they fail."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from chestct.config.compose import CONF
from tests.conftest import SMALL

ROOT = CONF.parent


@pytest.fixture
def call(tmp_path, monkeypatch, phantoms, cache, capfd):
    """call("train.py", *arguments) -> (exit status, standard output, standard error), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(program, *arguments, small=True):
        settings = [*SMALL, f"data.root={phantoms}", f"cache_dir={cache}"] if small else []
        # MLflow keeps a store for each URI in a process; a relative one would be the first test's.
        settings += [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"] if small else []
        given = {a.split("=")[0] for a in arguments}
        settings = [s for s in settings if s.split("=")[0] not in given]
        monkeypatch.setattr(sys, "argv", [program, *arguments, *settings])
        try:
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capfd.readouterr()
        return status, out, err

    return run


def only_run(tmp_path) -> Path:
    (run,) = (tmp_path / "runs").iterdir()
    return run


@pytest.mark.slow
def test_train_then_evaluate_tell_the_same_numbers_and_the_mlflow_run_holds_them(call, tmp_path):
    status, printed, err = call("train.py", "trainer.max_epochs=2", "tracking=mlflow")
    assert status == 0, err
    assert printed.startswith("SYNTHETIC")
    assert "AUROC" in printed
    run = only_run(tmp_path)
    trained = json.loads((run / "evaluation" / "metrics.json").read_text())
    for name in ("roc.svg", "scores.svg", "reliability.svg", "curves.svg", "predictions.parquet"):
        assert (run / "evaluation" / name).stat().st_size > 0
    assert pd.read_csv(run / "history.csv")["epoch"].tolist() == [0, 1]
    assert (run / "bundle" / "bundle.json").is_file()
    again = (
        "ckpt=last",
        "hydra.run.dir=evaluated",
        "trainer.progress=false",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
    )
    status, repeated, err = call("evaluate.py", *again, small=False)
    assert status == 0, err
    evaluated = json.loads((tmp_path / "evaluated" / "metrics.json").read_text())
    for split in ("valid", "test"):
        assert evaluated[split] == pytest.approx(trained[split], abs=1e-6)
    assert list(trained["valid"]) == ["auroc", "log_loss"]
    assert repeated.splitlines()[:10] == printed.splitlines()[:10]

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (kept,) = client.search_runs([client.get_experiment_by_name("chestct").experiment_id])
    folders = {a.path for a in client.list_artifacts(kept.info.run_id)}
    assert folders == {"audit", "bundle", "checkpoints", "config", "evaluation"}
    audit = {Path(a.path).name for a in client.list_artifacts(kept.info.run_id, "audit")}
    assert audit == {"report.html", "report.json"}
    assert kept.data.params["model.freeze"] == "True"
    assert (kept.data.tags["data.synthetic"], kept.data.tags["data.leakage"]) == ("True", "none")
    assert len(client.get_metric_history(kept.info.run_id, "valid/auroc")) >= 2
    assert {"test/auroc", "test/auroc_low", "valid/loss", "train/loss"} <= set(kept.data.metrics)
    assert len(kept.data.metrics) <= 13


@pytest.mark.slow
def test_a_sweep_runs_every_combination_and_fails_where_one_did(call, tmp_path):
    status, _, err = call("train.py", "-m", "optim.lr=-1,1e-3", "model.hidden=[],[8]", "trainer.max_epochs=1")
    assert status == 2
    assert "out of range" in err
    assert len(list((tmp_path / "runs").glob("*/*/evaluation/metrics.json"))) == 2


BAD = {
    "optim.lrr=1": "Did you mean optim.lr",
    "data.root=gone": "data=phantom",
    "ckpt=gone.ckpt": "ckpt=last",
    "model.weights=gone.safetensors": "no such file",
    "experiment=nope": "conf/experiment/",
    "model.freeze=yes": "give bool | int",
    "optim.lr=abc": "give float (learning rate of the head)",
    "optim.learning_rate=1": "Did you mean optim.lr?",
    "data.path=x": "Did you mean data.root?",
    "--lr=1e-3": "optim.lr=1e-3",
    "data.root=gone (1)/a,b=c": "gone (1)/a,b=c",
    "data.labels={a (b): cancer}": "data.labels_file=",
    "optim=sgd,adamw": "add -m",
}


@pytest.mark.parametrize("override", list(BAD))
def test_a_mistake_is_one_message_without_a_traceback(call, tmp_path, override):
    status, out, err = call("train.py", override)
    assert status == 2
    assert err.startswith("error: ")
    assert BAD[override] in err
    assert "Traceback" not in out + err
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.slow
def test_an_unreadable_image_is_named_with_its_reason(call, tmp_path, phantoms):
    shutil.copytree(phantoms, tmp_path / "set")
    broken = next((tmp_path / "set" / "train" / "normal").iterdir())
    broken.write_bytes(broken.read_bytes()[:200])
    status, _, err = call("train.py", f"data.root={tmp_path}/set")
    assert status == 2
    assert broken.name in err
    assert "data.max_unreadable" in err
    assert call("train.py", f"data.root={tmp_path}/set", "data.max_unreadable=1", "trainer.max_epochs=1")[0] == 0


@pytest.mark.parametrize("setting", ["runs_dir", "cache_dir"])
def test_a_place_that_cannot_be_written_to_is_named(call, tmp_path, setting):
    (tmp_path / "file").write_text("in the way")
    status, out, err = call("train.py", f"{setting}={tmp_path}/file/below")
    assert status == 2
    assert f"{tmp_path}/file" in err
    assert f"{setting}=FOLDER" in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("arguments", [(), ("ckpt=last",), ("ckpt=gone.ckpt",)])
def test_evaluation_without_a_checkpoint_is_refused(call, arguments):
    status, out, err = call("evaluate.py", *arguments, small=False)
    assert status == 2
    assert "ckpt=" in err
    assert "Traceback" not in out + err


@pytest.mark.slow
def test_a_leaky_split_has_to_be_asked_for_and_is_stamped_on_the_results(call, tmp_path, phantoms):
    shutil.copytree(phantoms, tmp_path / "set")
    source = next((tmp_path / "set" / "train" / "normal").iterdir())
    shutil.copy(source, tmp_path / "set" / "test" / "normal" / "copy.png")
    arguments = (f"data.root={tmp_path}/set", "data.split=official", "trainer.max_epochs=1")
    status, _, err = call("train.py", *arguments)
    assert status == 2
    assert "data.allow_leakage=true" in err
    status, out, _ = call("train.py", *arguments, "data.allow_leakage=true")
    assert status == 0
    assert "LEAKY SPLIT: " in out
    (found,) = (json.loads(p.read_text()) for p in tmp_path.glob("runs/*/evaluation/evaluation.json"))
    assert found["about"]["leaked"] >= 1


@pytest.mark.slow
def test_data_commands_ingest_and_audit(call, tmp_path, phantoms, cache):
    settings = ("data.size=64", f"data.root={phantoms}", f"cache_dir={cache}", "trainer.progress=false")
    status, out, _ = call("chestct", "ingest", *settings, small=False)
    assert status == 0
    assert out.startswith("60 slices, 0 of them copies")
    status, out, err = call("chestct", "audit", *settings, "data.audit.fail_on=[sample_size]", small=False)
    assert status == 2
    assert "sample_size" in err
    report = tmp_path / "runs" / "audit-phantom"
    assert (report / "report.html").stat().st_size > 10_000
    assert json.loads((report / "report.json").read_text())["name"] == "phantom"


def test_without_a_command_it_says_which_there_are(call):
    status, out, _ = call("chestct", small=False)
    assert status == 0
    assert "audit" in out
    status, _, err = call("chestct", "injest", small=False)
    assert status == 2
    assert "ingest" in err


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train", ("learning rate of the head", "experiment=")),
        ("evaluate", ("learning rate of the head", "experiment=")),
        ("predict", ("--every",)),
        ("drift", ("--days",)),
    ],
)
def test_help_explains_every_setting_without_importing_anything_heavy(command, expected):
    code = f"""
import atexit, runpy, sys
heavy = ("torch", "lightning", "mlflow", "pandas", "hydra")
atexit.register(lambda: print([name for name in heavy if name in sys.modules]))
sys.argv = ["chestct", "{command}", "--help"]
runpy.run_module("chestct", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(words in done.stdout for words in expected)


def test_a_reader_that_stops_reading_ends_the_command_quietly():
    command = f"'{sys.executable}' train.py --help | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Trains")
    assert done.stderr == ""
