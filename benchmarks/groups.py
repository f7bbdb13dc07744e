"""Time and memory of chestct.data.duplicates against the number of slices: `python -m benchmarks.groups`.

The slices share one anatomy, bent by a smooth random field and strewn with vessels, so that lists of candidates are as
full as on real slices. Every tenth is a shifted, zoomed and re-windowed copy of the one before it; how many of those
are found is reported too. `--same` makes all slices noisy copies of one image, the worst case.
"""

import argparse
import math
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.ndimage import map_coordinates

from chestct.data.duplicates import find_pairs, group
from chestct.imaging.preprocess import THUMBNAIL

DRAWN = 112
"""Side at which slices are drawn; they are compared at half of that."""

DIGITS = {"seconds": 0, "cpu": 0, "gigabytes": 2, "recall": 4, "precision": 4}


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
    """Writes the thumbnails of n slices, uint8 [n, 56, 56], and returns them memory-mapped."""
    thumbs = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(n, THUMBNAIL, THUMBNAIL))
    image = draw(np.random.default_rng(0))
    for i in range(n):
        rng = np.random.default_rng([1, i])
        if same:
            drawn = np.clip(image + rng.normal(0, 0.02, image.shape), 0, 1)
        else:
            drawn = image = near_copy(image, rng) if i % 10 == 9 else draw(rng)
        thumbs[i] = np.rint(255 * drawn.reshape(THUMBNAIL, 2, THUMBNAIL, 2).mean((1, 3)))
    thumbs.flush()
    return np.load(path, mmap_mode="r")


def measure(n: int, same: bool) -> dict[str, float]:
    """Seconds, peak memory and what was found among n slices."""
    with tempfile.TemporaryDirectory() as folder:
        thumbs = write(Path(folder) / "thumbs.npy", n, same)
        content = [np.random.default_rng([2, i]).bytes(8).hex() for i in range(n)]
        tracemalloc.start()  # the arrays; pages of the memory-mapped thumbnails belong to the system
        start, start_cpu = time.perf_counter(), time.process_time()
        pairs = find_pairs(thumbs, content)
        groups = group(n, pairs)
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        gigabytes = tracemalloc.get_traced_memory()[1] / 1e9
        tracemalloc.stop()
    copies = np.arange(9, n, 10)
    planted = (pairs["b"] - pairs["a"] == 1) & (pairs["b"] % 10 == 9) | same
    return {
        "slices": n,
        "seconds": seconds,
        "cpu": cpu,
        "gigabytes": gigabytes,
        "recall": float((groups[copies] == groups[copies - 1]).mean()),
        "precision": float(planted.mean()),
        "largest": int(np.bincount(groups).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--same", action="store_true")
    arguments = parser.parse_args()
    table = Table("slices", "seconds", "CPU seconds", "peak GB", "recall", "precision", "largest group", "growth")
    before = None
    for n in arguments.sizes:
        row = measure(n, arguments.same)
        # The exponent e in CPU time ~ slices ** e, from one size to the next.
        growth = math.log(row["cpu"] / before["cpu"]) / math.log(n / before["slices"]) if before else math.nan
        cells = [f"{row[key]:.{digits}f}" for key, digits in DIGITS.items()]
        table.add_row(f"{n:,}", *cells, str(row["largest"]), f"{growth:.2f}")
        before = row
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
