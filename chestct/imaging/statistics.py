"""Numbers about a slice that need no network: what the audit looks at for shortcuts, and the service for drift."""

import numpy as np

from chestct.imaging.slice import as_gray

STATISTICS = ("width", "height", "mean", "std", "border_mean", "border_std")
"""In pixels, and as fractions of the grey range; the border is the outermost 5 % of the sides."""


def image_statistics(levels: np.ndarray) -> dict[str, float]:
    """`STATISTICS` of a decoded slice [H, W], whose levels may be of any kind (see Slice)."""
    gray = as_gray(levels)
    height, width = gray.shape
    y, x = max(1, round(height * 0.05)), max(1, round(width * 0.05))
    inner = gray[y:-y]
    border = np.concatenate([part.ravel() for part in (gray[:y], gray[-y:], inner[:, :x], inner[:, -x:])])
    numbers = [float(number(part, dtype=float)) for part in (gray, border) for number in (np.mean, np.std)]
    return dict(zip(STATISTICS, (width, height, *numbers), strict=True))
