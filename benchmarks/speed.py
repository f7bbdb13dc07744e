"""How fast the frozen path is, as ratios within one run: memory format, features, training with and without the cache.

    python -m benchmarks.speed [--slices 64]

Prints a table; absolute figures are this machine's, ratios are worth comparing.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from chestct.config.compose import compose
from chestct.config.schema import ModelConfig, PhantomConfig
from chestct.models.vgg16 import VGG16
from chestct.models.weights import load_weights
from chestct.phantom.dataset import write
from chestct.training import train


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(rounds: int, **works: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each piece of work, run in turns so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    return {name: statistics.median(values) for name, values in times.items()}


def forward(batch: int) -> dict[str, float]:
    """Milliseconds a slice of the convolutions at 224 pixels, in both memory formats."""
    net = VGG16(ModelConfig(), 1, 224, load_weights("oxford")).eval()
    x = torch.rand(batch, 1, 224, 224)
    rgb = ((x - net.mean) * net.scale).contiguous()

    def run(format_: torch.memory_format) -> Callable[[], object]:
        layers = VGG16(ModelConfig(), 1, 224, load_weights("oxford")).features.to(memory_format=format_).eval()
        return lambda: layers(rgb.contiguous(memory_format=format_))

    with torch.inference_mode():
        found = alternate(5, nchw=run(torch.contiguous_format), channels_last=run(torch.channels_last))
    return {name: value / batch * 1e3 for name, value in found.items()}


def training(slices: int) -> dict[str, float]:
    """Seconds of 20 epochs on frozen convolutions: every step through them, cached from cold, cached and warm."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root / "set", PhantomConfig(slices=slices))
        settings = (
            f"data.root={root}/set",
            f"cache_dir={root}/cache",
            "data.views=0",
            "trainer.max_epochs=20",
            "trainer.patience=0",
            "trainer.progress=false",
            "tracking=off",
        )
        train(compose(*settings, "trainer.max_epochs=1", "features.cache=false"), root / "first")  # store and audit
        return {
            "every step": seconds(lambda: train(compose(*settings, "features.cache=false"), root / "a")),
            "cold cache": seconds(lambda: train(compose(*settings), root / "b")),
            "warm cache": seconds(lambda: train(compose(*settings), root / "c")),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    formats = forward(args.batch)
    print(f"convolutions, batch {args.batch}, {torch.get_num_threads()} threads")
    for name, value in formats.items():
        print(f"  {name:14}{value:8.1f} ms a slice   {value / formats['nchw']:.2f} of NCHW")
    times = training(args.slices)
    print(f"20 epochs of the head on {args.slices} phantoms")
    for name, value in times.items():
        print(f"  {name:14}{value:8.1f} s            {value / times['every step']:.3f} of running every step")


if __name__ == "__main__":
    main()
