"""The processes of one training (DDP): which of them this is, and how they act as one.

Where there is one process, every function here just does its work. What the processes tell each other here goes over
the processors' network (gloo), never over the devices', so that one may wait for hours while another decodes slices.
"""

import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from chestct.errors import ChestCTError

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of a training."""

    launcher: str = ""  # torchrun or srun; empty where this project started it
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine
    local_size: int = 1
    machines: int = 1


class ElsewhereError(ChestCTError):
    """Another process failed, and tells of it."""


_place = Place()
_connected = False


def launched(env: Mapping[str, str] = os.environ) -> Place:
    """The place that torchrun or srun gave this process; the only one where neither started it."""
    if "TORCHELASTIC_RUN_ID" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
        return Place("torchrun", *(int(env[name]) for name in names))
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # the step's: a batch script is no step, however many tasks it has
        size, machines = int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_STEP_NUM_NODES"])
        return Place("srun", int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), size // machines, machines)
    return Place()


def connect(place: Place) -> None:
    """From here on this process is one of several, which torch.distributed connects; `disconnect` ends it."""
    global _place, _connected
    _place, _connected = place, True


def disconnect() -> None:
    global _place, _connected
    _place, _connected = Place(), False


def place() -> Place:
    return _place


def is_first() -> bool:
    """Whether this is the process that decides, writes and speaks."""
    return _place.rank == 0


def share(value: T) -> T:
    """The first process's value, in all of them."""
    if not _connected:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather(value: T) -> list[T]:
    """The values of all processes, in all of them, by rank."""
    if not _connected:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * _place.size
    dist.all_gather_object(values, value)
    return values


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if not _connected:
        return flag
    import torch
    import torch.distributed as dist

    found = torch.tensor(int(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())


def together(work: Callable[[], T]) -> T:
    """Does the work in every process and waits for all. An error in one ends all; the first process tells of it."""
    if not _connected:
        return work()
    result: Any = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    told = gather(None if failure is None else _described(failure))
    if not any(told):
        return result
    if failure is not None and is_first():
        raise failure
    if not is_first():
        raise ElsewhereError(next(filter(None, told)))
    rank, text = next((rank, text) for rank, text in enumerate(told) if text)
    raise ChestCTError(f"Process {rank} of {_place.size}: {text}")


def _described(error: Exception) -> str:
    if isinstance(error, ChestCTError):
        return str(error)
    return f"it failed.\n{''.join(traceback.format_exception(error))}"


def on_first(work: Callable[[], T]) -> T:
    """Does the work in the first process while the others wait, and gives its result to all."""
    return share(together(lambda: work() if is_first() else None))  # type: ignore[return-value]
