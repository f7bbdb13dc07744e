"""Several processes, one training (DDP): who starts them, how they connect, and how they end together.

torchrun and srun start one process a device, each of them with train.py; without them the first process starts the
others of its machine itself, as plain Python processes that get everything from it. (Lightning would run the command
line again for each, and with it Hydra, the sweep or the test that called.)
"""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from chestct import ranks
from chestct.config.schema import TrainerConfig
from chestct.errors import ChestCTError, ConfigError
from chestct.ranks import Place

LONGEST_WAIT = timedelta(hours=12)
"""For a first process that decodes slices; one that died is noticed at once."""


class LostError(ChestCTError):
    """Another process ended before the work was done."""


Join = Callable[[Place, int], None]
"""What another process runs: its place, and the port of the first."""


@contextmanager
def processes(cfg: TrainerConfig, join: Join) -> Iterator[None]:
    """While this is open, the processes that the settings ask for are connected (see chestct.ranks).

    Raises ConfigError where the settings do not fit what torchrun or srun started, ChestCTError where a process ends
    before the work is done.
    """
    here = ranks.launched()
    _check(cfg, here)
    if cfg.strategy == "single":
        yield
        return
    with _restored():
        if here.launcher:
            with connected(here):
                yield
        else:
            here = Place(size=_devices(cfg), local_size=_devices(cfg))
            with _started(here, join) as store, connected(here, store):
                yield


def environment() -> ClusterEnvironment:
    """What tells Lightning the place of this process. Named, because it would guess from any variable of SLURM's."""
    if ranks.place().launcher == "srun":
        return SLURMEnvironment(auto_requeue=False)
    return TorchElasticEnvironment() if ranks.place().launcher == "torchrun" else LightningEnvironment()


@contextmanager
def connected(here: Place, store: dist.Store | None = None) -> Iterator[None]:
    """Connects this process to the others: through the store, or as torchrun or srun arranged it.

    Raises LostError where one of them ends.
    """
    ranks.connect(here)
    if here.launcher == "srun":
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment().main_address, str(environment().main_port)
    # What processes tell each other by way of chestct.ranks lies on the CPU, whatever they train on.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.size, timeout=LONGEST_WAIT)
        yield
    except Exception as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise LostError("Another process of this training ended before the work was done.") from error
    finally:
        ranks.disconnect()
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _started(here: Place, join: Join) -> Iterator[dist.Store]:
    """Starts the other processes of this machine and ends them; gives the store through which they connect."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")  # none leaves the machine
    listening = socket.create_server(("127.0.0.1", 0))  # the store's own would listen on every address
    port = listening.getsockname()[1]
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=LONGEST_WAIT,
        master_listen_fd=listening.detach(),
    )
    _share_cores(here.size)
    others: list[BaseProcess] = []
    # Ignored by what is started while it is ignored here: Ctrl-C reaches all, and the first tells the others.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for rank in range(1, here.size):
        os.environ["LOCAL_RANK"] = str(rank)  # Lightning reads it
        place = replace(here, rank=rank, local_rank=rank)
        others.append(get_context("spawn").Process(target=join, args=(place, port), name=f"rank {rank}"))
        others[-1].start()
    os.environ["LOCAL_RANK"] = "0"
    signal.signal(signal.SIGINT, before)
    try:
        yield store
    except LostError:
        raise LostError(_who_ended(others)) from None
    else:
        for process in others:
            process.join(60)
    finally:
        for process in others:
            process.kill()  # it holds nothing that is not in the first
            process.join()


def _who_ended(others: list[BaseProcess]) -> str:
    wait([process.sentinel for process in others], timeout=5)
    for rank, process in enumerate(others, 1):
        if code := process.exitcode:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
            return f"Process {rank} of {len(others) + 1} {how}, and the training with it. ckpt=last goes on with it."
    return "The processes of this training lost their connection. ckpt=last goes on with it."


def _check(cfg: TrainerConfig, here: Place) -> None:
    """Raises ConfigError where settings and launcher contradict each other."""
    if cfg.strategy == "single":
        if here.size > 1:
            raise ConfigError(f"{here.launcher} started {here.size} processes to train together: say trainer=ddp.")
    elif not here.launcher:
        if cfg.num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes={cfg.num_nodes}: several machines are started by torchrun or srun, see "
                "docs/clusters.md."
            )
    elif cfg.num_nodes != here.machines:
        raise ConfigError(
            f"trainer.num_nodes={cfg.num_nodes}, but {here.launcher} started processes on {here.machines}. Say "
            f"trainer.num_nodes={here.machines}."
        )
    elif cfg.devices != "auto" and _devices(cfg) != here.local_size:
        raise ConfigError(
            f"trainer.devices={cfg.devices}, but {here.launcher} started {here.local_size} processes on this machine. "
            "Leave trainer.devices out."
        )


def _devices(cfg: TrainerConfig) -> int:
    """How many devices of this machine the settings name. Raises ConfigError on the CPU, which has no number."""
    if cfg.devices != "auto":
        return len([which for which in cfg.devices.split(",") if which]) if "," in cfg.devices else int(cfg.devices)
    if cfg.accelerator == "cpu" or not torch.cuda.is_available():
        raise ConfigError("trainer=ddp on the CPU: say how many processes, as in trainer.devices=2.")
    return torch.cuda.device_count()


def devices(cfg: TrainerConfig) -> int | list[int]:
    """What Lightning is told: how many devices of this machine, or which."""
    if "," in cfg.devices:
        return [int(which) for which in cfg.devices.split(",") if which]
    return ranks.place().local_size


def _share_cores(processes: int) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, torch.get_num_threads() // processes)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the others


@contextmanager
def _restored() -> Iterator[None]:
    """Puts environment and threads back: more may follow in this process, a report or another job of a sweep."""
    variables, threads = dict(os.environ), torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(variables)
