"""Writes phantoms as ordinary class folders, with the truth about every file in `truth.json`.

The set is drawn under another name and renamed when complete, so that a folder is always whole; each slice's random
stream follows from its index, so that any number of processes writes the same bytes.
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
from chestct.phantom import defects, thorax
from chestct.phantom.defects import File
from chestct.progress import steps

GENERATOR = 4
"""Raised whenever the same settings draw other pictures than before, so that older sets are not taken for these."""

TRUTH = "truth.json"


def write(root: Path, cfg: PhantomConfig, progress: bool = False, processes: int = 2) -> dict[str, Any]:
    """Write a set of phantoms under `root`, unless the same set is there already; returns its truth.

    Layout: `<split>/<subtype>/phantom_00042.png` (or .dcm), 65 % train, 15 % valid, 20 % test, stratified by subtype;
    `masks/<split>/<subtype>/phantom_00042.png`, 1-bit, for every readable file that shows a lesion; `truth.json`, with
    the settings and, for each of `files`, what `_write_file` returns. Raises DataError if `root` holds anything
    else.
    """
    files = defects.plan(_clean_files(cfg), cfg)
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


def _clean_files(cfg: PhantomConfig) -> list[File]:
    """One File a slice: subtypes and splits dealt out at random, each subtype split in the same proportions."""
    rng = np.random.default_rng(np.random.SeedSequence([cfg.seed % 2**32, 0]))
    cancers = int(np.clip(round(cfg.cancer * cfg.slices), 3, cfg.slices - 3))
    subtypes = ["normal"] * (cfg.slices - cancers) + [SUBTYPES[1 + i % 3] for i in range(cancers)]
    order, clean = rng.permutation(cfg.slices), []
    for subtype in SUBTYPES:
        members = [int(i) for i, name in zip(order, subtypes, strict=True) if name == subtype]
        test, valid = max(1, round(0.2 * len(members))), max(1, round(0.15 * len(members)))
        for place, i in enumerate(members):
            split = "test" if place < test else "valid" if place < test + valid else "train"
            path = f"{split}/{subtype}/phantom_{i:05d}{'.dcm' if cfg.format == 'dicom' else '.png'}"
            clean.append(File(path, i, split, subtype, subtype))
    return sorted(clean, key=lambda file: file.index)


def _write_file(folder: Path, cfg: PhantomConfig, file: File) -> dict[str, Any]:
    """Draws and writes one file and its mask; returns its entry in the truth: the fields of `File` and seed, width,
    height, spacing (mm a pixel), window ([centre, width] in HU), readable, and mask (None without a lesion)."""
    seed = [cfg.seed % 2**32, 2, file.index]  # np.random.default_rng(seed) and the subtype draw the phantom again
    sized = dataclasses.replace(cfg, size=round(cfg.size * file.change.get("size", 1.0)))
    phantom = thorax.draw(np.random.default_rng(seed), file.drawn, sized)
    phantom.window = file.change.get("window", phantom.window)
    if border := round(file.change.get("border", 0.0) * min(phantom.hu.shape)):
        inner = phantom.hu[border:-border, border:-border]
        phantom.hu = np.pad(inner, border, constant_values=sum(phantom.window))  # white
    content, mask = defects.encode(phantom, file, f"{cfg.seed}-{file.index:05d}")
    entry = dataclasses.asdict(file) | {"seed": seed, "window": list(phantom.window), "mask": None}
    entry |= {"width": mask.shape[1], "height": mask.shape[0], "readable": file.defect != "odd_files"}
    entry["spacing"] = phantom.spacing / file.change.get("factor", 1.0)
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if entry["readable"] and mask.any():
        entry["mask"] = f"masks/{Path(file.path).with_suffix('.png')}"
        (folder / entry["mask"]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(folder / entry["mask"])
    return entry
