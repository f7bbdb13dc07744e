"""What happens around the steps: history, checkpoints, convolutions that join in, and early stopping."""

import gc
import io
import multiprocessing
import signal
import sys
from pathlib import Path
from typing import Any, cast

import lightning as L
import pandas as pd
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy

from chestct.config.schema import Config
from chestct.config.targets import build
from chestct.errors import ConfigError
from chestct.files import write_atomic
from chestct.models.checkpoint import sealed
from chestct.models.lightning_module import Classifier

INSTEAD: dict[type[Callback], str] = {
    lightning_callbacks.LearningRateFinder: "python train.py -m optim.lr=1e-4,1e-3,1e-2",
    lightning_callbacks.BatchSizeFinder: "data.batch_size=N",
    lightning_callbacks.BackboneFinetuning: "trainer.unfreeze_epoch=N trainer.unfreeze_blocks=N",
}
"""Callbacks of Lightning's that look for names which this package's module does not have -> what does the same here."""


def callbacks_of(settings: Config, out: Path) -> list[Callback]:
    """Every callback of a training run; two of them keep best.ckpt (by `trainer.monitor`) and last.ckpt.

    Two, because ModelCheckpoint(save_last=True) writes only in epochs that are among the best. The best is the first
    that keeps checkpoints, whose path other processes of Lightning's return; the last comes after those of the user's,
    so that it, written at the end of every epoch, holds what they know.
    """
    cfg = settings.trainer
    callbacks: list[Callback] = [History(out / "history.csv"), EndWithParent()]
    if cfg.unfreeze_epoch:
        callbacks.append(Unfreeze(cfg.unfreeze_epoch, cfg.unfreeze_blocks))
    if cfg.patience:
        callbacks.append(
            EarlyStopping(cfg.monitor, mode=cfg.mode, patience=cfg.patience, check_on_train_epoch_end=True)
        )
    own = [build(spec, Callback, f"callbacks.{name}") for name, spec in settings.callbacks.items()]
    for name, callback in zip(settings.callbacks, own, strict=True):
        if type(callback) in INSTEAD:
            raise ConfigError(f"callbacks.{name} cannot work with this network. Say {INSTEAD[type(callback)]}")
        if cfg.patience and callback.state_key == callbacks[-1].state_key:
            raise ConfigError(
                f"callbacks.{name} watches {cfg.monitor}, as trainer.patience={cfg.patience} does: add "
                "trainer.patience=0, or give trainer.patience=N alone."
            )
    # A Trainer takes one bar: a user's comes instead, on a terminal or not.
    if cfg.progress and sys.stdout.isatty() and not any(isinstance(callback, ProgressBar) for callback in own):
        callbacks.append(Bar(leave=False))
    keepers = [callback for callback in own if isinstance(callback, Checkpoint)]
    callbacks += [callback for callback in own if callback not in keepers]
    keep: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}
    best = Keeper(out / "checkpoints", "best", monitor=cfg.monitor, mode=cfg.mode, **keep)
    return [*callbacks, best, *keepers, Keeper(out / "checkpoints", "last", monitor=None, **keep)]


class Bar(RichProgressBar):
    """Lightning's bar without the run's id, which it calls a version number."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class History(Callback):
    """The metrics of every epoch, as a CSV file and in the checkpoint, so that a resumed run has them all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.rate = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]  # at the end it is that of the next epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows.append({"epoch": trainer.current_epoch, **metrics, "lr": self.rate})
        if trainer.is_global_zero:
            write_atomic(self.path, pd.DataFrame(self.rows).to_csv(index=False))

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


class Unfreeze(Callback):
    """Lets the last blocks of convolutions train from an epoch on; also in a run that is resumed after it.

    Lightning's BaseFinetuning adds parameters to the optimiser on the way, and so cannot have a schedule over the whole
    run; here they are in it from the start, without gradients.
    """

    def __init__(self, epoch: int, blocks: int) -> None:
        self.epoch, self.blocks = epoch, blocks

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        net = cast(Classifier, pl_module).net
        if trainer.current_epoch < self.epoch or not net.frozen:
            return
        net.set_frozen(net.block - self.blocks)
        if isinstance(trainer.strategy, DDPStrategy):
            # The wrapper averages gradients of what was trainable when it was made. The old one lets go of the
            # parameters only when it is gone.
            trainer.strategy.model = pl_module
            gc.collect()
            trainer.strategy.configure_ddp()


class EndWithParent(Callback):
    """Ends a process that Lightning started for DDP at once, on SIGTERM or when the process that started it is gone.

    Lightning's own handler would wait for the other processes, one of which may be gone. Of a parent's death torch
    tells by SIGINT, which programs that were started in the background (nohup) ignore.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1 and multiprocessing.parent_process():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
                signal.signal(signal.SIGINT, signal.SIG_DFL)


class EarlyStopping(lightning_callbacks.EarlyStopping):
    """Lightning's, under its name, by which a checkpoint knows its state; what it ended trains no more when resumed.

    Patience is that of the settings, not of the checkpoint: given more, such a run goes on.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience


class Keeper(ModelCheckpoint):
    """ModelCheckpoint that knows its best in a run folder that was moved or copied, too.

    Lightning keeps absolute paths; where they differ, it forgets what was best, and the next epoch would replace it.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Before "fit" Lightning would ask whether the folder is empty, and import clients of cloud storage to do so.
        super().setup(trainer, pl_module, "validate")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Not Lightning's: it takes paths from the file, which may come from anywhere, and removes what they name.
        path = Path(str(self.dirpath), f"{self.filename}.ckpt")
        if not path.is_file():
            return
        self.best_model_path = str(path)
        if self.monitor:
            self.best_model_score = self.kth_value = state_dict["best_model_score"]
            self.kth_best_model_path, self.best_k_models = str(path), {str(path): self.kth_value}


class SealedCheckpoints(TorchCheckpointIO):
    """Lightning's own files with a checksum over everything, written whole or not at all.

    Callbacks take the paths of what they remove from the checkpoint that is resumed, whoever wrote it, and Lightning
    would remove whole folders: here it is .ckpt files alone, next to those that this process saved.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folders: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomic(Path(path), sealed(buffer.getvalue()))
        self.folders.add(Path(path).parent.resolve())

    def remove_checkpoint(self, path: Any) -> None:
        file = Path(path)
        if file.suffix == ".ckpt" and file.is_file() and file.parent.resolve() in self.folders:
            file.unlink()
