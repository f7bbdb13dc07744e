"""Plants faults with known truth: copies of every kind, class shortcuts, and odd files.

Everything is planned before anything is drawn: a plan is a list of `File`s, each of which says alone how to make it
from a phantom's index. Files can then be written in any order by any number of processes, and the plan is the truth.
"""

import io
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from chestct.config.schema import SUBTYPES, PhantomConfig
from chestct.errors import ConfigError
from chestct.phantom.thorax import Phantom, display

COPIES = ("exact", "near", "across_splits", "label_conflict")
SHORTCUTS = ("shortcut_window", "shortcut_size", "shortcut_border")
DEFECTS = (*COPIES, *SHORTCUTS, "odd_files")

ODD = {
    "16bit": ".png",
    "rgba": ".png",
    "palette": ".png",
    "cmyk": ".jpg",
    "exif_rotated": ".jpg",
    "lying_extension": ".png",
    "truncated_png": ".png",
    "truncated_jpeg": ".jpg",
    "zero_bytes": ".png",
    "not_an_image": ".png",
}
"""Kinds of odd files and how their names end."""

UNREADABLE = ("truncated_png", "truncated_jpeg", "zero_bytes", "not_an_image")

SPLITS = ("train", "valid", "test")

_RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "jpeg": {},
    "rescale": {"factor": (0.6, 0.9)},
    "shift": {"x": (-0.03, 0.03), "y": (-0.03, 0.03)},
    "brightness": {"gain": (0.85, 1.15), "offset": (-0.06, 0.06)},
    "window": {"center": (-80, 80), "width": (0.8, 1.25)},
    "crop": dict.fromkeys(("left", "top", "right", "bottom"), (0.01, 0.05)),
}
"""Changes that near copies undergo, and the ranges of their parameters."""


@dataclass(frozen=True)
class File:
    """One file of the set: where it goes and how it is made from phantom number `index`, drawn as `drawn`.

    subtype: the class folder, which a label conflict makes differ from `drawn`; original: path of the file that this
    one copies; operation, parameters: how the picture was changed; window, border: a shortcut's settings.
    """

    path: str
    index: int
    split: str
    subtype: str
    drawn: str
    defect: str | None = None
    original: str | None = None
    operation: str | None = None
    parameters: dict[str, float] = field(default_factory=dict)
    readable: bool = True
    size_factor: float = 1.0
    window: tuple[float, float] | None = None
    border: float = 0.0


def check(cfg: PhantomConfig) -> None:
    """Raises ConfigError if cfg.defects names an unknown defect."""
    unknown = sorted(set(cfg.defects) - set(DEFECTS))
    if unknown:
        raise ConfigError(f"Unknown defect {', '.join(unknown)} in data.phantom.defects. Known: {', '.join(DEFECTS)}.")


def plan(clean: list[File], cfg: PhantomConfig) -> list[File]:
    """The files of a clean set and, after them, those that the defects of cfg add.

    clean: one File a slice, in order of index. Raises ConfigError for an unknown defect.
    """
    check(cfg)
    rng = np.random.default_rng(np.random.SeedSequence([cfg.seed % 2**32, 1]))
    clean = [_with_shortcuts(file, rng, cfg.defects) for file in clean]
    files = list(clean)
    for defect in COPIES:
        if defect in cfg.defects:
            count = max(1, round(cfg.defect_rate * len(clean)))
            for i in rng.choice(len(clean), count, replace=False):
                files.append(_copy_of(clean[i], len(files), rng, defect))
    if "odd_files" in cfg.defects:
        for k, (kind, suffix) in enumerate(ODD.items()):
            subtype, split = SUBTYPES[k % 4], SPLITS[k % 3]
            path = f"{split}/{subtype}/phantom_{len(files):05d}{suffix}"
            # A phantom of its own, so that an odd file is not a duplicate as well.
            odd = File(path, len(clean) + k, split, subtype, subtype, "odd_files", operation=kind)
            files.append(replace(odd, readable=kind not in UNREADABLE))
    return files


def _with_shortcuts(file: File, rng: np.random.Generator, defects: list[str]) -> File:
    """The file with display window, size or border made to follow its label."""
    cancer = file.drawn != "normal"
    if "shortcut_window" in defects:
        center, width = (-250, 2200) if cancer else (-600, 1300)
        file = replace(file, window=(rng.normal(center, 40), rng.normal(width, 60)))
    if "shortcut_size" in defects:
        file = replace(file, size_factor=0.8 if cancer else 1.25)
    if "shortcut_border" in defects and not cancer:
        file = replace(file, border=rng.uniform(0.02, 0.04))
    return file


def _copy_of(original: File, number: int, rng: np.random.Generator, defect: str) -> File:
    """A copy of a file: of its bytes, except that `near` changes the picture and re-encodes it."""
    split, subtype, suffix = original.split, original.subtype, Path(original.path).suffix
    copy = replace(original, defect=defect, original=original.path)
    if defect == "near":
        split = str(rng.choice(SPLITS))
        operation, parameters = _sample_operation(rng)
        copy = replace(copy, operation=operation, parameters=parameters)
        suffix = ".jpg" if "quality" in parameters else ".png"
    elif defect == "across_splits":
        split = str(rng.choice([name for name in SPLITS if name != split]))
    elif defect == "label_conflict":
        subtype = str(rng.choice([name for name in SUBTYPES if name != subtype]))
    return replace(copy, path=f"{split}/{subtype}/phantom_{number:05d}{suffix}", split=split, subtype=subtype)


def _sample_operation(rng: np.random.Generator) -> tuple[str, dict[str, float]]:
    """A change that keeps a picture recognisable, and its parameters; half of them are saved as JPEG besides."""
    operation = str(rng.choice(list(_RANGES)))
    parameters = {name: rng.uniform(*limits) for name, limits in _RANGES[operation].items()}
    if operation == "rescale" and rng.random() < 0.5:
        parameters["factor"] = 2 - parameters["factor"]
    if operation == "jpeg" or rng.random() < 0.5:
        parameters["quality"] = int(rng.integers(45, 92))
    return operation, parameters


def near_copy(phantom: Phantom, file: File) -> tuple[np.ndarray, np.ndarray]:
    """The changed picture, uint8 [H, W], and the lesion mask that fits it, bool [H, W]."""
    change = file.parameters
    center, width = phantom.window
    if file.operation == "window":
        center, width = center + change["center"], width * change["width"]
    grey, mask = display(phantom.hu, (center, width)), phantom.mask
    height, across = grey.shape
    if file.operation == "brightness":
        grey = np.clip(grey * change["gain"] + 255 * change["offset"], 0, 255).astype(np.uint8)
    elif file.operation == "rescale":
        side = (max(1, round(across * change["factor"])), max(1, round(height * change["factor"])))
        grey = np.asarray(Image.fromarray(grey).resize(side, Image.Resampling.BILINEAR))
        mask = np.asarray(Image.fromarray(mask).resize(side, Image.Resampling.NEAREST))
    elif file.operation in ("shift", "crop"):
        rows, columns = np.arange(height), np.arange(across)
        if file.operation == "shift":
            rows = np.clip(rows - round(change["y"] * height), 0, height - 1)
            columns = np.clip(columns - round(change["x"] * across), 0, across - 1)
        else:
            rows = rows[math.ceil(change["top"] * height) : height - math.ceil(change["bottom"] * height)]
            columns = columns[math.ceil(change["left"] * across) : across - math.ceil(change["right"] * across)]
        grey, mask = grey[np.ix_(rows, columns)], mask[np.ix_(rows, columns)]
    return grey, mask


def encode_near(grey: np.ndarray, quality: float | None) -> bytes:
    """Bytes of a PNG, or of a JPEG where a quality is given. grey: uint8 [H, W]."""
    image = Image.fromarray(grey)
    return _encoded(image, "PNG") if quality is None else _encoded(image, "JPEG", quality=int(quality))


def encode_odd(grey: np.ndarray, kind: str) -> bytes:
    """The bytes of an odd file; kind is a key of ODD, grey uint8 [H, W]."""
    image = Image.fromarray(grey)
    png, jpeg = _encoded(image, "PNG"), _encoded(image, "JPEG", quality=92)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # "rotate by 90 degrees clockwise to show upright"
    turned = image.transpose(Image.Transpose.ROTATE_90)
    return {
        "16bit": _encoded(Image.fromarray(np.asarray(image, np.uint16) * 257), "PNG"),
        "rgba": _encoded(image.convert("RGBA"), "PNG"),
        "palette": _encoded(image.convert("P"), "PNG"),
        "cmyk": _encoded(image.convert("CMYK"), "JPEG", quality=92),
        "exif_rotated": _encoded(turned, "JPEG", quality=92, exif=exif),
        "lying_extension": jpeg,
        "truncated_png": png[: len(png) // 2],
        "truncated_jpeg": jpeg[: len(jpeg) // 2],
        "zero_bytes": b"",
        "not_an_image": b"This is a text file with the name of a picture.\n",
    }[kind]


def _encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
