"""What an evaluation costs: the whole of one on a warm cache, the bootstrap of all metrics, and a heat map.

    python -m benchmarks.evaluation [--ckpt runs/.../checkpoints/best.ckpt]

Without a checkpoint the first part is left out. The heat map is measured against the forward pass that it is made from.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.speed import alternate, seconds
from chestct.config.checks import resolve
from chestct.config.schema import ModelConfig
from chestct.evaluation.evaluate import evaluate
from chestct.models.checkpoint import read_checkpoint
from chestct.models.saliency import heat, normal_cam, normalised_cam
from chestct.models.vgg16 import VGG16
from chestct.models.weights import load_weights
from chestct.reporting.render import write
from chestct.stats.metrics import measure


def whole(ckpt: Path) -> tuple[float, float, int]:
    """Seconds of an evaluation, from checkpoint to numbers, and of its report; and the number of test slices."""
    settings = resolve(read_checkpoint(ckpt)["hyper_parameters"]["settings"])
    quiet = dataclasses.replace(settings.trainer, progress=False)
    cfg = dataclasses.replace(settings, ckpt=str(ckpt), trainer=quiet)
    found = evaluate(cfg)  # fills caches
    measuring = seconds(lambda: evaluate(cfg))
    with tempfile.TemporaryDirectory() as folder:
        return measuring, seconds(lambda: write(found, Path(folder))), len(found.test)


def bootstrap(slices: int = 1000, groups: int = 300, resamples: int = 2000) -> float:
    """Seconds of every binary metric with its interval."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, slices)
    score = 1 / (1 + np.exp(-(2 * target - 1 + 2 * rng.standard_normal(slices))))
    table = pd.DataFrame({"target": target, "score_cancer": score, "group": rng.integers(0, groups, slices)})
    return seconds(lambda: measure(table, "binary", resamples=resamples))


def heat_map(rounds: int = 15) -> dict[str, float]:
    """Seconds of the forward pass of one slice, and of a heat map from what that leaves."""
    net = VGG16(ModelConfig(), 1, 224, load_weights("oxford")).eval()
    x = torch.rand(1, 1, 224, 224)

    def plain() -> torch.Tensor:
        fine = net.conv5(x)
        net.head(net.features[-1](fine))
        return fine

    with torch.inference_mode():
        fine = plain()
        baseline, output = normal_cam(net, fine), np.zeros(1, int)
        return alternate(rounds, forward=plain, heat=lambda: heat(normalised_cam(net, fine, output, baseline)[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path)
    args = parser.parse_args()
    print(f"bootstrap of all metrics, 1,000 slices x 2,000 resamples  {bootstrap():6.1f} s")
    times = heat_map()
    share = times["heat"] / times["forward"]
    print(f"forward pass of a slice {1e3 * times['forward']:.0f} ms; its heat map {100 * share:.2f} % of that")
    if args.ckpt:
        measuring, writing, slices = whole(args.ckpt)
        print(f"evaluation, {slices} test slices, warm cache {measuring:6.1f} s, and its report {writing:6.1f} s")


if __name__ == "__main__":
    main()
