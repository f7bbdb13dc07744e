"""Several processes, one training: the same result as one process, one run, one message, one end."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch

from chestct import ranks
from chestct.config.checks import check
from chestct.config.compose import CONF, merge_settings
from chestct.data.datamodule import Batches, SliceModule
from chestct.errors import ChestCTError, ConfigError, Interrupted
from chestct.ranks import Place
from chestct.training import callbacks, train
from tests.training.test_train import losses

TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
UNEVEN = ("data.batch_size=7", "optim.lr=0.01", "trainer.max_epochs=4", "trainer.patience=0")
"""39 slices in batches of 7: shares of 4 and 3, and a last batch of 4."""


@pytest.fixture
def as_rank(monkeypatch):
    """as_rank(i, n): this process takes itself for one of n, without being connected to any."""
    return lambda rank, size: monkeypatch.setattr(ranks, "_place", Place(rank=rank, size=size))


@pytest.mark.parametrize("features", [False, True])
def test_processes_share_out_every_batch_and_nothing_twice(small, as_rank, features):
    data = SliceModule(small("data.batch_size=7"))
    data.prepare_data()
    data.setup()
    n = len(data.dataset("train"))
    if features:
        data.features["train"] = [torch.rand(n, 5)]
    for key in Batches(n, 7, seed=3):
        seen = []
        for rank in range(4):  # the last batch has fewer slices than there are processes
            as_rank(rank, 4)
            batch = data.dataset("train")[key]
            assert len(batch["x"]) == len(batch["y"]) == len(batch["i"])
            assert torch.equal(batch["batch_y"], data.dataset("train").y[key[1]])
            seen += batch["i"].tolist()
        assert sorted(seen) == sorted(key[1])


def test_an_epoch_holds_every_slice_once_in_an_order_of_its_own():
    batches = Batches(10, 4, seed=1)
    first = [i for _, batch in batches for i in batch]
    batches.set_epoch(1)
    second = [i for _, batch in batches for i in batch]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert len(batches) == 3
    assert [i for _, batch in Batches(10, 4) for i in batch] == list(range(10))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("trainer.devices=2",), "trainer=ddp"),
        (("trainer.num_nodes=2",), "trainer=ddp"),
        (("trainer.devices=two",), "how many"),
        (("trainer.devices=0",), "how many"),
        (("trainer=ddp", "trainer.accelerator=mps", "trainer.devices=2"), "Apple"),
    ],
)
def test_devices_that_cannot_be_meant_are_refused(small, settings, says):
    with pytest.raises(ConfigError, match=says):
        check(small(*settings))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("trainer=ddp", "trainer.accelerator=cpu"), r"trainer\.devices=2"),
        (("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.num_nodes=2"), "torchrun or srun"),
    ],
)
def test_processes_that_cannot_be_started_are_said(small, tmp_path, settings, says):
    with pytest.raises(ConfigError, match=says):
        train(small(*settings), tmp_path)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


def test_the_place_is_that_which_the_launcher_gave():
    assert ranks.launched(TORCHRUN | {"GROUP_WORLD_SIZE": "2"}) == Place("torchrun", 3, 4, 1, 2, 2)
    assert ranks.launched(SRUN) == Place("srun", 3, 4, 1, 2, 2)
    assert ranks.launched({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == Place()  # a batch script is one process


@pytest.mark.parametrize("settings", [("trainer=default",), TWO])
def test_launchers_that_contradict_the_settings_are_said(small, tmp_path, monkeypatch, settings):
    for name, value in (TORCHRUN | {"GROUP_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"trainer=ddp|trainer\.num_nodes=2"):
        train(small(*settings), tmp_path)


def test_a_resumed_run_may_move_to_other_processes_and_stays_as_long(small):
    import dataclasses

    base = dataclasses.asdict(small("trainer.max_epochs=7", *TWO))
    assert merge_settings(small(), ["trainer=default"], base).trainer.strategy == "single"
    assert merge_settings(small(), ["trainer=default"], base).trainer.max_epochs == 7
    assert merge_settings(small(), ["optim.lr=1"], base).trainer.devices == "2"


@pytest.mark.slow
def test_two_processes_train_and_measure_as_one(small, tmp_path):
    one = train(small(*UNEVEN), tmp_path / "one")
    two = train(small(*UNEVEN, *TWO, f"cache_dir={tmp_path}/cache"), tmp_path / "two")
    assert two.metrics == pytest.approx(one.metrics, abs=1e-6)
    assert losses(two.folder).to_numpy() == pytest.approx(losses(one.folder).to_numpy(), abs=1e-6)
    assert two.predictions["path"].tolist() == one.predictions["path"].tolist()
    assert (two.predictions["logit_cancer"] - one.predictions["logit_cancer"]).abs().max() < 1e-5
    assert "LOCAL_RANK" not in os.environ
    # each computed a share of the features, and none was computed twice
    folders = list((tmp_path / "cache" / "features").iterdir())
    assert folders
    for folder in folders:
        from safetensors import safe_open

        from chestct.models.features import _load

        rows = [safe_open(path, "pt").get_slice("features").get_shape()[0] for path in folder.glob("*.safetensors")]
        assert len(rows) >= 2
        assert sum(rows) == len(_load(folder))
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_convolutions_that_join_in_later_learn_in_all_processes(small, tmp_path):
    staged = (*UNEVEN, "trainer.unfreeze_epoch=2", "trainer.unfreeze_blocks=1")
    one = train(small(*staged), tmp_path / "one")
    two = train(small(*staged, *TWO), tmp_path / "two")
    assert losses(two.folder).to_numpy() == pytest.approx(losses(one.folder).to_numpy(), abs=1e-5)


class TellTheOther(callbacks.StopWhenTold):
    """Sends SIGTERM, in the second epoch, to the process that this one started."""

    def on_train_batch_end(self, trainer, *rest):
        if trainer.current_epoch == 1:
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGTERM)
        super().on_train_batch_end(trainer, *rest)


@pytest.mark.slow
def test_all_processes_stop_together_and_any_number_of_them_goes_on(small, tmp_path, monkeypatch):
    whole = train(small(*UNEVEN), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "StopWhenTold", TellTheOther)
        with pytest.raises(Interrupted, match=r"ckpt=.*last\.ckpt"):
            train(small(*UNEVEN, *TWO), tmp_path / "cut")
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert train(small(*UNEVEN, f"ckpt={last}"), tmp_path / "one").metrics == pytest.approx(whole.metrics, abs=1e-6)
    two = train(small(*UNEVEN, *TWO, f"ckpt={last}"), tmp_path / "cut")
    assert two.metrics == pytest.approx(whole.metrics, abs=1e-6)
    assert losses(two.folder).to_numpy() == pytest.approx(losses(whole.folder).to_numpy(), abs=1e-6)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_training_with_its_reason(small, tmp_path, monkeypatch):
    class Kill(callbacks.StopWhenTold):
        def on_train_batch_end(self, trainer, *rest):
            for process in multiprocessing.active_children():
                process.kill()

    monkeypatch.setattr(callbacks, "StopWhenTold", Kill)
    with pytest.raises(ChestCTError, match="Process 1 of 2 was ended by signal 9"):
        train(small(*UNEVEN, *TWO), tmp_path)
    assert not torch.distributed.is_initialized()


def torchrun(*settings, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    return subprocess.run(
        [*command, str(CONF.parent / "train.py"), *settings], cwd=cwd, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_torchrun_leaves_one_folder_and_one_run(phantoms, cache, empty_store, tmp_path):
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    settings = ("data.size=64", "trainer.max_epochs=2", "trainer.progress=false", "trainer=ddp")
    settings += (f"data.root={phantoms}", f"cache_dir={cache}", "trainer.accelerator=cpu")
    done = torchrun(*settings, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best checkpoint") == 1
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(pd.read_csv(folder / "history.csv")) == 2
    assert (folder / "bundle" / "bundle.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", "mlflow.db", "mlruns"}
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("chestct").experiment_id])
    assert run.info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["torchrun", "alone"])
def test_a_mistake_is_told_once_and_ends_all(tmp_path, launch):
    settings = ("data=chest_ct", "data.root=nowhere", "tracking=off", "trainer=ddp", "trainer.accelerator=cpu")
    if launch == "torchrun":
        done = torchrun(*settings, cwd=tmp_path)
        assert done.returncode != 0
    else:
        command = [sys.executable, str(CONF.parent / "train.py"), *settings, "trainer.devices=2"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "nowhere" in done.stderr
