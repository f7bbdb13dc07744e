"""Writes phantoms as ordinary class folders, with the truth about every file in `truth.json`.

Everything is planned before anything is drawn, and each `File` of the plan says alone what is drawn, so that any number
of processes writes the same bytes. The set is drawn under another name and renamed when complete, so that a folder is
always whole.
"""

import dataclasses
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image

from chestct.config.schema import SUBTYPES, PhantomConfig
from chestct.errors import DataError
from chestct.phantom import thorax
from chestct.progress import steps

GENERATOR = 4
"""Raised whenever the same settings draw other pictures than before, so that older sets are not taken for these."""

TRUTH = "truth.json"


@dataclasses.dataclass(frozen=True)
class File:
    """One file of the set: phantom number `index`, which lies in the class folder of its subtype."""

    path: str
    index: int
    split: str
    subtype: str


def write(root: Path, cfg: PhantomConfig, progress: bool = False, processes: int = 2) -> dict[str, Any]:
    """Write a set of phantoms under `root`, unless the same set is there already; returns its truth.

    Layout: `<split>/<subtype>/phantom_00042.png`, 65 % train, 15 % valid, 20 % test, stratified by subtype;
    `masks/<split>/<subtype>/phantom_00042.png`, 1-bit, for every file that shows a lesion; `truth.json`, with the
    settings and, for each of `files`, the fields of `File` and `mask`. Raises DataError if `root` holds anything else.
    """
    files = plan(cfg)
    settings = {"settings": dataclasses.asdict(cfg), "generator": GENERATOR}
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f".{root.name}.lock")):
        if root.is_file() or (root.is_dir() and any(root.iterdir())):
            truth = read_truth(root)
            if truth and truth | settings == truth and all((root / file.path).is_file() for file in files):
                return truth
            raise DataError(f"{root} holds something other than these phantoms. Remove it, or draw into another.")
        part = root.with_name(f".{root.name}.partial")
        shutil.rmtree(part, ignore_errors=True)  # left by a killed process: it would hold the lock
        # Spawned, not forked: a fork of a process whose threads hold locks (torch, MLflow) can hang.
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            spread = partial(pool.map, chunksize=8) if processes > 1 and len(files) >= 64 else map
            drawn = spread(partial(_write_file, part, cfg), files)
            entries = list(steps(drawn, "Drawing phantoms", len(files), progress))
        truth = settings | {"files": entries}
        (part / TRUTH).write_text(json.dumps(truth, indent=1), encoding="utf-8")
        part.rename(root)
    return truth


def read_truth(root: Path) -> dict[str, Any] | None:
    """The truth of a phantom set, or None where there is none that can be read."""
    try:
        truth = json.loads((root / TRUTH).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return truth if isinstance(truth, dict) and {"settings", "generator", "files"} <= truth.keys() else None


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
            files.append(File(f"{split}/{subtype}/phantom_{i:05d}.png", i, split, subtype))
    return sorted(files, key=lambda file: file.index)


def _write_file(folder: Path, cfg: PhantomConfig, file: File) -> dict[str, Any]:
    """Draws and writes one file and its mask; returns its entry in the truth: `mask` is None without a lesion."""
    phantom = thorax.draw(np.random.default_rng([cfg.seed % 2**32, 2, file.index]), file.subtype, cfg)
    entry = dataclasses.asdict(file) | {"mask": f"masks/{file.path}" if phantom.mask.any() else None}
    path, mask = folder / file.path, folder / "masks" / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Noise hardly compresses: level 1 takes a third of the default's time for an eighth more bytes.
    Image.fromarray(thorax.display(phantom.hu, phantom.window)).save(path, compress_level=1)
    if entry["mask"]:
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(phantom.mask).save(mask)
    return entry
