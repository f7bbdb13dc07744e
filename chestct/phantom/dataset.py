"""Writes phantoms as ordinary class folders, and a mask for each that shows a lesion.

Everything is planned before anything is drawn, and each `File` of the plan says alone what is drawn, so that any number
of processes writes the same bytes. The set is drawn under another name and renamed when complete, so that a folder is
always whole.
"""

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image

from chestct.config.schema import SUBTYPES, PhantomConfig
from chestct.errors import DataError
from chestct.phantom import thorax
from chestct.progress import steps

GENERATOR = 4
"""Raised whenever the same settings draw other pictures than before, so that older sets are not taken for these."""


class File(NamedTuple):
    """One file of the set: phantom `number`, which lies in the class folder of its subtype."""

    path: str
    number: int
    subtype: str


def write(root: Path, cfg: PhantomConfig, progress: bool = False, processes: int = 2) -> None:
    """Write a set of phantoms under `root`, unless that is there already: other settings need another folder.

    Layout: `<split>/<subtype>/phantom_00042.png`, 65 % train, 15 % valid, 20 % test, stratified by subtype;
    `masks/<split>/<subtype>/phantom_00042.png`, 1-bit, for every file that shows a lesion. Raises DataError where some
    are missing from `root`.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f".{root.name}.lock")):
        files = plan(cfg)
        if root.exists():
            if all((root / file.path).is_file() for file in files):
                return
            raise DataError(f"Phantoms are missing from {root}. Remove that, and they are drawn again.")
        part = root.with_name(f".{root.name}.partial")
        shutil.rmtree(part, ignore_errors=True)  # left by a killed process: it would hold the lock
        # Spawned, not forked: a fork of a process whose threads hold locks (torch, MLflow) can hang.
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            spread = partial(pool.map, chunksize=8) if processes > 1 and len(files) >= 64 else map
            list(steps(spread(partial(_write_file, part, cfg), files), "Drawing phantoms", len(files), progress))
        part.rename(root)


def plan(cfg: PhantomConfig) -> list[File]:
    """One file a slice in order of index: subtypes and splits dealt out at random, each subtype split alike."""
    rng = np.random.default_rng(np.random.SeedSequence([cfg.seed % 2**32, 0]))
    cancers = int(np.clip(round(cfg.cancer * cfg.slices), 3, cfg.slices - 3))
    subtypes = ["normal"] * (cfg.slices - cancers) + [SUBTYPES[1 + i % 3] for i in range(cancers)]
    order, files = rng.permutation(cfg.slices), []
    for subtype in SUBTYPES:
        members = [int(i) for i, name in zip(order, subtypes, strict=True) if name == subtype]
        test, valid = max(1, round(0.2 * len(members))), max(1, round(0.15 * len(members)))
        for place, i in enumerate(members):
            split = "test" if place < test else "valid" if place < test + valid else "train"
            files.append(File(f"{split}/{subtype}/phantom_{i:05d}.png", i, subtype))
    return sorted(files, key=lambda file: file.number)


def _write_file(folder: Path, cfg: PhantomConfig, file: File) -> None:
    """Draws and writes one file, and its mask where there is a lesion."""
    phantom = thorax.draw(np.random.default_rng([cfg.seed % 2**32, 2, file.number]), file.subtype, cfg)
    path, mask = folder / file.path, folder / "masks" / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Noise hardly compresses: level 1 takes a third of the default's time for an eighth more bytes.
    Image.fromarray(thorax.display(phantom.hu, phantom.window)).save(path, compress_level=1)
    if phantom.mask.any():
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(phantom.mask).save(mask)
