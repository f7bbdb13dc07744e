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
    best = ModelCheckpoint(folder, "best", monitor=cfg.monitor, mode=cfg.mode, **settings)
    return best, ModelCheckpoint(folder, "last", monitor=None, **settings)


class SealedCheckpoints(TorchCheckpointIO):
    """Lightning's own files, sealed; renamed into place next to where they were written, which no kill can halve."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomic(Path(path), sealed(buffer.getvalue()))
