"""What a slice costs in each stage as slices become more: `python -m benchmarks.scale [--sizes 1000 10000 100000]`.

Random squares of 32 pixels as PNG files, whose features are drawn, not computed: convolutions cost the same for every
slice. Seconds are those of the processor, all threads together; each size has a process of its own, whose largest
memory so far stands in the second column. Compare sizes of one run.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from chestct.config.compose import compose
from chestct.data.datamodule import SliceModule
from chestct.evaluation.evaluate import evaluate
from chestct.evaluation.export import export
from chestct.models.features import Kept, extract, space_folder
from chestct.models.weights import load_weights
from chestct.reporting.render import model_card, write
from chestct.training import train

SETTINGS = ("experiment=head", "data.name=noise", "data.size=32", "data.views=1", "trainer.max_epochs=1")
SETTINGS += ("trainer.progress=false", "tracking=off", "trainer.accelerator=cpu", "data.workers=0")


def draw(root: Path, n: int) -> None:
    """Slices in class folders: a random thorax of a few blocks, and noise that the two classes differ in."""
    rng = np.random.default_rng(0)
    for i in range(n):
        name = ("normal", "adenocarcinoma")[i % 2]
        (root / name).mkdir(parents=True, exist_ok=True)
        blocks = np.kron(rng.integers(40, 200, (4, 4)), np.ones((8, 8))) + rng.normal(0, 8 + i % 2, (32, 32))
        Image.fromarray(blocks.clip(0, 255).astype(np.uint8)).save(root / name / f"{i:06}.png", compress_level=1)


def measured(n: int, root: Path) -> dict[str, tuple[float, float]]:
    """CPU seconds of each stage on n slices, and the largest memory so far in GB."""
    draw(root / "set", n)
    cfg = compose(*SETTINGS, f"data.root={root}/set", f"cache_dir={root}/cache")
    figures, unit = {}, 1e9 if sys.platform == "darwin" else 1e6

    def stage(name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        figures[name] = (time.process_time() - start, peak)
        return result

    def features() -> None:
        weights = load_weights(cfg.model.weights, cfg.model.backbone).digest
        for view, split in ((0, "train"), (1, "train"), (0, "valid"), (0, "test")):
            dataset = data.dataset(split, train=split == "train")
            noise = torch.Generator().manual_seed(view)
            layer = lambda x: torch.rand(len(x), 512, generator=noise)  # noqa: B023, E731
            kept = Kept(layer, dataset.drawn_contents(view), space_folder(cfg, weights, view))
            extract([kept], lambda at: [torch.empty(len(at), 1)], torch.device("cpu"), batch_size=64)

    data = SliceModule(cfg)
    stage("ingest, groups", data.prepare_data)
    stage("ingest again", SliceModule(cfg).prepare_data)
    stage("splits", data.setup)
    stage("write features", features)
    run = stage("load, an epoch", lambda: train(cfg, root / "run"))
    cfg = replace(cfg, ckpt=str(run.best))
    found = stage("audit, evaluate", lambda: evaluate(cfg))
    stage("report", lambda: write(found, root / "run" / "evaluation"))
    stage("bundle", lambda: export(found, root / "run" / "bundle", model_card(found)))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measured(given.alone, Path(folder))))
        return
    first: dict[str, float] = {}
    for n in given.sizes:
        own = subprocess.run([sys.executable, "-m", "benchmarks.scale", f"--alone={n}"], capture_output=True, text=True)
        if own.returncode:
            sys.exit(own.stderr)
        for name, (seconds, peak) in json.loads(own.stdout.splitlines()[-1]).items():
            ratio = seconds / n / first.setdefault(name, seconds / n)
            print(f"{n:>8,}  {name:16} {1e3 * seconds / n:8.3f} ms a slice  x {ratio:5.2f}  peak {peak:.2f} GB")


if __name__ == "__main__":
    main()
