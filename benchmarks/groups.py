"""Time and memory of chestct.data.duplicates against the number of slices: `python -m benchmarks.groups`.

The slices share one anatomy, bent by a smooth random field and strewn with vessels, so that lists of candidates are as
full as on real slices; every tenth is a shifted, zoomed and re-windowed copy of the one before it.
"""

import argparse
import math
import time
import tracemalloc

import numpy as np
from scipy.ndimage import map_coordinates

from chestct.data.duplicates import find_pairs, group
from chestct.imaging.preprocess import THUMBNAIL

DRAWN = 2 * THUMBNAIL
"""Side at which slices are drawn; they are compared at half of that."""


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


def thumbnails(n: int) -> np.ndarray:
    """uint8 [n, THUMBNAIL, THUMBNAIL]."""
    thumbs = np.empty((n, THUMBNAIL, THUMBNAIL), np.uint8)
    image = np.zeros((DRAWN, DRAWN))
    for i in range(n):
        rng = np.random.default_rng([1, i])
        image = near_copy(image, rng) if i % 10 == 9 else draw(rng)
        thumbs[i] = np.rint(255 * image.reshape(THUMBNAIL, 2, THUMBNAIL, 2).mean((1, 3)))
    return thumbs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    for n in parser.parse_args().sizes:
        thumbs = thumbnails(n)
        content = [str(i) for i in range(n)]
        tracemalloc.start()
        start = time.perf_counter()
        groups = group(n, find_pairs(thumbs, content))
        seconds = time.perf_counter() - start
        gigabytes = tracemalloc.get_traced_memory()[1] / 1e9
        tracemalloc.stop()
        print(f"{n:>9,} slices  {seconds:6.0f} s  peak {gigabytes:.2f} GB  {len(set(groups)):,} groups")


if __name__ == "__main__":
    main()
