"""Runs that are stopped, by an interrupt, a signal or a kill: where they go on, and that they end as whole ones do."""

import io
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from chestct.errors import ConfigError, Interrupted, WeightsError
from chestct.models.checkpoint import REFITS, read_checkpoint, sealed
from chestct.models.weights import load_weights
from chestct.training import callbacks, train
from tests.conftest import until
from tests.e2e.test_commands import call as call
from tests.training.test_train import ROOT, losses


class StopInTheSecond(callbacks.EndWithParent):
    """Ends a run the way a signal does: in the second epoch, after a batch."""

    epoch = 1

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.dropout=0.3",),
        pytest.param(
            ("features.cache=false", "data.workers=1", "model.freeze=4", "optim.schedule=one_cycle", "data.size=32"),
            marks=pytest.mark.slow,
        ),
        pytest.param(("trainer.unfreeze_epoch=2", "trainer.unfreeze_blocks=1", "data.size=32"), marks=pytest.mark.slow),
        pytest.param(("trainer.patience=2", "optim.lr=1", "trainer.max_epochs=6"), marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_end(small, tmp_path, monkeypatch, overrides):
    overrides = ("trainer.max_epochs=4", "optim.lr=0.01", *overrides)
    whole = train(small(*overrides), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "EndWithParent", StopInTheSecond)
        with pytest.raises(Interrupted) as stopped:
            train(small(*overrides), cut := tmp_path / "my runs (1), [2]")
    *_, resume = shlex.split(str(stopped.value))  # as it is pasted
    assert resume == f"ckpt={cut}/checkpoints/last.ckpt"
    resumed = train(small(*overrides, resume), cut)
    assert resumed.metrics == pytest.approx(whole.metrics, abs=1e-6)
    assert losses(cut).to_numpy() == pytest.approx(losses(tmp_path / "whole").to_numpy(), abs=1e-6)


def test_a_training_that_is_stopped_at_once_goes_on_with_no_earlier_one_of_its_folder(small, tmp_path, monkeypatch):
    last = train(small("trainer.max_epochs=1"), tmp_path).last
    monkeypatch.setattr(StopInTheSecond, "epoch", 0)
    monkeypatch.setattr(callbacks, "EndWithParent", StopInTheSecond)
    with pytest.raises(Interrupted, match=r"^Stopped\. No epoch was finished\.$"):
        train(small("trainer.max_epochs=1", "optim.lr=0.1"), tmp_path)
    assert read_checkpoint(last)["epoch"] == 0  # and takes nothing of it away


def test_a_head_of_an_evaluation_that_is_stopped_is_no_run_to_go_on_with(small, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "EndWithParent", StopInTheSecond)
    with pytest.raises(Interrupted, match=r"^Stopped in epoch \d\. The same command starts the evaluation anew\.$"):
        train(small("trainer.max_epochs=2"), tmp_path / REFITS / "fold-0")


@pytest.mark.slow
def test_a_run_killed_in_the_middle_resumes_to_the_same_end(call, small, phantoms, cache, tmp_path):
    settings = ("data.size=64", "data.batch_size=8", "tracking=off", "trainer.progress=false", "trainer.patience=0")
    settings += ("trainer.max_epochs=60", "model.dropout=0.3", f"data.root={phantoms}", f"cache_dir={cache}")
    whole = train(small(*settings), tmp_path / "whole")
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), *settings, f"hydra.run.dir={run}", "evaluation.report=false"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, "experiment=head"], cwd=tmp_path, **quiet)
    until((run / "checkpoints" / "last.ckpt").exists, 900, process)
    process.kill()
    process.wait()
    assert len(losses(run)) < 60
    status, _, err = call("train.py", *command[2:], f"ckpt={run}", small=False)
    assert status == 0, err
    assert losses(run).to_numpy() == pytest.approx(losses(whole.folder).to_numpy(), abs=1e-6)
    first, second = (torch.load(f / "checkpoints" / "best.ckpt", weights_only=True) for f in (run, whole.folder))
    assert first["epoch"] == second["epoch"]


@pytest.mark.slow
def test_a_signal_ends_a_real_run_in_order_and_it_resumes_in_its_folder(call, phantoms, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = ["data.size=64", "data.views=1", "trainer.progress=false", "trainer.patience=0", f"data.root={phantoms}"]
    settings += ["evaluation.resamples=100"]
    settings += [f"runs_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache", f"tracking.uri={uri}"]
    command = [sys.executable, str(ROOT / "train.py"), *settings, "trainer.max_epochs=4000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: [*(tmp_path / "runs").glob("*/checkpoints/last.ckpt")], 900, process)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "ckpt=" in errors
    (run,) = (tmp_path / "runs").iterdir()
    done = len(pd.read_csv(run / "history.csv"))
    # Whichever of its checkpoints is named, no epoch is thrown away.
    best = f"ckpt={run}/checkpoints/best.ckpt"
    status, _, errors = call("train.py", best, *settings, f"trainer.max_epochs={done + 2}", small=False)
    assert status == 0, errors
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [run.name]
    assert len(pd.read_csv(run / "history.csv")) == done + 2
    from tests.tracking.conftest import runs

    (recorded,) = runs(uri)
    assert recorded.info.status == "FINISHED"
    assert (run / "checkpoints" / "mlflow_run_id.txt").read_text().strip() == recorded.info.run_id


def epoch_in(path):
    return torch.load(path, weights_only=True)["epoch"]


def test_the_last_checkpoint_is_of_the_last_epoch_and_a_run_that_moved_goes_on_after_it(small, tmp_path):
    diverging = ("optim.lr=1000", "trainer.patience=0")  # the first epochs are the best
    result = train(small(*diverging, "trainer.max_epochs=4"), tmp_path / "run")
    before = losses(tmp_path / "run")["valid/loss"]
    assert before.idxmin() == epoch_in(result.best) < 3
    assert epoch_in(result.last) == 3
    (tmp_path / "run").rename(tmp_path / "moved")
    last = tmp_path / "moved" / "checkpoints" / "last.ckpt"
    longer = train(small(*diverging, "trainer.max_epochs=6", f"ckpt={last}"), tmp_path / "moved")
    assert losses(tmp_path / "moved")["valid/loss"].iloc[:4].equals(before)  # nothing is trained again
    assert epoch_in(longer.last) == 5
    assert losses(tmp_path / "moved")["valid/loss"].idxmin() == epoch_in(longer.best)
    assert longer.best.parent == last.parent


@pytest.mark.slow
def test_a_run_whose_callback_brings_a_schedule_goes_on(small, tmp_path):
    name = "lightning.pytorch.callbacks.StochasticWeightAveraging"
    averaged = (f"callbacks.swa._target_={name}", "callbacks.swa.swa_lrs=0.01", "callbacks.swa.swa_epoch_start=1")
    last = train(small(*averaged, "trainer.max_epochs=3"), tmp_path).last
    assert epoch_in(train(small(*averaged, "trainer.max_epochs=5", f"ckpt={last}"), tmp_path).last) == 4
    assert losses(tmp_path).notna().all(axis=None)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_settings_that_a_checkpoint_decides_are_refused_and_others_hold(small, tmp_path, capsys, schedule):
    settings = (f"optim.schedule={schedule}", "trainer.max_epochs=2")
    given = (*settings, f"ckpt={train(small(*settings), tmp_path).last}")
    refused = {
        "optim.lr=0.5": r"optim\.lr=0\.5 \(was 0\.01\)",
        "trainer.monitor=valid/auroc": "monitor",
        "trainer.unfreeze_epoch=1": r"unfreeze_epoch=1 \(was 0\)",
        # Half as many steps are left as the rate counts on, and it would be 0 or rise.
        "data.batch_size=4": r"batch_size=4 \(was 8\)",
        "trainer.args.accumulate_grad_batches=2": r"accumulate_grad_batches=2 \(was 1\)",
        "trainer.max_epochs=1": "",
    }
    for setting, says in refused.items():
        with pytest.raises(ConfigError, match=f"{says}.*anew without"):
            train(small(*given, setting), tmp_path)
    capsys.readouterr()
    loss = ("optim.label_smoothing=0.1", "optim.class_weights=false", "trainer.unfreeze_blocks=1")
    train(small(*given, "trainer.max_epochs=3", *loss), tmp_path)
    assert "the learning rate is that of a run of 3 epochs" in capsys.readouterr().out
    assert len(losses(tmp_path)) == 3


@pytest.mark.slow
def test_two_stages_go_on_as_two_with_the_same_blocks_and_weights(small, tmp_path):
    weights = {f"features.{key}": tensor / 2 for key, tensor in load_weights("oxford").tensors.items()}
    save_file(weights, tmp_path / "first.safetensors")
    staged = (f"model.weights={tmp_path}/first.safetensors", "trainer.max_epochs=2", "trainer.unfreeze_epoch=1")
    staged += ("data.size=32", "data.views=0")
    given = (*staged, f"ckpt={train(small(*staged), tmp_path).last}", "trainer.max_epochs=4")
    # With epoch 3, features of the weights would stand for convolutions that have trained.
    for setting in ("trainer.unfreeze_epoch=0", "trainer.unfreeze_epoch=3", "trainer.unfreeze_blocks=1"):
        with pytest.raises(ConfigError, match=rf"{setting} \(was \d\)"):
            train(small(*given, setting), tmp_path)
    with pytest.raises(WeightsError, match=r"model\.weights=oxford are not the convolutions.*anew without"):
        train(small(*given, "model.weights=oxford"), tmp_path)
    (tmp_path / "first.safetensors").rename(tmp_path / "moved.safetensors")
    train(small(*given, f"model.weights={tmp_path}/moved.safetensors", "trainer.unfreeze_epoch=2"), tmp_path)
    assert len(losses(tmp_path)) == 4


@pytest.mark.slow
def test_a_run_that_stopped_early_is_measured_again_and_goes_on_with_more_patience(small, tmp_path):
    diverging = ("optim.lr=10", "trainer.patience=1", "trainer.max_epochs=9")
    stopped = train(small(*diverging), tmp_path)
    epochs = len(losses(tmp_path))
    assert epochs < 9
    again = train(small(*diverging, f"ckpt={stopped.last}"), tmp_path)
    assert (len(losses(tmp_path)), again.metrics) == (epochs, stopped.metrics)
    train(small(*diverging, f"ckpt={stopped.last}", "trainer.patience=9"), tmp_path)
    assert len(losses(tmp_path)) == 9


@pytest.mark.slow
def test_a_finished_run_that_came_without_its_best_epoch_is_measured_as_it_came(small, tmp_path):
    first = train(small("trainer.max_epochs=2"), tmp_path / "first")
    foreign = first.last.rename(tmp_path / "foreign.ckpt")
    finished = train(small("trainer.max_epochs=2", f"ckpt={foreign}"), tmp_path / "second")
    assert finished.best == foreign  # nothing else is left of it


def rewritten(path, callbacks):
    """The checkpoint in a file with other states of the ModelCheckpoints in it, sealed again as anybody can."""
    content = torch.load(path, weights_only=True)
    for state in (state for key, state in content["callbacks"].items() if "ModelCheckpoint" in key or "Keeper" in key):
        state |= callbacks
        state.pop("dirpath", None)  # Lightning then believes all of it
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(sealed(buffer.getvalue()))


def test_a_foreign_checkpoint_removes_nothing_of_this_machine(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = ("callbacks.mine._target_=lightning.pytorch.callbacks.ModelCheckpoint", "callbacks.mine.dirpath=out/own")
    foreign = train(small("trainer.max_epochs=1", *mine), Path("out")).last.rename("foreign.ckpt")
    victim = tmp_path / "victim" / "other.ckpt"
    victim.parent.mkdir()
    victim.touch()
    folder, around = victim.parent, f"{tmp_path}/out/own/../../victim/other.ckpt"
    for number, path in enumerate((str(folder), f"local://{folder}", f"local://{victim}", around)):
        states = dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), path)
        rewritten(foreign, states | {"best_k_models": {path: torch.tensor(9.0)}})
        train(small(*mine, "trainer.max_epochs=3", f"ckpt={foreign}"), Path(f"new-{number}"))
        assert victim.is_file(), path
