"""Several processes, one training: no slice measured twice, one run, one message, one end."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from chestct.config.compose import CONF
from chestct.data.datamodule import Batches
from chestct.errors import ChestCTError, ConfigError, Interrupted
from chestct.experiment import train_and_report
from chestct.models.weights import load_weights
from chestct.training import callbacks, train
from chestct.training.train import environment
from tests.conftest import until
from tests.training.test_train import losses

TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
LONG = ("data.batch_size=8", "optim.lr=0.01", "trainer.max_epochs=4", "trainer.patience=0")


def positions(*args, **kwargs):
    return [i for _, batch in Batches(*args, **kwargs) for i in batch]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_processes_share_out_an_epoch_and_nothing_is_measured_twice(processes):
    measured = [positions(10, 8, rank=rank, processes=processes) for rank in range(processes)]
    assert sorted(i for share in measured for i in share) == list(range(10))
    trained = [Batches(10, 8, 1, rank, processes) for rank in range(processes)]
    first = [[i for _, batch in batches for i in batch] for batches in trained]
    # as many steps in each, of as many slices together as one process takes
    assert len({len(batches) for batches in trained}) == 1
    assert sum(len(next(iter(batches))[1]) for batches in trained) <= 8
    assert {i for share in first for i in share} == set(range(10))
    trained[0].set_epoch(1)
    assert first[0] != [i for _, batch in trained[0] for i in batch]


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


def test_torchrun_and_srun_are_known_and_a_batch_script_is_one_process(monkeypatch):
    assert not environment("ddp").creates_processes_externally
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "batch")
    assert not environment("ddp").creates_processes_externally
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert (environment("ddp").world_size(), environment("ddp").global_rank()) == (4, 3)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert (environment("ddp").world_size(), environment("ddp").global_rank()) == (4, 3)


def test_processes_that_were_started_without_ddp_are_refused(small, tmp_path, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="add trainer=ddp"):
        train(small(), tmp_path)


EQUAL = (*LONG, "optim.class_weights=false")
"""38 slices in batches of 2 x 4, and every slice counts alike: nothing is left that could differ."""


@pytest.mark.slow
def test_two_processes_train_what_one_would_and_measure_each_slice_once_by_the_best_checkpoint(small, tmp_path):
    """Next to a callback that keeps checkpoints, too, which are not taken for the best."""
    mine = ("callbacks.mine._target_=lightning.pytorch.callbacks.ModelCheckpoint", f"callbacks.mine.dirpath={tmp_path}")
    one, two = train(small(*EQUAL), tmp_path / "one"), train(small(*EQUAL, *mine, *TWO), tmp_path / "two")
    assert losses(two.folder).to_numpy() == pytest.approx(losses(one.folder).to_numpy(), abs=1e-5)
    assert two.metrics == pytest.approx(one.metrics, abs=1e-5)
    assert (two.predictions["logit_cancer"] - one.predictions["logit_cancer"]).abs().max() < 1e-4
    assert two.best == tmp_path / "two" / "checkpoints" / "best.ckpt"
    assert list(tmp_path.glob("epoch=3*.ckpt"))


class Together(Callback):
    """At its end, a training has changed the last convolution, and alike in all processes."""

    def on_train_end(self, trainer, pl_module):
        weight = pl_module.net.features[28].weight.detach()
        assert not torch.equal(weight, load_weights("oxford").tensors["28.weight"].float())
        mean = trainer.strategy.reduce(weight.clone(), reduce_op="mean")
        assert torch.equal(mean, weight), "the weights of the processes differ"


@pytest.mark.slow
def test_two_processes_end_early_where_one_does(small, tmp_path):
    settings = (*EQUAL, "optim.lr=0.5", "trainer.max_epochs=12", "trainer.patience=1")
    one, two = train(small(*settings), tmp_path / "one"), train(small(*settings, *TWO), tmp_path / "two")
    assert len(losses(two.folder)) == len(losses(one.folder)) < 12
    assert losses(two.folder).to_numpy() == pytest.approx(losses(one.folder).to_numpy(), rel=1e-3)


@pytest.mark.slow
def test_convolutions_that_join_in_later_learn_in_all_processes_and_any_number_goes_on(small, tmp_path):
    # a constant rate: the first two epochs of a run of four are those of a run of two
    staged = (*EQUAL, "trainer.unfreeze_epoch=1", "trainer.unfreeze_blocks=1")
    staged += ("optim.schedule=constant", "optim.warmup=0", f"callbacks.together._target_={__name__}.Together")
    one = train(small(*staged), tmp_path / "one")
    train(small(*staged, *TWO, "trainer.max_epochs=2"), tmp_path / "two")
    two = train(small(*staged, *TWO, f"ckpt={tmp_path}/two/checkpoints/last.ckpt"), tmp_path / "two")
    assert len(losses(two.folder)) == 4
    # Adam's steps enlarge what kernels round: 2e-5 on a processor without AVX-512.
    assert losses(two.folder).to_numpy() == pytest.approx(losses(one.folder).to_numpy(), abs=1e-4)
    assert two.metrics == pytest.approx(one.metrics, abs=1e-4)
    alone = train(small(*staged, f"ckpt={two.last}", "trainer.max_epochs=5"), tmp_path / "two")
    assert len(losses(alone.folder)) == 5


def test_all_processes_take_the_same_checkpoint(small, tmp_path, monkeypatch):
    """Named is the best one: with the last one next to it, that is taken in the folder of a run, and nowhere else."""
    last = train(small("trainer.max_epochs=1"), tmp_path / "run").last
    shared = shutil.copytree(last.parent, tmp_path / "shared")
    taken = []

    def fit(cfg, *rest):
        taken.append(Path(cfg.ckpt))
        raise Interrupted

    monkeypatch.setattr("chestct.training.train", fit)
    monkeypatch.setattr("chestct.experiment.from_checkpoint", lambda cfg, best: cfg)
    for folder, out in ((shared, tmp_path / "new"), (last.parent, tmp_path / "run")):
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            with pytest.raises(Interrupted):
                train_and_report(small(f"ckpt={folder}/best.ckpt"), tmp_path / "scratch" if rank == "1" else out)
    assert taken == [shared / "best.ckpt"] * 2 + [last] * 2


class Dies(callbacks.EndWithParent):
    """One of two processes ends without a word in the second epoch."""

    def on_train_batch_end(self, trainer, *rest):
        if trainer.current_epoch == 1 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_training_with_its_reason(small, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "EndWithParent", Dies)
    with pytest.raises(ChestCTError, match=r"Of 2 processes, .*and the training with it.*ckpt=.*last\.ckpt"):
        train(small(*LONG, *TWO), tmp_path)
    assert not torch.distributed.is_initialized()
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0


def arguments(phantoms, cache, *settings):
    given = ("experiment=head", "data.size=64", "trainer.progress=false", "trainer=ddp", "trainer.accelerator=cpu")
    return [str(CONF.parent / "train.py"), *given, *settings, f"data.root={phantoms}", f"cache_dir={cache}"]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_first_process_ends_all_of_them(phantoms, cache, tmp_path, signum):
    settings = ("tracking=off", "trainer.max_epochs=4000", "trainer.patience=0", "trainer.devices=2")
    command = [sys.executable, *arguments(phantoms, cache, *settings)]
    # SIGKILL: as under nohup, where processes that torch tells by SIGINT of their parent's death would not hear of it
    heard = signal.SIG_IGN if signum == signal.SIGKILL else signal.SIG_DFL
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, heard),
    )
    others: list[psutil.Process] = []
    try:
        until(lambda: [*tmp_path.glob("runs/*/checkpoints/last.ckpt")], 900, process)
        others = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=600)
        assert not psutil.wait_procs(others, timeout=600)[1]
    finally:
        for left in (process, *filter(psutil.Process.is_running, others)):
            left.kill()
    if signum != signal.SIGKILL:
        assert process.returncode == 130, errors
        assert "ckpt=" in errors
        assert "Traceback" not in errors
    (last,) = tmp_path.glob("runs/*/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] >= 0


def torchrun(*given, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    return subprocess.run([*command, *given], cwd=cwd, capture_output=True, text=True)


@pytest.mark.slow
def test_torchrun_leaves_one_folder_and_one_run(phantoms, tmp_path, empty_store):
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = ("trainer.max_epochs=2", f"tracking.uri={uri}", f"tracking.local={uri}")
    done = torchrun(*arguments(phantoms, tmp_path / "cache", *settings), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best checkpoint") == 1
    (folder,) = (tmp_path / "runs").iterdir()
    history = pd.read_csv(folder / "history.csv")
    assert len(history) == 2
    # measured by one process, on all slices
    printed = float(done.stdout.split("(valid/loss ")[1].split(")")[0])
    assert printed == pytest.approx(history["valid/loss"].min(), abs=1e-3)
    assert (folder / "bundle" / "bundle.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", "cache", "mlflow.db", "mlflow.db.lock", "mlruns"}
    from tests.tracking.conftest import runs

    (run,) = runs(uri)
    assert run.info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["torchrun", "alone"])
def test_a_mistake_is_told_once_and_ends_all(cache, tmp_path, launch):
    given = arguments("nowhere", cache, "data=chest_ct", "tracking=off")
    if launch == "torchrun":
        done = torchrun(*given, cwd=tmp_path)
        assert done.returncode != 0
    else:
        command = [sys.executable, *given, "trainer.devices=2"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "nowhere" in done.stderr
