"""What an NVIDIA GPU does at 224 pixels, and how busy it is; `first` pays for compiling: `python -m benchmarks.gpu`."""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.scale import draw
from chestct.config.compose import compose
from chestct.data.datamodule import SliceModule
from chestct.models.feature_cache import Kept, extract
from chestct.models.vgg16 import VGG16
from chestct.models.weights import load_weights
from chestct.training import train

BATCH, PASSES, GOALS = 512, 6, {"features": 13_000, "fine-tuning, compiled": 4_700}
COMMON = ["data.name=noise", "trainer=gpu", "trainer.progress=false", "tracking=off", "evaluation.report=false"]
TUNING = ["experiment=full_finetune", f"trainer.max_epochs={PASSES}", "trainer.patience=0", "data.batch_size=256"]
TUNING += ["data.workers=8", f"callbacks={{clock: {{_target_: {__name__}.Clock}}}}"]
TIMES: list[float] = []  # when each piece of work began and was done, in turn


def tick(*_: Any) -> None:
    torch.cuda.synchronize()
    TIMES.append(time.time())


class Clock(L.Callback):
    on_train_epoch_start = on_validation_start = tick  # validation comes after an epoch's training steps


def features(settings: list[str], root: Path) -> int:
    """Passes over training slices, each into an empty cache."""
    cfg, device = compose(*settings, "experiment=head"), torch.device("cuda")
    (data := SliceModule(cfg)).prepare_data()
    data.setup()
    dataset = data.dataset("train", train=True)
    net = VGG16(cfg.model, 1, cfg.data.size, load_weights(cfg.model.weights)).eval().to(device)
    layer = torch.compile(torch.autocast("cuda", torch.bfloat16)(net.pooled))
    contents, shown = dataset.contents[: len(dataset) // BATCH * BATCH], partial(dataset.shown, view=0, device=device)
    for turn in range(PASSES):
        tick()
        extract([Kept(layer, contents, root / f"pass-{turn}")], shown, device, batch_size=BATCH)
        tick()
    return len(contents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=16_384)
    slices = parser.parse_args().slices
    if not torch.cuda.is_available():
        sys.exit("There is no NVIDIA GPU that torch can use: nothing was measured.")
    print(f"{torch.cuda.get_device_name():24}{'slices/s':>10}{'first':>10}{'busy':>8}{'goal':>10}")
    query = ["nvidia-smi", "--query-gpu=timestamp,utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    with tempfile.TemporaryDirectory() as folder:
        draw((root := Path(folder)) / "set", slices)
        common = [*COMMON, f"data.root={root}/set", f"cache_dir={root}/cache"]
        for name in ("features", "fine-tuning", "fine-tuning, compiled"):
            TIMES.clear()
            with (root / "busy").open("wb") as log, subprocess.Popen(query, stdout=log) as sampling:
                try:
                    settings = [*common, *TUNING, f"trainer.compile={'compiled' in name}"]
                    tuned = name != "features" and train(compose(*settings), root / name)
                    seen = len(tuned.data.dataset("train")) if tuned else features(common, root / name)
                finally:
                    sampling.terminate()
            lines = (root / "busy").read_text("utf-8").splitlines()
            samples = [line.split(", ") for line in lines if line.count(", ") == 1]
            (began, ended), *others = zip(TIMES[::2], TIMES[1::2], strict=True)
            rate = statistics.median(seen / (ended - began) for began, ended in others)
            at = [(datetime.strptime(when, "%Y/%m/%d %H:%M:%S.%f").timestamp(), float(busy)) for when, busy in samples]
            shares = [busy for when, busy in at if any(began <= when <= ended for began, ended in others)]
            busy, goal = statistics.fmean(shares or [0.0]), GOALS.get(name, 0)
            print(f"{name:24}{rate:10,.0f}{seen / (ended - began):10,.0f}{busy:7.0f}%{goal:10,}", flush=True)


if __name__ == "__main__":
    main()
