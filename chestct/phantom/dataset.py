"""Writes phantoms as ordinary class folders, with the truth about every file in `truth.json`.

Everything is planned before anything is drawn: each `File` of a plan says alone how it is made from a phantom's index,
so that any number of processes writes the same bytes, and the plan is the truth, also about faults that are planted on
request. The set is drawn under another name and renamed when complete, so that a folder is always whole.
"""

import dataclasses
import io
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

from chestct.config.schema import COPIES, SUBTYPES, PhantomConfig
from chestct.errors import DataError
from chestct.phantom import thorax
from chestct.progress import steps

GENERATOR = 4
"""Raised whenever the same settings draw other pictures than before, so that older sets are not taken for these."""

TRUTH = "truth.json"
SPLITS = ("train", "valid", "test")
COPIED = 0.05  # share of the slices that get a copy for each copying defect
EDGES = ("left", "top", "right", "bottom")

NEAR: dict[str, dict[str, tuple[float, float]]] = {
    "encoding": {},
    "size": {"factor": (0.6, 1.4)},
    "brightness": {"gain": (0.85, 1.15), "offset": (-0.06, 0.06)},
    "crop": dict.fromkeys(EDGES, (0.01, 0.05)),
}
"""What a near copy may change, beside being saved as JPEG, and the ranges of the parameters."""


@dataclasses.dataclass(frozen=True)
class File:
    """One file of the set: where it goes and how it is made from phantom number `index`, drawn as `drawn`.

    subtype: the class folder, which a label conflict makes differ from `drawn`; original: path of the file that this
    one copies; change: what a near copy or a shortcut does to the picture.
    """

    path: str
    index: int
    split: str
    subtype: str
    drawn: str
    defect: str | None = None
    original: str | None = None
    change: dict[str, Any] = dataclasses.field(default_factory=dict)


def write(root: Path, cfg: PhantomConfig, progress: bool = False, processes: int = 2) -> dict[str, Any]:
    """Write a set of phantoms under `root`, unless the same set is there already; returns its truth.

    Layout: `<split>/<subtype>/phantom_00042.png`, 65 % train, 15 % valid, 20 % test, stratified by subtype;
    `masks/<split>/<subtype>/phantom_00042.png`, 1-bit, for every readable file that shows a lesion; `truth.json`, with
    the settings and, for each of `files`, the fields of `File` and `mask`. Raises DataError if `root` holds anything
    else.
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
    """One file a slice in order of index, and after them those that the defects of cfg add."""
    rng = np.random.default_rng(np.random.SeedSequence([cfg.seed % 2**32, 1]))
    clean = _clean_files(cfg)
    if "shortcut_window" in cfg.defects:
        clean = [dataclasses.replace(file, change={"window": _telling_window(file, rng)}) for file in clean]
    files = list(clean)
    for defect in (defect for defect in COPIES if defect in cfg.defects):
        for i in rng.choice(len(clean), max(1, round(COPIED * len(clean))), replace=False):
            files.append(_copy_of(clean[i], len(files), rng, defect))
    if "odd_files" in cfg.defects:
        for split, subtype in zip(SPLITS, SUBTYPES, strict=False):
            path = f"{split}/{subtype}/phantom_{len(files):05d}.png"
            files.append(File(path, len(files), split, subtype, subtype, "odd_files"))
    return files


def _clean_files(cfg: PhantomConfig) -> list[File]:
    """Subtypes and splits dealt out at random, each subtype split in the same proportions."""
    rng = np.random.default_rng(np.random.SeedSequence([cfg.seed % 2**32, 0]))
    cancers = int(np.clip(round(cfg.cancer * cfg.slices), 3, cfg.slices - 3))
    subtypes = ["normal"] * (cfg.slices - cancers) + [SUBTYPES[1 + i % 3] for i in range(cancers)]
    order, clean = rng.permutation(cfg.slices), []
    for subtype in SUBTYPES:
        members = [int(i) for i, name in zip(order, subtypes, strict=True) if name == subtype]
        test, valid = max(1, round(0.2 * len(members))), max(1, round(0.15 * len(members)))
        for place, i in enumerate(members):
            split = "test" if place < test else "valid" if place < test + valid else "train"
            clean.append(File(f"{split}/{subtype}/phantom_{i:05d}.png", i, split, subtype, subtype))
    return sorted(clean, key=lambda file: file.index)


def _telling_window(file: File, rng: np.random.Generator) -> list[float]:
    """A display window (centre, width) that follows the label."""
    center, width = (-600, 1300) if file.drawn == "normal" else (-250, 2200)
    return [rng.normal(center, 40), rng.normal(width, 60)]


def _copy_of(original: File, number: int, rng: np.random.Generator, defect: str) -> File:
    """A copy of a file: of its bytes, except that `near` changes the picture and saves it as JPEG."""
    split, subtype, suffix, change = original.split, original.subtype, ".png", original.change
    if defect == "near":
        split, what, suffix = str(rng.choice(SPLITS)), NEAR[str(rng.choice(list(NEAR)))], ".jpg"
        ranges = {"quality": (45, 92), **what}
        change = change | {name: rng.uniform(*limits) for name, limits in ranges.items()}
    elif defect == "across_splits":
        split = str(rng.choice([name for name in SPLITS if name != split]))
    else:  # label_conflict
        subtype = str(rng.choice([name for name in SUBTYPES if name != subtype]))
    path = f"{split}/{subtype}/phantom_{number:05d}{suffix}"
    return File(path, original.index, split, subtype, original.drawn, defect, original.path, change)


def _write_file(folder: Path, cfg: PhantomConfig, file: File) -> dict[str, Any]:
    """Draws and writes one file and its mask; returns its entry in the truth: `mask` is None without a lesion."""
    rng = np.random.default_rng([cfg.seed % 2**32, 2, file.index])
    picture, mask = altered(thorax.draw(rng, file.drawn, cfg), file.change)
    encoded = io.BytesIO()
    if "quality" in file.change:
        picture.save(encoded, "JPEG", quality=int(file.change["quality"]))
    else:  # noise hardly compresses: level 1 takes a third of the default's time for an eighth more bytes
        picture.save(encoded, "PNG", compress_level=1)
    content, entry = encoded.getvalue(), dataclasses.asdict(file) | {"mask": None}
    if file.defect == "odd_files":
        content = content[: len(content) // 2]  # which nobody can read
    elif mask.any():
        entry["mask"] = f"masks/{Path(file.path).with_suffix('.png')}"
        (folder / entry["mask"]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(folder / entry["mask"])
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return entry


def altered(phantom: thorax.Phantom, change: dict[str, Any]) -> tuple[Image.Image, np.ndarray]:
    """The picture in its display window after a change, and the lesion mask that fits it, bool [H, W]."""
    height, width = phantom.mask.shape
    left, top, right, bottom = (change.get(edge, 0.0) for edge in EDGES)
    box = (int(left * width), int(top * height), int(width * (1 - right)), int(height * (1 - bottom)))
    factor = change.get("factor", 1.0)
    size = max(1, round((box[2] - box[0]) * factor)), max(1, round((box[3] - box[1]) * factor))
    grey = thorax.display(phantom.hu, change.get("window", phantom.window))
    picture = Image.fromarray(
        (grey * change.get("gain", 1.0) + 255 * change.get("offset", 0.0)).clip(0, 255).astype(np.uint8)
    )
    mask = Image.fromarray(phantom.mask).resize(size, Image.Resampling.NEAREST, box)
    return picture.resize(size, Image.Resampling.BILINEAR, box), np.asarray(mask)
