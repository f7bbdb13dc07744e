"""What several processes (DDP) cost on one machine's cores: training all of VGG16 in one process and in two, in turns.

    python -m benchmarks.ddp [--slices 64] [--rounds 2]

Prints slices a second, training and validation of an epoch together, and how far the two histories lie apart.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from chestct.config.compose import compose
from chestct.config.schema import Config, PhantomConfig
from chestct.phantom.dataset import write
from chestct.training import callbacks, train

SETTINGS = ("model.freeze=false", "optim=sgd", "data.views=0", "data.batch_size=32", "data.size=112", "tracking=off")
QUIET = ("trainer.max_epochs=4", "trainer.patience=0", "trainer.progress=false", "evaluation.report=false")
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")


class Clock(callbacks.History):
    """Notes the seconds of each epoch, without what is written after it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, *args: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        (self.path.parent / "seconds.txt").write_text(" ".join(map(str, self.seconds)))
        super().on_train_epoch_end(*args)


def run(cfg: Config, out: Path) -> tuple[list[float], int, pd.DataFrame]:
    """Seconds of each epoch but the first, which warms up; slices of an epoch; the history."""
    slices = len(train(cfg, out).data.manifest.query("split != 'test'"))
    seconds = [float(text) for text in (out / "seconds.txt").read_text().split()[1:]]
    return seconds, slices, pd.read_csv(out / "history.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    callbacks.History = Clock  # type: ignore[misc]
    times: dict[str, list[float]] = {"one process": [], "two processes": []}
    histories: dict[str, pd.DataFrame] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root / "set", PhantomConfig(slices=args.slices, size=128))
        common = (*SETTINGS, *QUIET, f"data.root={root}/set", f"cache_dir={root}/cache")
        for turn in range(args.rounds):
            for name, settings in zip(times, ((), TWO), strict=True):
                seconds, slices, histories[name] = run(compose(*common, *settings), root / f"{name} {turn}")
                times[name] += seconds
    print(f"{slices} slices of 112 pixels, all layers train; {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    one = statistics.median(times["one process"])
    for name, values in times.items():
        middle = statistics.median(values)
        each = " ".join(f"{value:.2f}" for value in values)
        print(f"  {name:14}{slices / middle:7.2f} slices/s   {one / middle:.2f} of one process   (epochs: {each} s)")
    one_process, two_processes = histories.values()
    undefined = sorted(one_process.columns[one_process.isna().any()])  # with a class that no validation slice has
    assert undefined == sorted(two_processes.columns[two_processes.isna().any()])
    apart = np.nanmax(np.abs(one_process - two_processes).to_numpy())
    print(f"  largest difference of any metric of any epoch: {apart:.1e}; undefined: {', '.join(undefined) or 'none'}")


if __name__ == "__main__":
    main()
