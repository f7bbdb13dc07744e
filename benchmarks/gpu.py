"""What one NVIDIA GPU does at 224 pixels, and how busy it is: `python -m benchmarks.gpu [--slices N] [--json FILE]`.

Frozen features through the input pipeline, and fine-tuning with augmentation; `first` pays for compiling.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.scale import draw
from chestct.config.compose import compose
from chestct.data.datamodule import SliceModule
from chestct.files import write_atomic
from chestct.models.features import Kept, extract
from chestct.models.vgg16 import VGG16
from chestct.models.weights import load_weights
from chestct.training import train

SETTINGS = ("experiment=head", "data.name=noise", "trainer=gpu", "trainer.progress=false", "tracking=off")
SETTINGS += ("evaluation.report=false",)
BATCH = 512
GOALS = {"features": 13_000, "fine-tuning, compiled": 4_700}
EPOCHS: list[list[float]] = []  # when each one's training steps began and were done; validation comes after them


class Clock(Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.cuda.synchronize()
        EPOCHS.append([time.time()])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.cuda.synchronize()
        EPOCHS[-1].append(time.time())


def features(settings: tuple[str, ...], root: Path) -> list[tuple[int, float, float]]:
    """(slices, begin, end) of two passes over training slices, each into an empty cache."""
    cfg, device = compose(*settings), torch.device("cuda")
    (data := SliceModule(cfg)).prepare_data()
    data.setup()
    dataset = data.dataset("train", train=True)
    net = VGG16(cfg.model, 1, cfg.data.size, load_weights(cfg.model.weights)).eval().to(device)
    layer = torch.compile(torch.autocast("cuda", torch.bfloat16)(net.pooled))
    contents, times = dataset.contents[: len(dataset) // BATCH * BATCH], [time.time()]
    for name in ("first", "again"):
        kept = [Kept(layer, contents, root / name)]
        extract(kept, partial(dataset.shown, view=0, device=device), device, batch_size=BATCH)
        times.append(time.time())
    return [(len(contents), *span) for span in pairwise(times)]


def fine_tuning(settings: tuple[str, ...], root: Path) -> list[tuple[int, float, float]]:
    """The same of each epoch's training steps."""
    EPOCHS.clear()
    more = ("experiment=full_finetune", "trainer.max_epochs=4", "trainer.patience=0", "data.batch_size=256")
    more += ("data.workers=8", "callbacks={clock: {_target_: benchmarks.gpu.Clock}}")
    slices = len(train(compose(*settings, *more), root).data.dataset("train"))
    return [(slices, began, ended) for began, ended in EPOCHS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=16_384)
    parser.add_argument("--json", type=Path, default=Path("runs/bench-gpu.json"))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no NVIDIA GPU that torch can use: nothing was measured.")
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as samples:
        root = Path(folder)
        draw(root / "set", given.slices)
        settings = (*SETTINGS, f"data.root={root}/set", f"cache_dir={root}/cache")
        query = ["nvidia-smi", "--query-gpu=timestamp,utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
        with subprocess.Popen(query, stdout=samples) as sampling:
            runs = {"features": features(settings, root / "features")}
            runs["fine-tuning"] = fine_tuning(settings, root / "eager")
            runs["fine-tuning, compiled"] = fine_tuning((*settings, "trainer.compile=true"), root / "compiled")
            sampling.terminate()
        samples.seek(0)
        lines = [line.split(", ") for line in samples.read().splitlines() if line.count(", ") == 1]
    busy = [(datetime.strptime(at, "%Y/%m/%d %H:%M:%S.%f").timestamp(), float(share)) for at, share in lines]
    print(f"{figures['gpu']}, torch {figures['torch']}\n{'':24}{'slices/s':>10}{'first':>10}{'busy':>8}{'goal':>10}")
    for name, (first, *others) in runs.items():
        rates = [slices / (ended - began) for slices, began, ended in (first, *others)]
        shares = [share for at, share in busy if any(began <= at <= ended for _, began, ended in others)]
        figures[name] = {"rates": rates, "busy": statistics.fmean(shares or [0.0])}
        rate, goal = statistics.median(rates[1:]), GOALS.get(name, 0)
        print(f"{name:24}{rate:10,.0f}{rates[0]:10,.0f}{figures[name]['busy']:7.0f}%{goal:10,}")
    print(f"All of it: {write_atomic(given.json, json.dumps(figures, indent=1))}")


if __name__ == "__main__":
    from benchmarks import gpu  # the module whose EPOCHS the callback fills

    gpu.main()
