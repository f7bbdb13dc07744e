"""What happens around the steps: history, checkpoints, early stopping, and an orderly end when told to stop."""

import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import pandas as pd
from lightning.pytorch.callbacks import Callback, EarlyStopping, RichProgressBar
from lightning.pytorch.strategies import DDPStrategy

from chestct.config.schema import TrainerConfig
from chestct.errors import Interrupted
from chestct.models.lightning_module import Classifier
from chestct.ranks import any_of, is_first, on_first
from chestct.sweep.study import mark_pruned, trial_of

if TYPE_CHECKING:
    import optuna


def all_callbacks(cfg: TrainerConfig, out: Path) -> list[Callback]:
    """Every callback of a training run but those that keep checkpoints."""
    found: list[Callback] = [History(out / "history.csv"), StopWhenTold()]
    if trial := trial_of(out):
        found.append(Prune(trial, cfg.monitor))
    if cfg.unfreeze_epoch:
        found.append(Unfreeze(cfg.unfreeze_epoch, cfg.unfreeze_blocks))
    if cfg.patience:
        found.append(EarlyStopping(cfg.monitor, patience=cfg.patience, mode=cfg.mode, check_on_train_epoch_end=True))
    if cfg.progress:
        found.append(RichProgressBar(leave=False))
    return found


class History(Callback):
    """The metrics of every epoch, as a CSV file and in the checkpoint, so that a resumed run has them all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        rates = {"lr": trainer.optimizers[0].param_groups[0]["lr"]}
        self.rows.append({"epoch": trainer.current_epoch} | metrics | rates)
        if is_first():
            pd.DataFrame(self.rows).to_csv(self.path, index=False)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


class Unfreeze(Callback):
    """Lets the last blocks of convolutions train from an epoch on; also in a run that is resumed after it."""

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


class Prune(Callback):
    """Ends a job of a search that does worse than the others did by the same epoch; its best checkpoint stays."""

    def __init__(self, trial: "optuna.Trial", monitor: str) -> None:
        self.trial, self.monitor = trial, monitor

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if on_first(lambda: self._hopeless(float(trainer.callback_metrics[self.monitor]), trainer.current_epoch)):
            trainer.should_stop = True

    def _hopeless(self, value: float, epoch: int) -> bool:
        self.trial.report(value, epoch)
        if pruned := self.trial.should_prune():
            mark_pruned(self.trial)
        return pruned


class StopWhenTold(Callback):
    """Ends training between two batches after Ctrl-C or SIGTERM; the checkpoint of the last whole epoch stays.

    A half epoch is not kept, so that a resumed run ends exactly where the uninterrupted one would have.
    """

    def __init__(self) -> None:
        self.told = False

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._stop(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._stop(trainer)

    def _stop(self, trainer: L.Trainer) -> None:
        if any_of(self.told):
            raise Interrupted


@contextmanager
def stop_on_signals(callback: StopWhenTold) -> Iterator[None]:
    """While this is open, SIGINT and SIGTERM make training stop at the next batch; a second signal stops at once.

    Of several processes it is enough that one is told; they stop after the same batch.
    """

    def handle(signum: int, _: FrameType | None) -> None:
        if not is_first():
            callback.told = True
            return
        if callback.told:
            raise Interrupted("Stopped at once.")
        callback.told = True
        print("\nStopping after this batch; again to stop at once.")

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
