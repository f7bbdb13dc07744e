"""The answer for one slice: what it is, what it is worth, and its pictures."""

import base64
import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from chestct.imaging.preprocess import Placement, as_bytes
from chestct.imaging.slice import Slice
from chestct.models.operating_point import UNCERTAIN
from chestct.models.saliency import blend, heat_to_slice

NOT_MEDICAL = "Research use only. Not a medical device: do not use it for diagnosis or treatment."


class Region(NamedTuple):
    """A place of a slice that speaks for cancer at least half as much as its hottest one; no outline of a tumour."""

    box: tuple[int, int, int, int]  # (left, top, right, bottom) in pixels of the slice; right and bottom lie outside
    heat: float  # the most in it, in (0, 1]; 1 at the slice's hottest place
    size_mm: tuple[float, float] | None  # (width, height) of the box, where the file says how large a pixel is


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """The answer for one slice: not a medical device's, and for research alone."""

    score: float  # calibrated P(cancer), in [0, 1]; given for refused slices too, where it means little
    decision: str  # cancer, normal, uncertain or refused
    reason: str  # of a refusal or an uncertainty, else ""
    probabilities: dict[str, float]  # calibrated P(class)
    possible: tuple[str, ...]  # conformal set: classes that cannot be excluded at the bundle's coverage
    novelty: float  # distance to the training data; uncertain above 1, refused above FOREIGN
    known: bool  # whether this very slice was in train or valid
    heat_grid: np.ndarray | None  # float32 [h, w] in [0, 1], heat at the network's resolution; None without `explain`
    slice: Slice
    bundle: str  # id of the bundle that answered
    caveat: str = ""  # how the recipe did in collections that it had not seen, "" where that is not known
    place: Placement | None = None  # where the slice lies under the grid; None without one

    @cached_property
    def gray(self) -> np.ndarray:
        """The slice as it was decoded, uint8 [H, W]."""
        return as_bytes(self.slice.gray)

    @cached_property
    def heat(self) -> np.ndarray | None:
        """Evidence for cancer over the slice, float32 [H, W] in [0, 1]; all zero where there is none."""
        if self.heat_grid is None or self.place is None:
            return None
        return heat_to_slice(self.heat_grid, self.gray.shape, self.place)

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """Where the model looked, hottest first; none on what is called normal or refused."""
        from scipy import ndimage  # here, as most answers are given without

        if not self.overlay_wanted:
            return ()
        assert self.heat is not None
        parts, _ = ndimage.label(self.heat >= 0.5)
        spacing, regions = self.slice.spacing, []
        for i, (rows, columns) in enumerate(ndimage.find_objects(parts), 1):
            size = (columns.stop - columns.start, rows.stop - rows.start)
            millimetres = (size[0] * spacing[1], size[1] * spacing[0]) if spacing else None
            box = (columns.start, rows.start, columns.stop, rows.stop)
            regions.append(Region(box, float(self.heat[parts == i].max()), millimetres))
        return tuple(sorted(regions, key=lambda region: -region.heat))

    @property
    def overlay_wanted(self) -> bool:
        """Whether heat says anything: it is relative, and on a slice called normal its brightest spot is no sign."""
        return self.decision in ("cancer", UNCERTAIN) and self.heat_grid is not None and bool(self.heat_grid.any())

    def overlay(self) -> Image.Image | None:
        """The slice at full resolution with its heat over it; None where there is none to show."""
        if not self.overlay_wanted or self.heat is None:
            return None
        return Image.fromarray(blend(self.gray, self.heat, 0.6))

    def as_dict(self) -> dict[str, Any]:
        """Whatever is a number or a text, as plain JSON."""
        return {
            "score": round(self.score, 6),
            "decision": self.decision,
            "reason": self.reason,
            "probabilities": {name: round(share, 6) for name, share in self.probabilities.items()},
            "possible": list(self.possible),
            "novelty": round(self.novelty, 4),
            "known": self.known,
            "bundle": self.bundle,
            "caveat": self.caveat,
            "notice": NOT_MEDICAL,
        }

    def __repr__(self) -> str:
        boxes = [region.box for region in self.regions]
        reason = f", reason={self.reason!r}" if self.reason else ""
        return f"<{self.decision}, score {self.score:.3f}{reason}, regions {boxes}. {NOT_MEDICAL}>"


def data_uri(image: Image.Image, format: str, side: int | None = None, **options: int) -> str:
    """A picture for a page or an answer, at most `side` pixels a side, which never lies on the server's disk.

    format and options: Pillow's.
    """
    if side:
        image.thumbnail((side, side), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def jpeg_uri(image: Image.Image) -> str:
    """A picture for the page."""
    return data_uri(image, "JPEG", 512, quality=90)
