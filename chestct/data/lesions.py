"""Where lesions are known: a radiologist's boxes in a CSV file, masks as phantoms have them.

They go through the same crop as their slice and end as one mask of the square, the manifest's column `lesion`: what a
head that judges places learns from, and what an evaluation points at.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from chestct.config.schema import SourceConfig, WindowConfig
from chestct.data.sources import MASKS, SliceFile
from chestct.errors import DataError, DecodeError
from chestct.imaging.decode import decode
from chestct.imaging.preprocess import Box, Preprocess, mask_to_square, placement
from chestct.imaging.slice import Limits
from chestct.imaging.slice_files import walk

Known = list[Box] | Path
"""Boxes in pixels of the original slice, or the file of a mask of its size."""

NOTES = (".txt", ".md", ".csv", ".json")  # what may lie beside masks

COLUMNS = ["file", "left", "top", "right", "bottom"]


def known_lesions(name: str, source: SourceConfig, files: Sequence[SliceFile]) -> dict[str, Known]:
    """What is known of the slices of a source: path below its root -> boxes, or mask.

    files: the slices of this source; `masks/PATH` below the root is the mask of the slice PATH. Raises DataError where
    its boxes cannot be read, name no slice or a normal one, or are empty, and for a mask that belongs to no slice.
    """
    root = Path(source.root)
    known: dict[str, Known] = {}
    if (root / MASKS).is_dir():
        masks = {file.path: mask_file(file) for file in files}
        known |= {path: mask for path, mask in masks.items() if mask.is_file()}
        _check_masks(root, masks)
    if source.boxes:
        known |= _boxes(root / source.boxes, f"data.sources.{name}.boxes", files)
    return known


def mask_file(file: SliceFile) -> Path:
    """Where the mask of a slice is to lie."""
    return Path(file.root, MASKS, file.path)


def _check_masks(root: Path, masks: Mapping[str, Path]) -> None:
    """Raises DataError for a mask of no slice; one of a slice that labels leave out is none. masks: of the others."""
    try:
        found = {path.relative_to(root / MASKS).as_posix(): path for path, reason in walk(root / MASKS) if not reason}
    except OSError as error:
        raise DataError(f"Cannot list {error.filename}: {error.strerror}. Its masks would be missing.") from None
    for name, mask in found.items():
        if name not in masks and not (root / name).is_file() and mask.suffix.lower() not in NOTES:
            stem = PurePosixPath(name).with_suffix("")
            slice_ = next((path for path in masks if PurePosixPath(path).with_suffix("") == stem), next(iter(masks)))
            raise DataError(
                f"{mask} is the mask of no slice. That of {slice_} is to lie at {masks[slice_]}, extension included; "
                "or remove it."
            )


def _boxes(path: Path, setting: str, files: Sequence[SliceFile]) -> dict[str, list[Box]]:
    if not path.is_file():
        raise DataError(f"{setting}: there is no file {path}. Give its path below the source's root, or leave it out.")
    try:
        table = pd.read_csv(path, encoding="utf-8")
        if missing := set(COLUMNS) - set(table):
            raise ValueError(f"it has no column {', '.join(sorted(missing))}")
        table = table[COLUMNS].astype({"file": str} | dict.fromkeys(COLUMNS[1:], float))
        if len(lacking := np.flatnonzero(~np.isfinite(table[COLUMNS[1:]]).all(axis=1))):
            raise ValueError(f"a number is missing in line {lacking[0] + 2}")
        table[["left", "top"]] = np.floor(table[["left", "top"]])
        table[["right", "bottom"]] = np.ceil(table[["right", "bottom"]])
        table = table.astype(dict.fromkeys(COLUMNS[1:], int))
    except (OSError, ValueError) as error:  # pandas' parser, numbers that are none, and bytes that are no text
        raise DataError(f"{setting}: {path} cannot be read: {error}. It is to begin with {','.join(COLUMNS)}") from None
    labels = {file.path: file.label for file in files}
    boxes: dict[str, list[Box]] = {}
    for line, (file, *box) in enumerate(table.itertuples(index=False), 2):
        where = f"{path}, line {line}: {file} "
        if file not in labels:
            raise DataError(f"{where}is no slice of this source. Give paths below its root, as {files[0].path}.")
        if labels[file] == "normal":
            raise DataError(f"{where}is a normal slice: remove the box, or move the slice.")
        if box[0] >= box[2] or box[1] >= box[3]:
            raise DataError(f"{where}has an empty box ({box}): right and bottom lie beyond left and top.")
        boxes.setdefault(file, []).append(tuple(box))
    return boxes


def mask_of(known: Known, shape: tuple[int, ...], name: str, limits: Limits) -> np.ndarray:
    """Where the lesions of the slice `name` are, bool [H, W] of its `shape`: in its boxes, or above 0 in its mask.

    Raises DataError for a box that lies outside, and for a mask of another size or that cannot be read.
    """
    if isinstance(known, Path):
        try:
            image = decode(known, WindowConfig(), limits)
            if image.format in ("DICOM", "NIFTI", "JPEG", "WEBP"):  # Hounsfield units, or noise around 0
                raise DecodeError(known, f"it is {image.format}; save it as a PNG")
        except DecodeError as error:
            raise DataError(f"{known} is no mask that can be read: {error.reason}. Remove it, or mend it.") from None
        if image.levels.shape != shape:
            raise DataError(f"{known} is of another size than its slice {name}. Remove the mask, or mend it.")
        return image.levels > 0
    mask = np.zeros(shape, bool)
    for left, top, right, bottom in known:
        if min(left, top) < 0 or right > shape[1] or bottom > shape[0]:
            size = f"{shape[1]} x {shape[0]} pixels"
            raise DataError(f"The box {left},{top},{right},{bottom} lies outside of {name}, which has {size}.")
        mask[top:bottom, left:right] = True
    return mask


def in_square(mask: np.ndarray, gray: np.ndarray, preprocess: Preprocess) -> bytes:
    """A mask bool [H, W] in its slice's square, a bit a pixel; b"" where the crop of `gray`, uint8 [H, W], omits it."""
    square = mask_to_square(mask, placement(gray, preprocess))
    return np.packbits(square).tobytes() if square.any() else b""


def unpack(lesion: bytes, size: int) -> np.ndarray:
    """A mask of the manifest's column `lesion`, bool [size, size]."""
    return np.unpackbits(np.frombuffer(lesion, np.uint8), count=size * size).reshape(size, size).astype(bool)


def not_shown(manifest: pd.DataFrame, known: Mapping[str, Known], empty: Collection[str]) -> list[str]:
    """A sentence for each source with slices whose masks are empty, or whose known lesions the crop leaves out.

    known: by the files' hash; empty: the hashes of those whose mask shows nothing.
    """
    cancers = manifest[manifest["file_hash"].isin(known.keys()) & (manifest["label"] == "cancer")]
    sentences = []
    for (source, shows_none), rows in cancers[cancers["lesion"] == b""].groupby(
        ["source", cancers["file_hash"].isin(empty)], sort=False
    ):
        where = "mask is empty" if shows_none else "lesion lies outside of what data.fit shows"
        sentences.append(
            f"In {len(rows)} slices of {source} the {where}: where it is counts as not known. For example "
            f"{rows['path'].iat[0]}."
        )
    return sentences
