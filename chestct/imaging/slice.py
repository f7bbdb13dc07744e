"""One decoded slice, and what decoding one may cost.

Pillow's own limit on pixels is a process-wide setting that warns before it refuses; so `Limits` are checked here,
against the size that a header announces, before anything of that size is allocated.
"""

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from chestct.config.schema import WindowConfig

Position = tuple[str, str, float]
"""Where a slice lies: SeriesInstanceUID, `mm` or `number`, and the value; sorts within one series."""


@dataclass(frozen=True)
class Limits:
    """What a file may cost: its length in bytes (also after inflating), and the pixels of one slice."""

    max_bytes: int = 256_000_000
    max_pixels: int = 64_000_000

    def check(self, width: int, height: int) -> None:
        """Raise RefusedError unless an image of this size may be decoded."""
        if width < 1 or height < 1 or width * height > self.max_pixels:
            raise RefusedError(f"{width} x {height} pixels; data.max_pixels allows {self.max_pixels:,} in all")


DEFAULT_LIMITS = Limits()


class RefusedError(ValueError):
    """A file that is not decoded because of what it contains; the text says what that is and what is allowed."""


class MissingDecoderError(RefusedError):
    """A file that this machine cannot decode, and another can."""


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class Slice:
    """One decoded slice.

    levels: [H, W], 0 black, as the file has them: uint8 or uint16 with their largest value for white, or float32 in
    [0, 1]; mode: Pillow's mode of the file ("L", "RGBA", "I;16", ...) or "DICOM"; color: mean chroma, (max - min of
    R, G, B) / 255: below 0.02 for CT with coloured marks or JPEG noise, above 0.05 for most photographs; patient,
    study, series: DICOM's, or ""; frame: index in a file of several. Where the file says: spacing, in mm
    between rows and between columns; position; unfit, why it is no axial CT slice, in a sentence.
    """

    levels: np.ndarray
    format: str
    mode: str
    color: float = 0.0
    patient: str = ""
    study: str = ""
    series: str = ""
    frame: int = 0
    spacing: tuple[float, float] | None = None
    position: Position | None = None
    unfit: str = ""

    @cached_property
    def gray(self) -> np.ndarray:
        """The levels as float32 [H, W] in [0, 1]."""
        return as_gray(self.levels)


class BudgetedFile(io.BytesIO):
    """Bytes as a file that allows a number of reads, and a number of bytes while `bytes_left` is set.

    Millions of empty chunks take minutes to walk, and entries that all name the same bytes fill the memory.
    """

    def __init__(self, data: bytes, reads: int) -> None:
        super().__init__(data)
        self.reads_left = reads
        self.bytes_left: int | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise RefusedError("too many pieces")
        data = super().read(size)
        if self.bytes_left is not None:
            self.bytes_left -= len(data)
            if self.bytes_left < 0:
                raise RefusedError("too much metadata. Save the image without previews and layers")
        return data


def as_gray(levels: np.ndarray) -> np.ndarray:
    """Grey levels of any kind (see Slice) as float32 in [0, 1]."""
    return levels if levels.dtype.kind == "f" else levels / np.float32(np.iinfo(levels.dtype).max)


def windowed(hu: np.ndarray, window: WindowConfig) -> np.ndarray:
    """Hounsfield units as grey levels, float32 in [0, 1] (PS3.3 C.11.2.1.2.1, see chestct.imaging.dicom)."""
    return ((hu - (window.center - 0.5)) / max(window.width - 1, 1e-6) + 0.5).clip(0, 1).astype(np.float32)


def pixel_hash(levels: np.ndarray) -> str:
    """Hash of what is seen: 32 hex digits over the shape and the grey levels (see Slice), not over the file.

    Levels are compared at 16 bits, so a lossless copy has the same hash whether it is saved as L, RGB or RGBA, as PNG,
    BMP or TIFF, and whether it is hashed as uint8 or as float.
    """
    if levels.dtype.kind == "f":
        levels = np.rint(levels * 65535).astype("<u2")
    if levels.dtype != np.uint8:
        short = (levels >> 8).astype(np.uint8)
        levels = short if (levels == short * np.uint16(257)).all() else levels.astype("<u2")
    digest = hashlib.sha256(np.array(levels.shape, "<u4").tobytes())
    digest.update(np.ascontiguousarray(levels).data)
    return digest.hexdigest()[:32]
