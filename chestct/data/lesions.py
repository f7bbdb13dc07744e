"""Where lesions are known: a radiologist's boxes in a CSV file, masks as phantoms have them.

They go through the same crop as their slice and end as one mask of the square, the manifest's column `lesion`: what a
head that judges places learns from, and what an evaluation points at.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from chestct.config.schema import SourceConfig
from chestct.data.sources import MASKS, SliceFile
from chestct.errors import DataError
from chestct.imaging.preprocess import Box, Preprocess, mask_to_square, placement

Known = list[Box] | Path
"""Boxes in pixels of the original slice, or the file of a mask of its size."""

COLUMNS = ["file", "left", "top", "right", "bottom"]


def known_lesions(name: str, source: SourceConfig, files: Sequence[SliceFile]) -> dict[str, Known]:
    """What is known of the slices of a source: path below its root -> boxes, or mask.

    files: the slices of this source; `masks/PATH` below the root is the mask of the slice PATH. Raises DataError where
    its boxes cannot be read, name no slice or a normal one, or are empty.
    """
    root = Path(source.root)
    known: dict[str, Known] = {}
    if (root / MASKS).is_dir():
        masks = {file.path: root / MASKS / file.path for file in files}
        known |= {path: mask for path, mask in masks.items() if mask.is_file()}
    if source.boxes:
        known |= _boxes(root / source.boxes, f"data.sources.{name}.boxes", files)
    return known


def _boxes(path: Path, setting: str, files: Sequence[SliceFile]) -> dict[str, list[Box]]:
    if not path.is_file():
        raise DataError(f"{setting}: there is no file {path}. Give its path below the source's root, or leave it out.")
    try:
        table = pd.read_csv(path, encoding="utf-8")
        if missing := set(COLUMNS) - set(table):
            raise ValueError(f"it has no column {', '.join(sorted(missing))}")
        table = table[COLUMNS].astype({"file": str} | dict.fromkeys(COLUMNS[1:], int))
    except ValueError as error:  # pandas' parser, numbers that are none, and bytes that are no text
        raise DataError(f"{setting}: {path} cannot be read: {error}. Its columns: {','.join(COLUMNS)}.") from None
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


def lesion_of(known: Known, gray: np.ndarray, preprocess: Preprocess, name: str) -> bytes:
    """The mask of a slice's lesions in its square, as `pack` makes it; b"" where the crop leaves nothing of them.

    gray: uint8 [H, W]. Raises DataError for a box that lies outside, and for a mask of another size.
    """
    if isinstance(known, Path):
        with Image.open(known) as image:
            if image.size != gray.shape[::-1]:
                raise DataError(f"{known} is of another size than its slice {name}. Remove the mask, or mend it.")
            mask = np.asarray(image.convert("L")) > 127
    else:
        mask = np.zeros(gray.shape, bool)
        for left, top, right, bottom in known:
            if min(left, top) < 0 or right > gray.shape[1] or bottom > gray.shape[0]:
                size = f"{gray.shape[1]} x {gray.shape[0]} pixels"
                raise DataError(f"The box {left},{top},{right},{bottom} lies outside of {name}, which has {size}.")
            mask[top:bottom, left:right] = True
    square = mask_to_square(mask, placement(gray, preprocess))
    return np.packbits(square).tobytes() if square.any() else b""


def unpack(lesion: bytes, size: int) -> np.ndarray:
    """A mask of the manifest's column `lesion`, bool [size, size]."""
    return np.unpackbits(np.frombuffer(lesion, np.uint8), count=size * size).reshape(size, size).astype(bool)


def cropped_away(manifest: pd.DataFrame, known: Mapping[str, Known]) -> list[str]:
    """A sentence for each source with slices whose known lesions the crop leaves out. known: by the files' hash."""
    cancers = manifest[manifest["file_hash"].isin(known.keys()) & (manifest["label"] == "cancer")]
    return [
        f"In {len(rows)} slices of {source} the lesion lies outside of what data.fit shows, for example "
        f"{rows['path'].iat[0]}: where it is counts as not known."
        for source, rows in cancers[cancers["lesion"] == b""].groupby("source", sort=False)
    ]
