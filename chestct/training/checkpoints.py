"""Which checkpoints a run keeps, and how they are written: whole or not at all, with a checksum over everything."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from chestct.config.schema import TrainerConfig
from chestct.files import write_atomic
from chestct.models.checkpoint import sealed


def keepers(cfg: TrainerConfig, folder: Path) -> tuple[ModelCheckpoint, ModelCheckpoint]:
    """best.ckpt by `trainer.monitor`, and last.ckpt of every epoch, written at its end, when all of it is known.

    Two, because ModelCheckpoint(save_last=True) writes only in epochs that are among the best. The best comes first, so
    that the last holds what it knows.
    """
    settings: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}
    best = Keeper(folder, "best", monitor=cfg.monitor, mode=cfg.mode, **settings)
    return best, Keeper(folder, "last", monitor=None, **settings)


class Keeper(ModelCheckpoint):
    """ModelCheckpoint that knows its best in a run folder that was moved or copied, too.

    Lightning keeps absolute paths; where they differ, it forgets what was best, and the next epoch would replace it.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = Path(str(self.dirpath))

        def moved(path: str) -> str:
            return str(here / Path(path).name) if path else path

        if all((here / Path(path).name).is_file() for path in state_dict["best_k_models"]):
            state_dict = state_dict | {
                "dirpath": str(here),
                "best_model_path": moved(state_dict["best_model_path"]),
                "kth_best_model_path": moved(state_dict["kth_best_model_path"]),
                "best_k_models": {moved(path): score for path, score in state_dict["best_k_models"].items()},
            }
        super().load_state_dict(state_dict)


class SealedCheckpoints(TorchCheckpointIO):
    """Lightning's own files, sealed; renamed into place next to where they were written, which no kill can halve."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomic(Path(path), sealed(buffer.getvalue()))
