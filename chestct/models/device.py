"""The one place that picks what a network computes on outside of training, which Lightning decides."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def pick_device(accelerator: str = "auto") -> torch.device:
    """The accelerator of this machine, or the CPU where there is none or `trainer.accelerator` says cpu.

    A checkpoint that was trained on a GPU is evaluated on what there is.
    """
    device = None if accelerator == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    return device or torch.device("cpu")


@contextmanager
def on_accelerator(net: nn.Module, accelerator: str = "auto") -> Iterator[torch.device]:
    """Moves a network to `pick_device`, and back to the CPU afterwards."""
    device = pick_device(accelerator)
    net.to(device)
    try:
        yield device
    finally:
        net.cpu()
