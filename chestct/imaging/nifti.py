"""NIfTI volumes to axial slices, one at a time: nibabel reads the header and finds the place of a slice in the file.

Compressed volumes are inflated as far as a slice needs, never whole. Slices come from the feet upwards and lie as on a
viewer: the patient's right on the left, the front above.
"""

import gzip
import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from chestct.config.schema import WindowConfig
from chestct.files import digest
from chestct.imaging.slice import Limits, MissingDecoderError, Position, RefusedError, Slice, windowed

MAX_VOLUME = 4_000_000_000
"""Bytes of a volume beyond which it is refused: what a file inflates to is only known when it has been."""

AIR = -300.0
"""HU that every chest CT goes below; a volume that does not is no CT, or is not in HU."""


def slices(data: bytes, window: WindowConfig, limits: Limits, every: bool) -> Iterator[Slice]:
    """Axial slices of the NIfTI file `data`, gzipped or not: all, or the middle one only, in HU through `window`.

    Raises RefusedError, and whatever nibabel raises.
    """
    volume, (x, y, z), flip, (_, _, count) = _open(data, limits)
    sizes, series = np.linalg.norm(volume.affine[:3, :3], axis=0), f"nifti-{digest(data)[:16]}"

    def hounsfield(k: int) -> np.ndarray:
        index: list[Any] = [slice(None)] * 3
        index[z] = k
        plane = np.nan_to_num(np.asarray(volume.dataobj[tuple(index)], np.float32), nan=-1024.0)
        plane = plane if y < x else plane.T
        return plane[:: -flip[y], :: -flip[x]]  # nibabel's axes run to the right and to the front

    if hounsfield(count // 2).min() > AIR:
        raise RefusedError(f"nothing in its middle slice is below {AIR:.0f}: no chest CT in Hounsfield units")
    upwards = list(enumerate(range(count)[:: flip[z]]))
    for frame, k in upwards if every else [upwards[count // 2]]:
        place: Position = (series, "mm", float(volume.affine[2, z] * k + volume.affine[2, 3]))
        spacing = (float(sizes[y]), float(sizes[x]))
        gray = np.ascontiguousarray(windowed(hounsfield(k), window))
        yield Slice(gray, "NIFTI", "NIFTI", series=series, frame=frame, spacing=spacing, position=place)


def declared_size(data: bytes, limits: Limits) -> tuple[int, int, int]:
    """(width, height, slices) that the header of the NIfTI file `data` announces."""
    return _open(data, limits)[3]


def _open(data: bytes, limits: Limits) -> tuple[Any, tuple[int, ...], list[int], tuple[int, int, int]]:
    """The volume; its axes to the right, front and head; which way each axis of the file runs; and the slices' size."""
    try:
        import nibabel
    except ModuleNotFoundError:
        raise MissingDecoderError("it needs nibabel: pip install 'chestct[nifti]'") from None
    stream = gzip.GzipFile(fileobj=io.BytesIO(data)) if data[:2] == b"\x1f\x8b" else io.BytesIO(data)
    kind = nibabel.Nifti2Image if stream.read(8)[4:7] == b"n+2" else nibabel.Nifti1Image
    stream.seek(0)
    volume: Any = kind.from_stream(stream)
    shape = volume.shape
    if len(shape) != 3 or volume.dataobj.dtype.names:
        raise RefusedError(f"a volume of shape {list(shape)}; three axes of grey values are read")
    if np.prod(shape, dtype=float) * volume.dataobj.dtype.itemsize > MAX_VOLUME:
        raise RefusedError(f"{' x '.join(map(str, shape))} voxels, more than {MAX_VOLUME:,} bytes")
    orientation = nibabel.io_orientation(volume.affine)
    if np.isnan(orientation).any():
        raise RefusedError("its affine says not how the volume lies")
    axes = tuple(int(i) for i in np.argsort(orientation[:, 0]))
    size = (shape[axes[0]], shape[axes[1]], shape[axes[2]])
    limits.check(size[0], size[1])
    return volume, axes, orientation[:, 1].astype(int).tolist(), size
