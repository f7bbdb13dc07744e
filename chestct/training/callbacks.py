"""What happens around the steps: history, convolutions that join in, and early stopping."""

import gc
import multiprocessing
import signal
from pathlib import Path
from typing import Any, cast

import lightning as L
import pandas as pd
from lightning.pytorch.callbacks import Callback, EarlyStopping, RichProgressBar
from lightning.pytorch.strategies import DDPStrategy

from chestct.config.schema import Config
from chestct.config.targets import build
from chestct.files import write_atomic
from chestct.models.lightning_module import Classifier


def callbacks_of(settings: Config, out: Path) -> list[Callback]:
    """Every callback of a training run but those that keep checkpoints."""
    cfg = settings.trainer
    callbacks: list[Callback] = [History(out / "history.csv"), EndWithParent()]
    if cfg.unfreeze_epoch:
        callbacks.append(Unfreeze(cfg.unfreeze_epoch, cfg.unfreeze_blocks))
    if cfg.patience:
        stop = EarlyStopping(cfg.monitor, patience=cfg.patience, mode=cfg.mode, check_on_train_epoch_end=True)
        callbacks.append(stop)
    if cfg.progress:
        callbacks.append(RichProgressBar(leave=False))
    own = settings.callbacks.items()
    return callbacks + [build(spec, Callback, f"callbacks.{name}") for name, spec in own]


class History(Callback):
    """The metrics of every epoch, as a CSV file and in the checkpoint, so that a resumed run has them all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        rates = {"lr": trainer.optimizers[0].param_groups[0]["lr"]}
        self.rows.append({"epoch": trainer.current_epoch} | metrics | rates)
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
        net.set_frozen(5 - self.blocks)
        if isinstance(trainer.strategy, DDPStrategy):
            # The wrapper averages gradients of what was trainable when it was made. The old one lets go of the
            # parameters only when it is gone.
            trainer.strategy.model = pl_module
            gc.collect()
            trainer.strategy.configure_ddp()


class EndWithParent(Callback):
    """Lets SIGTERM end a process that Lightning started for DDP at once.

    The process that started it ends all of them together and tells of it; the checkpoint of the last whole epoch is in
    place. Lightning's own handler would wait for the other processes, one of which may be gone.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1 and multiprocessing.parent_process():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
