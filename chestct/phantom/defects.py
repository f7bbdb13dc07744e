"""The files of a set and their content, with faults planted on purpose: copies, class shortcuts, unreadable files.

Everything is planned before anything is drawn: a plan is a list of `File`s, each of which says alone how to make it
from a phantom's index. Files can then be written in any order by any number of processes, and the plan is the truth.
"""

import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from chestct.config.schema import COPIES, SUBTYPES, PhantomConfig
from chestct.phantom.thorax import Phantom, display

SPLITS = ("train", "valid", "test")
ODD = ("truncated", "empty", "text")  # nobody can read these
INTERCEPT = -1024

NEAR: dict[str, dict[str, tuple[float, float]]] = {
    "jpeg": {"quality": (45, 92)},
    "rescale": {"factor": (0.6, 0.9)},
    "enlarge": {"factor": (1.1, 1.4)},
    "brightness": {"gain": (0.85, 1.15), "offset": (-0.06, 0.06), "quality": (45, 92)},
    "crop": {**dict.fromkeys(("left", "top", "right", "bottom"), (0.01, 0.05)), "quality": (45, 92)},
}
"""Changes that near copies undergo, and the ranges of their parameters; with a quality, they are saved as JPEG."""


@dataclass(frozen=True)
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
    change: dict[str, Any] = field(default_factory=dict)


def plan(clean: list[File], cfg: PhantomConfig) -> list[File]:
    """The files of a clean set, one a slice in order of index, and after them those that the defects of cfg add."""
    rng = np.random.default_rng(np.random.SeedSequence([cfg.seed % 2**32, 1]))
    clean = [replace(file, change=_shortcuts(file.drawn != "normal", rng, cfg.defects)) for file in clean]
    files = list(clean)
    for defect in COPIES:
        if defect in cfg.defects:
            for i in rng.choice(len(clean), max(1, round(cfg.defect_rate * len(clean))), replace=False):
                files.append(_copy_of(clean[i], len(files), rng, defect))
    if "odd_files" in cfg.defects:
        for kind, split, subtype in zip(ODD, SPLITS, SUBTYPES, strict=False):
            path = f"{split}/{subtype}/phantom_{len(files):05d}.png"
            files.append(File(path, len(files), split, subtype, subtype, "odd_files", change={"odd": kind}))
    return files


def _shortcuts(cancer: bool, rng: np.random.Generator, defects: list[str]) -> dict[str, Any]:
    """Display window, size or border that follow the label."""
    center, width = (-250, 2200) if cancer else (-600, 1300)
    change: dict[str, dict[str, Any]] = {
        "shortcut_window": {"window": (rng.normal(center, 40), rng.normal(width, 60))},
        "shortcut_size": {"size": 0.8 if cancer else 1.25},
        "shortcut_border": {} if cancer else {"border": rng.uniform(0.02, 0.04)},
    }
    return {name: value for defect in defects for name, value in change.get(defect, {}).items()}


def _copy_of(original: File, number: int, rng: np.random.Generator, defect: str) -> File:
    """A copy of a file: of its bytes, except that `near` changes the picture and re-encodes it."""
    split, subtype, suffix, change = original.split, original.subtype, Path(original.path).suffix, original.change
    if defect == "near":
        split, operation = str(rng.choice(SPLITS)), str(rng.choice(list(NEAR)))
        change = change | {name: rng.uniform(*limits) for name, limits in NEAR[operation].items()}
        suffix = ".jpg" if "quality" in change else ".png"
    elif defect == "across_splits":
        split = str(rng.choice([name for name in SPLITS if name != split]))
    elif defect == "label_conflict":
        subtype = str(rng.choice([name for name in SUBTYPES if name != subtype]))
    path = f"{split}/{subtype}/phantom_{number:05d}{suffix}"
    return File(path, original.index, split, subtype, original.drawn, defect, original.path, change)


def encode(phantom: Phantom, file: File, identity: str) -> tuple[bytes, np.ndarray]:
    """The content of a file, and the lesion mask that fits it, bool [H, W]."""
    if file.path.endswith(".dcm"):
        return dicom(phantom, identity), phantom.mask
    picture, mask = altered(phantom, file.change)
    encoded = io.BytesIO()
    if "quality" in file.change:
        picture.save(encoded, "JPEG", quality=int(file.change["quality"]))
    else:  # noise hardly compresses: level 1 takes a third of the default's time for an eighth more bytes
        picture.save(encoded, "PNG", compress_level=1)
    whole = encoded.getvalue()
    odd = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"Text with the name of a picture.\n"}
    return odd.get(file.change.get("odd", ""), whole), mask


def altered(phantom: Phantom, change: dict[str, Any]) -> tuple[Image.Image, np.ndarray]:
    """The picture in its display window after a change, and the lesion mask that fits it, bool [H, W]."""
    height, width = phantom.mask.shape
    left, top, right, bottom = (change.get(edge, 0.0) for edge in ("left", "top", "right", "bottom"))
    box = (int(left * width), int(top * height), int(width * (1 - right)), int(height * (1 - bottom)))
    factor = change.get("factor", 1.0)
    size = max(1, round((box[2] - box[0]) * factor)), max(1, round((box[3] - box[1]) * factor))
    grey = display(phantom.hu, phantom.window) * change.get("gain", 1.0) + 255 * change.get("offset", 0.0)
    picture = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    mask = Image.fromarray(phantom.mask).resize(size, Image.Resampling.NEAREST, box)
    return picture.resize(size, Image.Resampling.BILINEAR, box), np.asarray(mask)


def dicom(phantom: Phantom, identity: str) -> bytes:
    """The slice as CT Image Storage, int16 with slope 1 and intercept -1024 (DICOM PS3.3, A.3).

    identity: what patient, study, series and instance are derived from; the same identity gives the same UIDs.
    """
    file, meta = io.BytesIO(), FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(file, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.Modality, ds.PatientName = CTImageStorage, "CT", f"PHANTOM-{identity}"
    ds.PatientID, ds.Manufacturer, ds.BodyPartExamined = f"PHANTOM-{identity}", "chestct phantom", "CHEST"
    for part in ("Study", "Series", "SOP"):
        setattr(ds, f"{part}InstanceUID", generate_uid(entropy_srcs=[identity, part]))
    ds.ImageType, ds.InstanceNumber = ["DERIVED", "SECONDARY", "AXIAL"], 1
    ds.SliceThickness, ds.PixelSpacing = 5, [round(phantom.spacing, 5)] * 2
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = INTERCEPT, 1, "HU"
    ds.WindowCenter, ds.WindowWidth = (round(value, 1) for value in phantom.window)
    stored = (np.round(phantom.hu) - INTERCEPT).astype(np.int16)
    ds.set_pixel_data(stored, "MONOCHROME2", 16, generate_instance_uid=False)
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()
