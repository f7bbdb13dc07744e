"""Whether the novelty of a slice tells chest CT from everything else: pictures of many kinds that are none.

All of them are made here or ship with packages that chestct needs (scikit-learn, matplotlib, pydicom), so that anyone
can measure it again; none took part in fitting anything. Some are near misses on purpose: radiographs, other body
parts, and the test slices themselves with their grey levels inverted.
"""

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pydicom
import sklearn.datasets
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from chestct.config.schema import WindowConfig
from chestct.errors import DecodeError
from chestct.imaging.decode import decode
from chestct.imaging.preprocess import Preprocess
from chestct.models.bundle import Bundle
from chestct.models.novelty import FOREIGN
from chestct.stats.calibration import wilson

SIDE = 320
"""Side of what is drawn here, in pixels."""

MEDICAL = (
    *("693_J2KI.dcm", "CT_small.dcm", "J2K_pixelrep_mismatch.dcm"),  # CT, two of them of the head
    *("MR_small.dcm", "examples_overlay.dcm", "JPEG2000.dcm"),  # MR, MR of the abdomen, bone scintigraphy
    *("examples_palette.dcm", "examples_rgb_color.dcm", "examples_ybr_color.dcm", "examples_jpeg2k.dcm"),  # ultrasound
)
"""Of pydicom's own test files, those with a picture of a patient."""


def novelty_figures(
    bundle: Bundle, preprocess: Preprocess, of_test: np.ndarray, images: np.ndarray, each: int, seed: int = 0
) -> list[dict[str, Any]]:
    """One row a kind of picture, and one for all that are no chest CT: `kind`, `pictures`, `median` novelty, `auroc`
    against the test slices, and how many are called uncertain or refused (`beyond`: novelty above 1), or `refused`
    (above FOREIGN), each with Wilson's interval [low, high].

    of_test: novelty of the test slices, float [N]; images: test slices, uint8 [M, S, S], to be altered; each: pictures
    of a kind at most.
    """
    draws = (_noise, _drawing, _photograph, _radiograph)
    noise, drawings, photographs, radiographs = (
        [draw(np.random.default_rng([seed, kind, i])) for i in range(each)] for kind, draw in enumerate(draws)
    )
    kinds = {
        "noise": noise,
        "drawings and text": drawings,
        "photographs, cut from three": photographs,
        "drawn radiographs": radiographs,
        "other body parts and modalities": list(_medical(each)),
    }
    squares = {kind: np.stack([preprocess(picture) for picture in pictures]) for kind, pictures in kinds.items()}
    squares["test slices, grey levels inverted"] = 255 - images[:each]
    novelty = {kind: bundle.predict(pictures).novelty for kind, pictures in squares.items()}
    novelty = {"no chest CT, all together": np.concatenate([novelty[kind] for kind in kinds])} | novelty
    return [_row(kind, values, of_test) for kind, values in novelty.items()]


def _row(kind: str, novelty: np.ndarray, of_test: np.ndarray) -> dict[str, Any]:
    values = np.concatenate([of_test, novelty])
    foreign = np.arange(len(values)) >= len(of_test)

    def share(hit: np.ndarray) -> dict[str, Any]:
        low, high = wilson(int(hit.sum()), len(hit))
        return {"value": float(hit.mean()), "low": low, "high": high}

    return {
        "kind": kind,
        "pictures": len(novelty),
        "median": float(np.median(novelty)),
        "auroc": float(roc_auc_score(foreign, values)),
        "beyond": share(novelty > 1),
        "refused": share(novelty > FOREIGN),
    }


def _noise(rng: np.random.Generator) -> np.ndarray:
    """White to cloudy, in a grey range of its own."""
    field = ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE)), rng.choice([0, 1, 4, 16]))
    low, high = np.sort(rng.uniform(0, 1, 2))
    return (low + (high - low) * (field - field.min()) / np.ptp(field)).astype(np.float32)


def _drawing(rng: np.random.Generator) -> np.ndarray:
    """Shapes, or a page of text, dark on light or the other way round."""
    image = Image.new("L", (SIDE, SIDE), 255)
    pen = ImageDraw.Draw(image)
    if rng.random() < 0.5:
        for _ in range(rng.integers(3, 25)):
            (a, b), (c, d) = np.sort(rng.integers(0, SIDE, (2, 2)), axis=0).tolist()
            draw: Callable[..., None] = (pen.line, pen.rectangle, pen.ellipse)[rng.integers(3)]
            draw((a, b, c, d), fill=int(rng.integers(0, 256)))
    else:
        size = int(rng.integers(10, 30))
        letters = np.array(list("abcdefghij klmnopqrst uvwxyz 0123456789 "))
        for y in range(8, SIDE - size, round(1.4 * size)):
            pen.text((8, y), "".join(rng.choice(letters, 600 // size)), fill=0, font=ImageFont.load_default(size))
    levels = np.asarray(image)
    return 255 - levels if rng.random() < 0.5 else levels


def _photograph(rng: np.random.Generator) -> np.ndarray:
    """A part of one of the photographs that ship with scikit-learn and matplotlib."""
    photographs = [*sorted(Path(sklearn.datasets.__file__).parent.glob("images/*.jpg")), _shipped("grace_hopper.jpg")]
    whole = Image.open(photographs[rng.integers(len(photographs))]).convert("L")
    side = int(rng.uniform(0.3, 1) * min(whole.size))
    left, top = (int(rng.integers(0, size - side + 1)) for size in whole.size)
    return np.asarray(whole.crop((left, top, left + side, top + side)))


def _shipped(name: str) -> Path:
    return Path(matplotlib.get_data_path()) / "sample_data" / name


def _radiograph(rng: np.random.Generator) -> np.ndarray:
    """What a chest radiograph looks like from afar: a bright body, two dark lungs, ribs, heart and spine."""
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    wide, high = rng.uniform(0.28, 0.36), rng.uniform(0.55, 0.7)
    lungs = sum(np.exp(-((np.hypot((x - side * 0.4) / wide, (y + 0.1) / high)) ** 6)) for side in (-1, 1))
    ribs = 0.5 + 0.5 * np.sin(rng.uniform(24, 34) * (y - rng.uniform(0.2, 0.4) * np.abs(x)))
    heart = np.exp(-(np.hypot((x - 0.12) / 0.33, (y - 0.3) / 0.3) ** 4))
    body = np.exp(-((np.abs(x) / 0.95) ** 12)) * np.exp(-((np.maximum(0, -y - 0.75) / 0.15) ** 2))
    levels = body * (0.8 - lungs * (0.55 - 0.12 * ribs) * (1 - 0.8 * heart) + 0.12 * (np.abs(x) < 0.07))
    levels = ndimage.gaussian_filter(levels + 0.02 * rng.standard_normal(levels.shape), rng.uniform(0.6, 1.5))
    return np.clip(levels, 0, 1).astype(np.float32)


def _medical(each: int) -> Iterator[np.ndarray]:
    """Pictures of patients that are no chest CT: MR of a head from matplotlib, and pydicom's (MEDICAL).

    Files that this environment has no decoder for are left out.
    """
    head = np.frombuffer(gzip.decompress(_shipped("s1045.ima.gz").read_bytes()), np.uint16).reshape(256, 256)
    yield (head / np.float32(head.max())).astype(np.float32)
    for name in MEDICAL[: each - 1]:
        try:
            yield decode(Path(pydicom.__file__).parent / "data" / "test_files" / name, WindowConfig()).gray
        except DecodeError:
            continue
