"""NIfTI volumes to axial slices, one at a time: nibabel reads the header and finds the place of a slice in the file.

Compressed volumes are inflated as far as a slice needs; or once, into a temporary file, where all slices are wanted and
do not follow each other in the file. Slices come from the feet upwards and lie as on a viewer: the patient's right on
the left, the front above.
"""

import gzip
import io
from collections.abc import Iterator
from contextlib import nullcontext
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np

from chestct.config.schema import WindowConfig
from chestct.files import digest
from chestct.imaging.slice import Limits, MissingDecoderError, Position, RefusedError, Slice, windowed

MAX_VOLUME = 4_000_000_000
"""Bytes of a volume beyond which it is refused: what a file inflates to is only known when it has been."""

GZIP = b"\x1f\x8b"

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
    scattered = every and data[:2] == GZIP and (z, flip[z]) != (2, 1)
    with _inflated(data, volume) if scattered else nullcontext() as file:
        if file:
            volume = _open(data, limits, file)[0]
        upwards = list(enumerate(range(count)[:: flip[z]]))
        for frame, k in upwards if every else [upwards[count // 2]]:
            place: Position = (series, "mm", float(volume.affine[2, z] * k + volume.affine[2, 3]))
            spacing = (float(sizes[y]), float(sizes[x]))
            gray = np.ascontiguousarray(windowed(hounsfield(k), window))
            yield Slice(gray, "NIFTI", "NIFTI", series=series, frame=frame, spacing=spacing, position=place)


def declared_size(data: bytes, limits: Limits) -> tuple[int, int, int]:
    """(width, height, slices) that the header of the NIfTI file `data` announces."""
    return _open(data, limits)[3]


def _inflated(data: bytes, volume: Any) -> IO[bytes]:
    """The gzipped file `data` of this volume as a temporary file, no longer than its header says."""
    left = volume.dataobj.offset + int(np.prod(volume.shape)) * volume.dataobj.dtype.itemsize
    try:
        file = TemporaryFile()  # noqa: SIM115 - `slices` closes it
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            while left > 0 and (piece := stream.read(min(left, 1 << 20))):
                left -= file.write(piece)
    except OSError as error:
        raise RefusedError(f"it cannot be inflated: {error.strerror or error}") from error
    file.seek(0)
    return file


def _open(
    data: bytes, limits: Limits, stream: Any = None
) -> tuple[Any, tuple[int, ...], list[int], tuple[int, int, int]]:
    """The volume, of `stream` if given; its axes to the right, front and head; their directions; the slices' size."""
    try:
        import nibabel
    except ModuleNotFoundError:
        raise MissingDecoderError("it needs nibabel: pip install 'chestct[nifti]'") from None
    stream = stream or (gzip.GzipFile(fileobj=io.BytesIO(data)) if data[:2] == GZIP else io.BytesIO(data))
    kind = nibabel.Nifti2Image if stream.read(8)[4:7] == b"n+2" else nibabel.Nifti1Image
    stream.seek(0)
    volume: Any = kind.from_stream(stream)
    shape = volume.shape
    if len(shape) != 3 or volume.dataobj.dtype.names:
        raise RefusedError(f"a volume of shape {list(shape)}; three axes of grey values are read")
    if volume.dataobj.offset + np.prod(shape, dtype=float) * volume.dataobj.dtype.itemsize > MAX_VOLUME:
        raise RefusedError(f"{' x '.join(map(str, shape))} voxels, more than {MAX_VOLUME:,} bytes")
    orientation = nibabel.io_orientation(volume.affine)
    if np.isnan(orientation).any():
        raise RefusedError("its affine says not how the volume lies")
    axes = tuple(int(i) for i in np.argsort(orientation[:, 0]))
    size = (shape[axes[0]], shape[axes[1]], shape[axes[2]])
    limits.check(size[0], size[1])
    return volume, axes, orientation[:, 1].astype(int).tolist(), size
