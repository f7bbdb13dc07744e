"""What slices cost in each step as they become more: `python -m benchmarks.scale [--sizes 1000 10000 100000]`.

Each step is the command that people run, on random squares of 32 pixels. From one size to the next, the processor's
time that each further slice takes, all threads together: start-up, which is in every run, is not in it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

INGEST = ("ingest", "experiment=head", "data.name=noise", "data.root=set", "data.size=32")
TRAIN = ("train", *INGEST[1:], "data.views=1", "trainer.max_epochs=1", "trainer.progress=false", "tracking=off")
STEPS = {"ingest": INGEST, "ingest again": INGEST, "train": TRAIN, "train, features cached": TRAIN}
STEPS["evaluate, bundle"] = ("export", "ckpt=last")


def draw(root: Path, n: int) -> None:
    """Slices in class folders: a random thorax of a few blocks, and noise that the two classes differ in."""
    rng = np.random.default_rng(0)
    for i in range(n):
        name = ("normal", "adenocarcinoma")[i % 2]
        (root / name).mkdir(parents=True, exist_ok=True)
        blocks = np.kron(rng.integers(40, 200, (4, 4)), np.ones((8, 8))) + rng.normal(0, 8 + i % 2, (32, 32))
        Image.fromarray(blocks.clip(0, 255).astype(np.uint8)).save(root / name / f"{i:06}.png", compress_level=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 5_000, 10_000])
    earlier, unit = dict.fromkeys(STEPS, (0, 0.0)), 1e9 if sys.platform == "darwin" else 1e6
    for n in sorted(parser.parse_args().sizes):
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder, "set"), n)
            for name, words in STEPS.items():
                command = [sys.executable, "-m", "chestct", *words]
                process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
                _, failed, used = os.wait4(process.pid, 0)
                if failed:
                    sys.exit(f"{n:,} slices: {name} failed, see above.")
                cost, (fewer, before) = used.ru_utime + used.ru_stime, earlier[name]
                further, earlier[name] = 1e3 * (cost - before) / (n - fewer), (n, cost)
                peak = used.ru_maxrss / unit
                print(f"{n:>8,}  {name:24}{cost:8.1f} s{further:9.3f} ms a further slice  peak {peak:.2f} GB")


if __name__ == "__main__":
    main()
