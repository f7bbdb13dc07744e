"""One training run, start to end: settings in, a result out. train.py, sweeps, notebooks and tests all call this."""

import dataclasses
import os
import re
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
import torch.distributed as dist
from filelock import FileLock
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import OmegaConf
from torch import nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from chestct.config.compose import PARTS, left_behind
from chestct.config.schema import Config
from chestct.config.targets import build
from chestct.data.datamodule import SliceModule
from chestct.data.prepare import is_synthetic
from chestct.data.splits import identity
from chestct.errors import ChestCTError, ConfigError, Interrupted, out_of_memory
from chestct.files import write_atomic
from chestct.models.checkpoint import REFITS, read_checkpoint
from chestct.models.features import attach, outputs, plain_maps
from chestct.models.head import has_places
from chestct.models.lightning_module import Classifier
from chestct.models.predictions import prediction_table
from chestct.models.vgg16 import pick_device
from chestct.progress import phase
from chestct.reporting.audit_report import kept_report
from chestct.tracking import Run
from chestct.training.callbacks import Keeper, SealedCheckpoints, callbacks_of
from chestct.training.resume import resumable

MISTAKE = r"^(?:chestct\.errors\.\w+|lightning\.\S*MisconfigurationException|RuntimeError(?=: Early stopping)): (.*)"
"""How the last lines of a process begin that ended with a mistake of the user's."""


@dataclass(frozen=True)
class Result:
    """What a run leaves behind; all metrics are those of the best checkpoint."""

    folder: Path
    best: Path
    last: Path
    metrics: dict[str, float]  # valid/... and test/... (without evaluation.report: valid only)
    predictions: pd.DataFrame  # of the same slices, see chestct.models.predictions
    data: SliceModule


def train(cfg: Config, out: Path, run: Run | None = None, data: SliceModule | None = None) -> Result:
    """Trains as `cfg` says, keeps checkpoints and history in `out`, and measures the best checkpoint.

    data: made from `cfg` unless it is given, set up or not. With cfg.ckpt, goes on from that checkpoint; the best so
    far is known where it lies in `out`. With trainer.strategy=ddp, other processes take part in the training, and each
    that returns has measured all slices. Raises ChestCTError for what the user can mend, and Interrupted after Ctrl-C
    or SIGTERM; the checkpoint of the last whole epoch is then in place.
    """
    run = run or Run()
    L.seed_everything(cfg.seed, verbose=False)
    try:
        write_atomic(out / "settings.yaml", OmegaConf.to_yaml(OmegaConf.structured(cfg)))
    except OSError as error:
        reason = f"{error.strerror}. Choose another with runs_dir=FOLDER."
        raise ChestCTError(f"Cannot write to the run folder {out}: {reason}") from None
    cluster = environment(cfg.trainer.strategy)
    callbacks = callbacks_of(cfg, out)
    trainer = _trainer(cfg, out, callbacks, cluster)
    loggers = [build(spec, Logger, f"loggers.{name}", save_dir=out) for name, spec in cfg.loggers.items()]  # type: ignore[type-abstract]
    # Processes that torchrun or srun started prepare data one after the other: the first makes it, others read it.
    cfg.cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cfg.cache / "prepare.lock") if cluster.creates_processes_externally else nullcontext():
        data = data or SliceModule(cfg)
        data.prepare_data()
        data.setup()
        assert data.store is not None
        smallest = min(data.manifest["split"].value_counts().min(), cfg.data.batch_size)
        if smallest < trainer.world_size:
            raise ConfigError(
                f"{trainer.world_size} processes share batches and splits, the smallest of which has {smallest} "
                "slices. Start fewer with trainer.devices=N, or raise data.batch_size."
            )
        about = identity(data.manifest, data.store.data_hash)
        model = Classifier(dataclasses.asdict(cfg), list(data.class_names), data.class_counts().tolist(), about)
        if not (cfg.model.hidden or cfg.model.head or has_places(model.net.head)):
            # A linear head has nothing to break the symmetry of, and what it draws at random is noise that a small
            # learning rate would take thousands of steps to forget.
            for parameter in model.net.head[-1].parameters():
                nn.init.zeros_(parameter)
        resume = resumable(cfg, model)
        data.begins = read_checkpoint(resume)["epoch"] + 1 if resume else 0
        run.begin()  # now that all this has proved usable
        trainer.loggers = [*run.loggers(), *loggers]
        if cfg.starts_frozen:
            model.to(trainer.strategy.root_device)
            if cfg.features.cache:
                tested = ("test",) if cfg.always_frozen and cfg.evaluation.report else ()
                attach(data, model.net, cfg, ("train", "valid", *tested), views=cfg.data.views + 1)
            slices = data.dataset("train", train=True)
            model.net.fit_standardise(plain_maps(model.net, slices, cfg.features.batch_size), slices.w)
        _record(cfg, data, model, run)

    message = f"Training on {trainer.strategy.root_device} ({cfg.trainer.max_epochs} epochs at most)"
    phase(message, cfg.trainer.progress and trainer.is_global_zero)
    with _ended_in_order(trainer, out, cfg):
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    data.trainer = None  # whose processes shared out the slices
    if not cfg.always_frozen:
        data.features.clear()  # they are of convolutions that have trained since

    keeper = next(callback for callback in callbacks if isinstance(callback, Keeper))
    # In the first process's folder, in all of them; of a finished run that came without its best, what came.
    best = Path(keeper.best_model_path or resume or out / "checkpoints" / "best.ckpt")
    last = best.with_name("last.ckpt")
    metrics, predictions = _measure(cfg, best, model, data)
    for logger in trainer.loggers:
        logger.log_metrics(metrics, trainer.global_step)
    return Result(out, best, last, metrics, predictions, data)


def _trainer(cfg: Config, out: Path, callbacks: list[Callback], cluster: ClusterEnvironment) -> L.Trainer:
    """Lightning's trainer for these settings. Raises ChestCTError where this machine cannot meet them."""

    def argument(name: str, value: Any) -> Any:
        """An argument of the Trainer's; what is named by `_target_`, such as a profiler, writes to the run folder."""
        named = isinstance(value, dict) and "_target_" in value
        return build(value, object, f"trainer.args.{name}", dirpath=out) if named else value

    strategy: str | Strategy = "auto"
    devices: int | str = cfg.trainer.devices
    if cfg.trainer.strategy == "single":
        devices = 1 if devices == "auto" else devices
    else:
        # Processes that Lightning starts itself get what they need from this one: as scripts (popen) each would compose
        # settings, make a run folder and start the sweep again.
        strategy = DDPStrategy(start_method="popen" if cluster.creates_processes_externally else "spawn")
        if devices == "auto" and cluster.creates_processes_externally:
            devices = cluster.world_size() // cfg.trainer.num_nodes
    try:
        return L.Trainer(
            max_epochs=cfg.trainer.max_epochs,
            accelerator=cfg.trainer.accelerator,
            devices=devices,
            num_nodes=cfg.trainer.num_nodes,
            strategy=strategy,
            plugins=[cluster, SealedCheckpoints()],
            precision=cfg.trainer.precision,  # type: ignore[arg-type]
            deterministic=cfg.trainer.deterministic,
            logger=False,  # run.loggers() follow when the run has begun
            callbacks=callbacks,
            default_root_dir=out,
            num_sanity_val_steps=0,
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            enable_model_summary=False,
            use_distributed_sampler=False,  # chestct.data.datamodule.Batches deals the slices
            # The loaders change from features to images when convolutions join in.
            reload_dataloaders_every_n_epochs=1 if cfg.trainer.unfreeze_epoch else 0,
            **{name: argument(name, value) for name, value in cfg.trainer.args.items()},
        )
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"trainer settings that this machine or Lightning's Trainer cannot meet: {error}") from None


def environment(strategy: str) -> ClusterEnvironment:
    """Who starts the processes of a training: torchrun, srun, or Lightning itself.

    Named, because Lightning takes each batch script of SLURM's for one of several processes, and there ignores SIGTERM.
    Raises ConfigError where several were started for a training of one.
    """
    cluster: ClusterEnvironment = LightningEnvironment()
    try:
        if TorchElasticEnvironment.detect():
            cluster = TorchElasticEnvironment()
        elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            cluster = SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:  # what Lightning expects of SLURM's options
        raise ConfigError(str(error)) from None
    if strategy == "single" and cluster.world_size() > 1:
        raise ConfigError(f"{cluster.world_size()} processes were started to train together: add trainer=ddp.")
    return cluster


@contextmanager
def _ended_in_order(trainer: L.Trainer, out: Path, cfg: Config) -> Iterator[None]:
    """Says what is left of a training that was stopped, or that one of its processes left, and ends the others.

    Raises Interrupted after Ctrl-C and SIGTERM, on which Lightning exits; ChestCTError where a process died.
    """
    last = out / "checkpoints" / "last.ckpt"
    parts = left_behind(dataclasses.asdict(cfg), PARTS)
    resume = " ".join(["Go on with: python train.py", shlex.quote(f"ckpt={last}"), *parts])
    if REFITS in out.parts:  # one of many heads of an evaluation, none of which is a run
        resume = "The same command starts the evaluation anew."
    earlier = last.stat().st_mtime_ns if last.is_file() and not cfg.ckpt else 0  # of another training in this folder
    try:
        yield
    except (Interrupted, KeyboardInterrupt, SystemExit):
        if not last.is_file() or last.stat().st_mtime_ns == earlier:
            raise Interrupted("Stopped. No epoch was finished.") from None
        raise Interrupted(f"Stopped in epoch {read_checkpoint(last)['epoch'] + 1}. {resume}") from None
    except (MisconfigurationException, RuntimeError) as error:  # the latter of early stopping, for the same mistake
        if isinstance(error, RuntimeError) and not str(error).startswith("Early stopping conditioned on metric"):
            raise
        raise ConfigError(f"Lightning cannot train with these settings: {error}") from error
    except (ProcessRaisedException, ProcessExitedException) as error:
        if mistake := re.search(MISTAKE, str(error), re.M | re.S):
            raise ChestCTError(mistake[1].strip()) from None
        if out_of_memory(RuntimeError(str(error))):
            raise MemoryError from None
        message = f"Of {trainer.world_size} processes, {str(error).strip().removeprefix('-- ')}"
        way_on = resume if last.is_file() else "No epoch was finished."
        raise ChestCTError(f"{message}, and the training with it. {way_on}") from None
    finally:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)  # files are whole at any time
        if dist.is_initialized():
            dist.destroy_process_group()


def _measure(cfg: Config, best: Path, model: Classifier, data: SliceModule) -> tuple[dict[str, float], pd.DataFrame]:
    """Metrics and predictions of the best checkpoint on valid and test; a job of a search never looks at test.

    By each process alone, on all slices: none is then counted twice.
    """
    model.load_state_dict(read_checkpoint(best)["state_dict"])
    model.to(pick_device(cfg.trainer.accelerator))
    torch.backends.cudnn.benchmark = False  # which trainer=gpu asks for: in float32 it tries algorithms for minutes
    metrics: dict[str, float] = {}
    tables = []
    for split in ("valid", "test") if cfg.evaluation.report else ("valid",):
        dataset = data.dataset(split)
        logits, _ = outputs(model.net, dataset, cfg.data.batch_size)
        metrics |= model.measured(torch.from_numpy(logits), dataset.y, split, dataset.w)
        tables.append(prediction_table(data.manifest, split, logits, cfg.task))
    return metrics, pd.concat(tables, ignore_index=True)


def _record(cfg: Config, data: SliceModule, model: Classifier, run: Run) -> None:
    """Tells the run, where one is kept, what it stands on; audits the data where that has not been done."""
    assert data.store is not None
    if not run.client:
        return
    leaks = int(data.manifest["leaked"].sum())
    run.artifacts(kept_report(cfg, data.store), "audit")
    tags = {
        "data.name": cfg.data.name,
        "data.hash": data.store.data_hash,
        "data.split": cfg.data.split,
        "data.leakage": f"{leaks} slices have copies in an earlier split" if leaks else "none",
        "data.synthetic": is_synthetic(cfg.data),
    }
    slices = {f"slices.{split}": int(n) for split, n in data.manifest["split"].value_counts().items()}
    run.tags(tags | slices | model.parameter_counts())
