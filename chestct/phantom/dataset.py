"""Writes phantoms as ordinary class folders, with the truth about every file in `truth.json`.

The set is drawn under another name and renamed when complete, so that a folder with a `truth.json` is always whole;
each slice's random stream follows from its index, so that any number of processes writes the same bytes.
"""

import dataclasses
import json
import multiprocessing
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from rich.progress import track

from chestct.config.schema import SUBTYPES, PhantomConfig
from chestct.errors import DataError
from chestct.imaging.slice_files import why_skipped
from chestct.phantom import defects, encode, thorax
from chestct.phantom.defects import File

GENERATOR = 3
"""Raised whenever the same settings draw other pictures than before, so that older sets are drawn anew."""

TRUTH = "truth.json"


def write(root: Path, cfg: PhantomConfig, progress: bool = False, processes: int = 2) -> dict[str, Any]:
    """Write a set of phantoms under `root`, unless the same set is there already; returns its truth.

    Layout: `<split>/<subtype>/phantom_00042.png` (or .dcm), 65 % train, 15 % valid, 20 % test, stratified by subtype;
    `masks/<split>/<subtype>/phantom_00042.png`, 1-bit, for every readable file that shows a lesion; `truth.json`.
    The truth: {"settings": ..., "generator": ..., "files": [one dict a file]}; a file's dict has path, split, subtype
    (its folder) and drawn (what it shows), index and seed of its phantom, width, height, spacing (mm a pixel), window
    ([centre, width] in HU), lesion (None, or box [x0, y0, x1, y1), center and area in pixels of the file), mask,
    readable, and, where planted, defect, original, operation and parameters.
    Raises ConfigError for an unknown defect, DataError if `root` holds something that is not a phantom set.
    """
    root = Path(root)
    defects.check(cfg)
    if known := _complete(root, cfg):
        return known
    if root.exists() and not (root / TRUTH).is_file() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(f"{root} holds something other than phantoms. Move it away, or draw into another folder.")
    if foreign := [path for path in root.rglob("*") if path.is_file() and not _own(path)]:  # drawing anew removes all
        raise DataError(
            f"{root} holds files that are no phantoms, {foreign[0]} first. Move them away before it is redrawn."
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f".{root.name}.lock")):
        if known := _complete(root, cfg):  # drawn by another process while this one waited
            return known
        for left in root.parent.glob(f".{root.name}-*.partial"):  # by a killed process: it would hold the lock
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{root.name}-", suffix=".partial", dir=root.parent))
        try:
            (work / "new").mkdir()
            drawn = _write_files(work / "new", cfg, progress, processes)
            truth = {"settings": dataclasses.asdict(cfg), "generator": GENERATOR, "files": drawn}
            (work / "new" / TRUTH).write_text(json.dumps(truth, indent=1), encoding="utf-8")
            if root.exists():
                root.rename(work / "old")
            (work / "new").rename(root)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return truth


def read_truth(root: Path) -> dict[str, Any] | None:
    """The truth of a phantom set, or None where there is none that can be read."""
    try:
        truth = json.loads((root / TRUTH).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return truth if isinstance(truth, dict) and {"settings", "generator", "files"} <= truth.keys() else None


def _own(path: Path) -> bool:
    """Whether a file of a set is one that `write` put there, or that an operating system leaves anywhere."""
    return path.name == TRUTH or path.name.startswith("phantom_") or bool(why_skipped(path.name))


def _complete(root: Path, cfg: PhantomConfig) -> dict[str, Any] | None:
    """The truth of the set at `root` if these settings draw it and every file that it names is there."""
    truth = read_truth(root)
    if truth is None or (truth["settings"], truth["generator"]) != (dataclasses.asdict(cfg), GENERATOR):
        return None
    names = [file[key] for file in truth["files"] for key in ("path", "mask") if file[key]]
    return truth if all((root / name).is_file() for name in names) else None


def _write_files(work: Path, cfg: PhantomConfig, progress: bool, processes: int) -> list[dict[str, Any]]:
    """Write every file and return its entry in the truth, in order."""
    todo = defects.plan(_clean_files(cfg), cfg)
    for folder in {(work / file.path).parent for file in todo}:
        folder.mkdir(parents=True)
    write_one = partial(_write_file, work, cfg)
    if processes <= 1 or len(todo) < 64 or multiprocessing.current_process().daemon:
        return list(track(map(write_one, todo), "Drawing phantoms", len(todo), disable=not progress))
    # Spawned, not forked: a fork of a process whose threads hold locks (torch, MLflow) can hang.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        drawn = pool.map(write_one, todo, chunksize=8)
        return list(track(drawn, "Drawing phantoms", len(todo), disable=not progress))


def _clean_files(cfg: PhantomConfig) -> list[File]:
    """One File a slice: subtypes and splits dealt out at random, each subtype split in the same proportions."""
    rng = np.random.default_rng(np.random.SeedSequence([cfg.seed % 2**32, 0]))
    cancers = int(np.clip(round(cfg.cancer * cfg.slices), 3, cfg.slices - 3))
    subtypes = ["normal"] * (cfg.slices - cancers) + [SUBTYPES[1 + i % 3] for i in range(cancers)]
    order = rng.permutation(cfg.slices)
    clean: dict[int, File] = {}
    suffix = ".dcm" if cfg.format == "dicom" else ".png"
    for subtype in SUBTYPES:
        members = [int(i) for i, name in zip(order, subtypes, strict=True) if name == subtype]
        test, valid = max(1, round(0.2 * len(members))), max(1, round(0.15 * len(members)))
        for place, i in enumerate(members):
            split = "test" if place < test else "valid" if place < test + valid else "train"
            clean[i] = File(f"{split}/{subtype}/phantom_{i:05d}{suffix}", i, split, subtype, subtype)
    return [clean[i] for i in range(cfg.slices)]


def _draw_file(file: File, seed: list[int], cfg: PhantomConfig) -> thorax.Phantom:
    """The phantom that a file shows, before any change that a copy or an odd file makes."""
    sized = dataclasses.replace(cfg, size=max(32, round(cfg.size * file.size_factor)))
    phantom = thorax.draw(np.random.default_rng(seed), file.drawn, sized)
    phantom.window = file.window or phantom.window
    if file.border:
        frame = max(1, round(file.border * min(phantom.hu.shape)))
        inner = phantom.hu[frame:-frame, frame:-frame]
        phantom.hu = np.pad(inner, frame, constant_values=sum(phantom.window))  # white
    return phantom


def _write_file(work: Path, cfg: PhantomConfig, file: File) -> dict[str, Any]:
    """Draw and write one file and its mask; returns its entry in the truth."""
    seed = [cfg.seed % 2**32, 2, file.index]  # np.random.default_rng(seed) and the subtype draw the phantom again
    phantom = _draw_file(file, seed, cfg)
    path, mask = work / file.path, phantom.mask
    if file.defect == "near":
        grey, mask = defects.near_copy(phantom, file)
        path.write_bytes(defects.encode_near(grey, file.parameters.get("quality")))
    elif file.defect == "odd_files":
        path.write_bytes(defects.encode_odd(thorax.display(phantom.hu, phantom.window), str(file.operation)))
    elif path.suffix == ".dcm":
        # A copy is a copy of the bytes, so it keeps the identity of its original.
        encode.write_dicom(path, phantom, f"{cfg.seed}-{file.index:05d}")
    else:
        encode.write_png(path, phantom)
    mask_name = f"masks/{Path(file.path).with_suffix('.png')}" if file.readable and mask.any() else None
    if mask_name:
        encode.write_mask(work / mask_name, mask)
    return dataclasses.asdict(file) | {
        "seed": seed,
        "window": list(phantom.window),
        "width": mask.shape[1],
        "height": mask.shape[0],
        "spacing": phantom.spacing / file.parameters.get("factor", 1.0),
        "level": phantom.level,
        "lesion": _describe(mask) if mask_name else None,
        "mask": mask_name,
    }


def _describe(mask: np.ndarray) -> dict[str, Any]:
    """Bounding box [x0, y0, x1, y1), centre of mass (x, y) and area of a mask, bool [H, W], in pixels."""
    rows, columns = np.nonzero(mask)
    return {
        "box": [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1],
        "center": [float(columns.mean()), float(rows.mean())],
        "area": len(rows),
    }
