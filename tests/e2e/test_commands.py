"""The commands as a user meets them: what they print, where they write, and how they fail."""

import errno
import json
import os
import re
import runpy
import subprocess
import sys
from unittest.mock import Mock

import pandas as pd
import pytest
import torch

from chestct.cli import main
from chestct.config.compose import CONF
from tests.conftest import SMALL, command

ROOT = CONF.parent


@pytest.fixture
def call(tmp_path, monkeypatch, phantoms, cache, capfd):
    """call("train.py", *arguments) -> (exit status, standard output, standard error), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(program, *arguments, small=True):
        settings = [*SMALL, f"data.root={phantoms}", f"cache_dir={cache}"] if small else []
        # MLflow keeps a store for each URI in a process; a relative one would be the first test's.
        settings += [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"] if small else []
        given = {argument.split("=")[0] for argument in arguments}
        settings = [setting for setting in settings if setting.split("=")[0] not in given]
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


@pytest.mark.slow
def test_train_then_evaluate_tell_the_same_numbers_and_the_mlflow_run_holds_them(call, tmp_path):
    status, printed, err = call("train.py", "trainer.max_epochs=2", "tracking=mlflow")
    assert status == 0, err
    assert printed.startswith("SYNTHETIC")
    assert "AUROC" in printed
    (run,) = (tmp_path / "runs").iterdir()
    trained = json.loads((run / "evaluation" / "metrics.json").read_text())
    for name in ("roc.svg", "scores.svg", "reliability.svg", "curves.svg", "predictions.parquet"):
        assert (run / "evaluation" / name).stat().st_size > 0
    assert pd.read_csv(run / "history.csv")["epoch"].tolist() == [0, 1]
    assert (run / "bundle" / "bundle.json").is_file()
    again = ("ckpt=last", "hydra.run.dir=evaluated", "trainer.progress=false")
    status, repeated, err = call("evaluate.py", *again, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", small=False)
    assert status == 0, err
    evaluated = json.loads((tmp_path / "evaluated" / "metrics.json").read_text())
    for split in ("valid", "test"):
        assert evaluated[split] == pytest.approx(trained[split], abs=1e-6)
    assert list(trained["valid"]) == ["auroc", "log_loss"]
    assert repeated.splitlines()[:10] == printed.splitlines()[:10]

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (kept,) = client.search_runs([client.get_experiment_by_name("chestct").experiment_id])
    folders = {artifact.path for artifact in client.list_artifacts(kept.info.run_id)}
    assert folders == {"audit", "bundle", "checkpoints", "config", "evaluation"}
    assert (kept.data.tags["data.synthetic"], kept.data.tags["data.leakage"]) == ("True", "none")
    assert {"test/auroc", "test/auroc_low", "valid/loss", "train/loss"} <= set(kept.data.metrics)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train.py optim.lrr=1", "Did you mean optim.lr"),
        ("train.py data.root=gone", "data=phantom"),
        ("train.py ckpt=gone.ckpt", "ckpt=last"),
        ("train.py ckpt=", "ckpt= is empty"),
        ("train.py model.weights=gone.safetensors", "no such file"),
        ("train.py experiment=nope", "conf/experiment/"),
        ("train.py model.freeze=yes", "give bool | int"),
        ("train.py optim.lr=abc", "give float (learning rate of the head)"),
        ("train.py --lr=1e-3", "optim.lr=1e-3"),
        ("train.py data.root=gone (1)/a,b=c", "gone (1)/a,b=c"),
        ("train.py data.labels={a (b): cancer}", "data.labels_file="),
        ("train.py runs_dir=file/below", "runs_dir=FOLDER"),
        ("train.py cache_dir=file/below", "cache_dir=FOLDER"),
        ("evaluate.py", "Nothing to evaluate: give a checkpoint with ckpt="),
        ("evaluate.py evaluation.protocol=[loso]", "Nothing to evaluate: give a checkpoint with ckpt="),
        ("evaluate.py ckpt=last", "ckpt="),
    ],
)
def test_a_mistake_is_one_message_without_a_traceback(call, tmp_path, command, says):
    (tmp_path / "file").write_text("in the way")
    program, *setting = command.split(" ", 1)
    status, out, err = call(program, *setting, small=program == "train.py")
    assert status == 2
    assert says in err
    assert "Traceback" not in out + err
    if "cache_dir" not in command:  # which is met when the run has begun
        assert err.startswith("error: ")
        assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("elsewhere", ["hydra.run.dir=other", "-m"])
def test_a_training_goes_on_in_its_own_folder_alone(call, tmp_path, elsewhere):
    (last := tmp_path / "run" / "checkpoints" / "last.ckpt").parent.mkdir(parents=True)
    last.touch()
    status, _, err = call("train.py", "ckpt=run", elsewhere)
    assert status == 2
    assert f"in its own folder: give ckpt={last} on the command line, without hydra.run.dir and -m" in err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert "damaged" in call("train.py", "ckpt=run", "hydra.run.dir=run")[2]  # which is that folder


@pytest.mark.parametrize(
    "command",
    [
        *("train data.root=gone", "train data.sources={a:{root:gone}}", "train data.root=gone seeds=2"),
        *("train -m data.root=gone optim.lr=1,2", "train ckpt=gone", "train data.labels_file=gone"),
        *("evaluate ckpt=gone", "evaluate bundle=gone", "evaluate bundle=packaged data.root=gone"),
        *("evaluate compare=[gone,gone]", "export ckpt=gone bundle=new", "export bundle=gone format=onnx"),
        *("serve bundle=gone", "audit data.root=gone", "ingest data.root=gone", "predict gone", "embed gone"),
        *("predict a.png --bundle gone", "embed a.png --bundle gone", "data fetch chest_ct gone"),
        f"evaluate ckpt={80 * 'gone'}",  # longer than names may be, and an error of the system itself
        *("push gone user/name", "space new --bundle gone", "drift report --db gone", "drift report --bundle gone"),
    ],
)
def test_a_misspelt_path_is_named_and_leaves_no_run(call, tmp_path, monkeypatch, command):
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")  # a relative one is the first test's
    status, out, err = call("chestct", *command.split(), small=False)
    assert status == 2
    assert "gone" in err
    assert "Traceback" not in out + err
    left = {path.name for path in tmp_path.rglob("*")} - {"a.png"}
    assert left <= {"runs", ".cache"}  # with nothing in them


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


def test_an_audit_is_written_to_a_folder_that_is_called_as_its_data_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = Mock()
    monkeypatch.setattr("chestct.reporting.audit_report.validate", written)
    (tmp_path / "clinic").mkdir()
    monkeypatch.setattr(sys, "argv", ["chestct", "audit", "data.root=clinic"])
    main()
    assert written.call_args.args[1] == tmp_path / "runs" / "audit-clinic"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["audit-clinic"]


PROCESSOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."


@pytest.mark.parametrize(
    ("full", "arguments", "error"),
    [
        ("chestct.training.train", ("train",), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")),
        ("chestct.evaluation.external.evaluate_bundle", ("evaluate", "bundle=packaged"), RuntimeError(PROCESSOR)),
        ("chestct.models.bundle.load", ("serve", "bundle=packaged"), RuntimeError(PROCESSOR)),
        ("chestct.serving.batch.find_files", ("embed", "a.png"), OSError(errno.ENOMEM, "Cannot allocate memory")),
    ],
)
def test_too_little_memory_is_one_clear_error_that_holds_on_to_nothing(
    full, arguments, error, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(full, Mock(side_effect=error))
    monkeypatch.setattr(sys, "argv", ["chestct", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert re.search(r"error: Out of memory: lower data\.batch_size.*trainer\.accelerator=cpu", capsys.readouterr().err)
    assert arguments[0] == "embed" or stop.value.__context__.__context__ is None  # the next job needs the memory


@pytest.mark.slow
def test_what_torch_and_onnx_log_of_an_export_is_not_printed(tmp_path):
    pytest.importorskip("onnxscript")
    code = """
import torch
from chestct.program import program
export = torch.nn.Linear(2, 2).eval(), (torch.zeros(1, 2),), "graph.onnx"
program("evaluate")(lambda cfg, out: print(torch.onnx.export(*export, dynamo=True, verbose=False) is not None))()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_the_path_of_an_option_may_begin_in_the_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command("drift", "report", "--db=~/gone") == 2
    assert f"{tmp_path}/gone" in capsys.readouterr().err


def test_without_a_command_it_says_which_there_are(call):
    status, out, _ = call("chestct", small=False)
    assert status == 0
    assert "audit" in out
    status, _, err = call("chestct", "injest", small=False)
    assert status == 2
    assert "ingest" in err


def test_a_service_that_cannot_start_says_why_in_one_sentence(call, monkeypatch):
    monkeypatch.setenv("CHESTCT_USERNAME", "a")
    status, _, err = call("serve.py", "bundle=gone", small=False)
    assert status == 2
    assert "CHESTCT_PASSWORD" in err
    assert "Traceback" not in err


HELP = {"train": "learning rate of the head", "evaluate": "experiment=", "serve": "max_upload_bytes"}
HELP |= {"predict": "--viewer", "drift": "--days"}


@pytest.mark.parametrize("command", HELP)
def test_help_explains_every_setting_without_importing_anything_heavy(command):
    code = f"""
import atexit, runpy, sys
heavy = ("torch", "lightning", "mlflow", "pandas", "hydra")
atexit.register(lambda: print([name for name in heavy if name in sys.modules]))
sys.argv = ["chestct", "{command}", "--help"]
runpy.run_module("chestct", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert HELP[command] in done.stdout


def test_a_reader_that_stops_reading_ends_the_command_quietly():
    command = f"'{sys.executable}' train.py --help | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Trains")
    assert done.stderr == ""
