"""The lungs in a chest CT slice: where they are, and how bright air and soft tissue are shown in it.

Without a model: what is dark and lies inside the body is lung. Cropping to it and fixing both grey levels takes away
most of what tells one hospital's slices from another's (table, arms, field of view, window), and gives a nodule the
pixels that the rest of the body had.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 256  # side at which lungs are looked for, in pixels: finer makes no better box, only a slower one

MARGIN = 0.04
"""What the box leaves around the lungs, as a share of its longer side: pleura and ribs belong to the question."""

SOFT = 30  # grey level that parts body from air in a window for soft tissue

AIR, TISSUE = 0.15, 0.75
"""Where `levels_of` puts the lungs' air and soft tissue, in [0, 1]; fat, contrast and bone keep room on both sides."""


@dataclass(frozen=True)
class Lungs:
    """mask: bool [H, W] of the slice; box: (left, top, right, bottom) in pixels with its margin, inside the slice;
    air, tissue: their grey levels, 0 to 255."""

    mask: np.ndarray
    box: tuple[int, int, int, int]
    air: float
    tissue: float


def find_lungs(gray: np.ndarray) -> Lungs | None:
    """The lungs of a slice, uint8 [H, W]; None where nothing in it looks like lungs (a neck, a liver, a photograph).

    A part counts if it is dark, lies inside the body, and covers at least 0.4 % of the picture; parts below a tenth of
    the largest are bowel or trachea. Together they must cover at least 2 % of the body.
    """
    height, width = gray.shape
    scale = SIDE / max(gray.shape)
    side = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(Image.fromarray(gray).resize(side, Image.Resampling.BILINEAR))
    # In a window for soft tissue lungs are as black as the corners: then any grey is body.
    for threshold in (otsu(small), SOFT):
        body, dark = _dark_in_body(small, threshold)
        if dark.any():
            break
    else:
        return None
    air, tissue = float(np.percentile(small[dark], 25)), float(np.median(small[body & (small > threshold)]))
    # A tumour or a vessel at the edge belongs to the lungs, though it is not dark.
    mask = _filled(_closed(dark, 6))
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    # As wide to both sides of the body's middle: a lung that is filled or collapsed is not dark, and is what matters.
    middle = np.flatnonzero(body.any(0)).mean()
    reach = max(middle - columns[0], columns[-1] + 1 - middle)
    margin = MARGIN * max(2 * reach, rows[-1] + 1 - rows[0])
    box = (
        max(0, round((middle - reach - margin) / scale)),
        max(0, round((rows[0] - margin) / scale)),
        min(width, round((middle + reach + margin) / scale)),
        min(height, round((rows[-1] + 1 + margin) / scale)),
    )
    full = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    return Lungs(full, box, air, tissue)


def _dark_in_body(small: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the body and of the large dark parts in it; both empty where there are none."""
    body = _filled(_closed(_largest(_opened(small > threshold, 1), 1.0), 3))
    dark = _largest(_opened(body & (small <= threshold), 2), 0.1, 0.004 * small.size)
    return body, dark if dark.sum() >= 0.02 * body.sum() else np.zeros_like(dark)


def _largest(mask: np.ndarray, share: float, least: float = 0) -> np.ndarray:
    """The connected parts of a mask with at least `share` of the largest one's pixels, and at least `least`."""
    from scipy import ndimage  # here, as slices that are not cropped to the lungs are answered without it

    parts, count = ndimage.label(mask)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    return (sizes >= max(share * sizes.max(), least, 1))[parts]


def _opened(mask: np.ndarray, times: int) -> np.ndarray:
    """Without what is thinner than so many pixels to each side; outside the picture nothing is set."""
    gone = _grown(np.pad(~mask, 1, constant_values=True), times)[1:-1, 1:-1]
    return _grown(~gone, times)


def _closed(mask: np.ndarray, times: int) -> np.ndarray:
    """With gaps filled that are thinner than so many pixels to each side."""
    return ~_grown(~_grown(np.pad(mask, times + 1), times), times)[times + 1 : -times - 1, times + 1 : -times - 1]


def _grown(mask: np.ndarray, times: int) -> np.ndarray:
    """With the four neighbours of each pixel, so many times over; a fifth of the time that scipy's dilation takes."""
    for _ in range(times):
        grown = mask.copy()
        grown[1:] |= mask[:-1]
        grown[:-1] |= mask[1:]
        grown[:, 1:] |= mask[:, :-1]
        grown[:, :-1] |= mask[:, 1:]
        mask = grown
    return mask


def _filled(mask: np.ndarray) -> np.ndarray:
    """With every hole in it: scipy's own dilates the outside step by step."""
    from scipy import ndimage

    outside, _ = ndimage.label(np.pad(~mask, 1, constant_values=True))
    return (outside != outside[0, 0])[1:-1, 1:-1]


def otsu(gray: np.ndarray) -> float:
    """The grey level that parts the histogram of uint8 pixels into two classes of least variance (Otsu 1979).

    The outermost black is left out: corners outside the scanner's circle are no tissue.
    """
    histogram = np.bincount(gray.ravel(), minlength=256).astype(float)
    histogram[:2] = 0
    levels = np.arange(256)
    below = histogram.cumsum()
    above = below[-1] - below
    sums = (histogram * levels).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(np.nanargmax(np.where(np.isfinite(between), between, -1)))


def levels_of(lungs: Lungs) -> list[int]:
    """For each of 256 grey levels the new one: the lungs' air becomes AIR and soft tissue TISSUE, the rest in line."""
    slope = (TISSUE - AIR) / max(lungs.tissue - lungs.air, 1.0)
    return np.rint(np.clip(AIR + (np.arange(256) - lungs.air) * slope, 0, 1) * 255).astype(int).tolist()
