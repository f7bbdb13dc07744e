"""Whether the novelty of a slice tells chest CT from everything else: pictures of many kinds that are none.

All of them are made here or ship with packages that chestct needs (scikit-learn, pydicom), so that anyone can measure
it again; none took part in fitting anything. Some are near misses on purpose: radiographs, other body parts, and the
test slices themselves with their grey levels inverted.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import sklearn.datasets
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from chestct.config.schema import WindowConfig
from chestct.errors import DecodeError
from chestct.imaging.decode import decode
from chestct.imaging.preprocess import Preprocess
from chestct.models.bundle import Bundle
from chestct.models.novelty import FOREIGN
from chestct.stats.calibration import wilson
from chestct.stats.metrics import Estimate, auroc

SIDE = 320
"""Side of what is drawn here, in pixels."""

MEDICAL = (
    *("CT_small.dcm", "693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm"),  # CT, two of them of the head
    *("MR_small.dcm", "examples_overlay.dcm", "JPEG2000.dcm"),  # MR, MR of the abdomen, bone scintigraphy
    *("examples_palette.dcm", "examples_rgb_color.dcm", "examples_ybr_color.dcm", "examples_jpeg2k.dcm"),  # ultrasound
)
"""Of pydicom's own test files, those with a picture of a patient."""


def novelty_figures(
    bundle: Bundle, preprocess: Preprocess, of_test: np.ndarray, images: np.ndarray, each: int
) -> list[dict[str, Any]]:
    """One row for all that are no chest CT, and one a kind of picture: `kind`, `pictures`, `median` novelty, `auroc`
    against the test slices, and how many are called uncertain or refused (`beyond`: novelty above 1), or `refused`
    (above FOREIGN), each with Wilson's interval.

    of_test: novelty of the test slices, float [N]; images: test slices, uint8 [M, S, S], to be altered; each: pictures
    of a kind at most.
    """
    kinds = {
        draw.__name__.strip("_"): [draw(np.random.default_rng([0, i])) for i in range(each)]
        for draw in (_noise, _text, _photographs, _radiographs)
    }
    kinds["other body parts and modalities"] = list(_medical(each))
    novelty = {
        kind: bundle.predict(np.stack([preprocess(picture) for picture in pictures])).novelty
        for kind, pictures in kinds.items()
    }
    inverted = {"test slices, grey levels inverted": bundle.predict(255 - images[:each]).novelty}
    novelty = {"no chest CT, all together": np.concatenate(list(novelty.values()))} | novelty | inverted
    return [_row(kind, values, of_test) for kind, values in novelty.items()]


def _row(kind: str, novelty: np.ndarray, of_test: np.ndarray) -> dict[str, Any]:
    def share(hit: np.ndarray) -> Estimate:
        return Estimate(float(hit.mean()), *wilson(int(hit.sum()), len(hit)), len(hit), len(hit))

    foreign = np.repeat([False, True], [len(of_test), len(novelty)])
    return {
        "kind": kind,
        "pictures": len(novelty),
        "median": float(np.median(novelty)),
        "auroc": float(auroc(np.concatenate([of_test, novelty]), foreign)[0]),
        "beyond": share(novelty > 1),
        "refused": share(novelty > FOREIGN),
    }


def _noise(rng: np.random.Generator) -> np.ndarray:
    """White to cloudy."""
    field = ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE)), rng.choice([0, 1, 4, 16]))
    return ((field - field.min()) / np.ptp(field)).astype(np.float32)


def _text(rng: np.random.Generator) -> np.ndarray:
    """A page of letters, dark on light or the other way round."""
    image = Image.new("L", (SIDE, SIDE), 255)
    size = int(rng.integers(10, 30))
    letters = np.array(list("abcdefghij klmnopqrst uvwxyz 0123456789 "))
    for y in range(8, SIDE - size, round(1.4 * size)):
        line = "".join(rng.choice(letters, 600 // size))
        ImageDraw.Draw(image).text((8, y), line, fill=0, font=ImageFont.load_default(size))
    levels = np.asarray(image)
    return 255 - levels if rng.random() < 0.5 else levels


def _photographs(rng: np.random.Generator) -> np.ndarray:
    """A part of one of the photographs that ship with scikit-learn."""
    paths = sorted(Path(sklearn.datasets.__file__).parent.glob("images/*.jpg"))
    whole = Image.open(paths[rng.integers(len(paths))]).convert("L")
    side = int(rng.uniform(0.3, 1) * min(whole.size))
    left, top = (int(rng.integers(0, size - side + 1)) for size in whole.size)
    return np.asarray(whole.crop((left, top, left + side, top + side)))


def _radiographs(rng: np.random.Generator) -> np.ndarray:
    """What a chest radiograph looks like from afar: a bright body, two dark lungs, ribs, heart and spine."""
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    wide, high = rng.uniform(0.28, 0.36), rng.uniform(0.55, 0.7)
    lungs = sum(np.exp(-((np.hypot((x - side * 0.4) / wide, (y + 0.1) / high)) ** 6)) for side in (-1, 1))
    ribs = 0.5 + 0.5 * np.sin(rng.uniform(24, 34) * (y - rng.uniform(0.2, 0.4) * np.abs(x)))
    heart = np.exp(-(np.hypot((x - 0.12) / 0.33, (y - 0.3) / 0.3) ** 4))
    body = np.exp(-((np.abs(x) / 0.95) ** 12))
    levels = body * (0.8 - lungs * (0.55 - 0.12 * ribs) * (1 - 0.8 * heart) + 0.12 * (np.abs(x) < 0.07))
    return np.clip(levels + 0.02 * rng.standard_normal(levels.shape), 0, 1).astype(np.float32)


def _medical(each: int) -> Iterator[np.ndarray]:
    """pydicom's pictures of patients (MEDICAL), but for files that this environment has no decoder for."""
    for name in MEDICAL[:each]:
        try:
            yield decode(Path(pydicom.__file__).parent / "data" / "test_files" / name, WindowConfig()).gray
        except DecodeError:
            continue
