"""Time and memory of chestct.data.groups against the number of slices: `python benchmarks/groups.py`.

The slices share one anatomy, bent by a smooth random field and strewn with vessels, so that lists of candidates are as
full as on real slices. Every tenth is a shifted, zoomed and re-windowed copy of the one before it; how many of those
are found is reported too. `--same` makes all slices noisy copies of one image, the worst case. Each size runs in a
process of its own, whose peak memory is then its own.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.ndimage import map_coordinates

from chestct.data.groups import find_pairs, group

DRAWN = 112
"""Side at which slices are drawn; they are written at twice that, the store's usual 224."""


def draw(rng: np.random.Generator) -> np.ndarray:
    """One random slice: float [DRAWN, DRAWN] in [0, 1]."""
    axis = np.arange(DRAWN) / (DRAWN / 2) - 1
    knots = np.linspace(-1, 1, 6)
    smooth = np.exp(-(((axis[:, None] - knots) / 0.35) ** 2))
    bend_y, bend_x = smooth @ rng.normal(0, 0.02, (2, 6, 6)) @ smooth.T
    scale_y, scale_x = rng.uniform(0.9, 1.1, 2)
    y, x = (axis[:, None] + bend_y) / scale_y, (axis + bend_x) / scale_x
    lungs = ((np.abs(x) - 0.4) / 0.28) ** 2 + ((y + 0.05) / 0.42) ** 2
    spine = (x / 0.12) ** 2 + ((y - 0.4) / 0.12) ** 2
    body = (x / 0.9) ** 2 + (y / 0.66) ** 2
    image = np.where(spine < 1, 0.95, np.where(lungs < 1, 0.2, np.where(body < 1, 0.65, 0.05)))
    size = 0.01 + rng.gamma(2, 0.012, 60)
    rows, columns = (np.exp(-(((axis[:, None] - at) / size) ** 2)) for at in rng.uniform(-0.6, 0.6, (2, 60)))
    return np.clip(image + np.where(lungs < 1, 0.6, 0.1) * (rows @ columns.T), 0, 1)


def near_copy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shifted and zoomed by up to 5 %, another gamma, noise."""
    middle = (DRAWN - 1) / 2
    at = (np.mgrid[:DRAWN, :DRAWN] - middle) * rng.uniform(0.95, 1.05) + middle
    moved = map_coordinates(image, at + rng.uniform(-0.05, 0.05, (2, 1, 1)) * DRAWN, order=1)
    return np.clip(moved ** math.exp(rng.uniform(-0.4, 0.4)) + rng.normal(0, 0.01, image.shape), 0, 1)


def write(path: Path, n: int, same: bool) -> np.ndarray:
    """Writes n slices as uint8 [n, 224, 224] and returns them memory-mapped."""
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(n, 2 * DRAWN, 2 * DRAWN))
    image = draw(np.random.default_rng(0))
    for i in range(n):
        rng = np.random.default_rng([1, i])
        if same:
            drawn = np.clip(image + rng.normal(0, 0.02, image.shape), 0, 1)
        else:
            drawn = image = near_copy(image, rng) if i % 10 == 9 else draw(rng)
        images[i] = np.rint(drawn * 255).astype(np.uint8).repeat(2, 0).repeat(2, 1)
    images.flush()
    return np.load(path, mmap_mode="r")


def measure(n: int, same: bool) -> dict[str, float]:
    """Seconds, peak memory and what was found for n slices; to be run in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        images = write(Path(folder) / "images.npy", n, same)
        content = [np.random.default_rng([2, i]).bytes(8).hex() for i in range(n)]
        start = time.perf_counter()
        pairs = find_pairs(images, content)
        groups = group(n, pairs)
        seconds = time.perf_counter() - start
    copies = np.arange(9, n, 10)
    planted = len(pairs) if same else len(copies)
    right = n - 1 if same else int(((pairs["b"] - pairs["a"] == 1) & (pairs["b"] % 10 == 9)).sum())
    return {
        "slices": n,
        "seconds": seconds,
        # Includes the pages of the memory-mapped images, which the system takes back when it needs them.
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "recall": float((groups[copies] == groups[copies - 1]).mean()),
        "precision": 1.0 if same else right / max(1, len(pairs)),
        "largest": int(np.bincount(groups).max()),
        "planted": planted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--same", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.same)))
        return
    table = Table("slices", "seconds", "peak GB", "recall", "precision", "largest group", "growth exponent")
    previous = None
    for n in arguments.sizes:
        command = [sys.executable, __file__, "--one", str(n), *(["--same"] if arguments.same else [])]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        growth = "" if previous is None else math.log(row["seconds"] / previous["seconds"]) / math.log(n / previous["slices"])
        table.add_row(
            f"{n:,}", f"{row['seconds']:.1f}", f"{row['gigabytes']:.2f}", f"{row['recall']:.4f}",
            f"{row['precision']:.4f}", str(row["largest"]), f"{growth:.2f}" if growth else "",
        )
        previous = row
    Console().print(table)


if __name__ == "__main__":
    main()
