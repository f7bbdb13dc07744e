"""Time and memory of chestct.data.groups against the number of slices: `python benchmarks/groups.py [--sizes ...]`.

Slices are drawn at low resolution and enlarged, so that a hundred thousand cost a minute: one anatomy (body, lungs,
heart, spine), bent by a smooth random field and strewn with vessels, so that lists of candidates are as full as on
real slices. A tenth are shifted, zoomed and re-windowed copies, whose recovery is reported; `--same` makes all slices
noisy copies of one image, the worst case. Each size runs in a process of its own for its peak memory.
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
from scipy.ndimage import map_coordinates
from rich.console import Console
from rich.table import Table

from chestct.data.groups import find_pairs, group

DRAWN, SIDE = 112, 224
COPIES = 0.1


def anatomy(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Grey levels in [0, 1] of a plain thorax over coordinates in [-1, 1]."""
    lungs = np.minimum(((x - 0.4) / 0.28) ** 2, ((x + 0.4) / 0.28) ** 2) + ((y + 0.05) / 0.42) ** 2
    spine = ((x / 0.12) ** 2 + ((y - 0.4) / 0.12) ** 2) < 1
    image = np.where((x / 0.9) ** 2 + (y / 0.66) ** 2 < 1, 0.65, 0.05)
    return np.where(spine, 0.95, np.where(lungs < 1, 0.2, image))


def draw(rng: np.random.Generator) -> np.ndarray:
    """One random slice: float [DRAWN, DRAWN] in [0, 1]."""
    y, x = np.mgrid[:DRAWN, :DRAWN] / (DRAWN / 2) - 1
    coarse = np.linspace(0, 5, DRAWN)
    at = np.stack(np.meshgrid(coarse, coarse, indexing="ij"))
    bend_y, bend_x = (map_coordinates(rng.normal(0, 0.07, (6, 6)), at, order=3) for _ in range(2))
    scale_y, scale_x = rng.uniform(0.85, 1.1, 2)
    image = anatomy((y + bend_y) / scale_y, (x + bend_x) / scale_x)
    for row, column, size in zip(*rng.uniform(-0.6, 0.6, (2, 60)), rng.gamma(2, 0.012, 60), strict=True):
        low, high = (np.array([row, column]) - 3 * size + 1) * DRAWN / 2, (np.array([row, column]) + 3 * size + 1) * DRAWN / 2
        box = tuple(slice(max(0, int(a)), int(b) + 1) for a, b in zip(low, high, strict=True))
        image[box] += 0.5 * np.exp(-((y[box] - row) ** 2 + (x[box] - column) ** 2) / (2 * size**2))
    return np.clip(image, 0, 1)


def near_copy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shifted and zoomed by up to 5 %, gamma and noise."""
    at = np.mgrid[:DRAWN, :DRAWN] - DRAWN / 2
    at = at * rng.uniform(0.95, 1.05) + rng.uniform(-0.05, 0.05, (2, 1, 1)) * DRAWN + DRAWN / 2
    moved = map_coordinates(image, at, order=1, mode="constant")
    return np.clip(moved ** math.exp(rng.uniform(-0.4, 0.4)) + rng.normal(0, 0.01, image.shape), 0, 1)


def write(path: Path, n: int, same: bool) -> list[tuple[int, int]]:
    """Writes n slices as uint8 [n, SIDE, SIDE]; returns the planted pairs of copies."""
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(n, SIDE, SIDE))
    originals = n - int(n * COPIES)
    first = draw(np.random.default_rng(0))
    recent: list[np.ndarray] = []
    planted = []
    for i in range(n):
        rng = np.random.default_rng([1, i])
        if same:
            image = np.clip(first + rng.normal(0, 0.01, first.shape), 0, 1)
        elif i % 10 == 9 and i:
            image = near_copy(recent[-1], rng)
            planted.append((i - 1, i))
        else:
            image = draw(rng)
        recent = [image]
        images[i] = np.repeat(np.repeat(np.rint(image * 255).astype(np.uint8), 2, 0), 2, 1)
    images.flush()
    return planted
