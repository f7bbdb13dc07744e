"""The Python API: `chestct.load()` gives a `Model`, which answers for files, bytes and arrays.

Errors are those of the commands (chestct.errors): a sentence that says what is wrong with which file.
"""

import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from math import inf
from pathlib import Path
from typing import overload

import numpy as np

from chestct.config.schema import Config, WindowConfig
from chestct.errors import ConfigError, DataError
from chestct.imaging.decode import decode
from chestct.imaging.slice import Slice, windowed
from chestct.models.bundle import Bundle
from chestct.serving.batch import THREADS, answer_file, find_files
from chestct.serving.prediction import NOT_MEDICAL, Prediction
from chestct.serving.predictor import Predictor
from chestct.serving.scan import Scan, scans_in

BATCH = 16
"""Slices in one pass of the network: enough for an accelerator, few enough to hold."""

Source = str | Path | bytes | np.ndarray
"""A slice: a file's path, a file's bytes, or an array, see `Model.predict`."""

ELSEWHERE = ("models:/", "runs:/", "hf://")
"""How the names of bundles begin that lie in MLflow or on the hub."""


class Model:
    """A bundle that is ready to answer, on this machine's accelerator where there is one; any thread may ask it."""

    def __init__(self, source: str | Path = "packaged") -> None:
        self.predictor = Predictor(bundle_folder(str(source)))

    @property
    def bundle(self) -> Bundle:
        """Its parts, and in `card` when not to trust it."""
        return self.predictor.bundle

    @overload
    def predict(  # type: ignore[overload-overlap]  # a str is an iterable of str, too
        self, source: Source, *, spacing: tuple[float, float] | None = None
    ) -> Prediction: ...

    @overload
    def predict(self, source: Iterable[Source], *, spacing: tuple[float, float] | None = None) -> list[Prediction]: ...

    def predict(
        self, source: Source | Iterable[Source], *, spacing: tuple[float, float] | None = None
    ) -> Prediction | list[Prediction]:
        """The answer for a slice; for slices in a list, or in any other iterable, a list of answers, in batches.

        source: a path, the bytes of a file (PNG, JPEG, TIFF, BMP, WebP or DICOM, known by their content), or an array
        [H, W]: Hounsfield units as signed integers, which the bundle's window makes grey, or grey levels as uint8 or as
        floats in [0, 1]. spacing: millimetres between an array's rows and between its columns, for the size of regions.

        An answer holds its slice, some megabytes: give thousands in parts. Raises DecodeError, which names the file,
        for one that cannot be read, and DataError for whatever else is no slice.
        """
        read = partial(_slice, window=self.bundle.window, spacing=_millimetres(spacing))
        # Bytes and open files of other types are iterables of what is no slice.
        if isinstance(source, Source | bytearray | memoryview | io.IOBase) or not isinstance(source, Iterable):
            return self.predictor.predict_slices([read(source)])[0]
        answers: list[Prediction] = []
        sources = iter(source)
        with ThreadPoolExecutor(4) as pool:  # decoders let go of the interpreter
            while batch := list(islice(sources, BATCH)):
                answers += self.predictor.predict_slices(list(pool.map(read, batch)))
        return answers

    def predict_scan(self, *sources: str | Path) -> list[Scan]:
        """The scans in files, folders, zip archives of DICOM and NIfTI volumes: slices in order, and one score each.

        Series that are no scan, such as scouts, are there as well and say why in `left_out`. No picture is kept: give
        the path of a slice to `predict`. Raises DataError where there is no file; a file that cannot be read is left
        out of its scan.
        """
        if others := [type(source).__name__ for source in sources if not isinstance(source, str | Path)]:
            raise DataError(f"{others[0]} is no path. Of a list: predict_scan(*paths).")
        files, _ = find_files([Path(source) for source in sources], Path("scores.csv"))
        with ThreadPoolExecutor(THREADS) as pool:
            answers = list(pool.map(partial(answer_file, self.predictor), files))
        return scans_in(row for rows, _ in answers for row in rows)

    def __repr__(self) -> str:
        return f"<chestct model {self.bundle.id}: {' or '.join(self.bundle.classes)}. {NOT_MEDICAL}>"


def _millimetres(spacing: tuple[float, float] | None) -> tuple[float, float] | None:
    try:
        if spacing is None:
            return None
        rows, columns = map(float, spacing)
        if 0 < rows < inf and 0 < columns < inf:
            return rows, columns
    except (TypeError, ValueError):
        pass
    raise DataError(f"spacing={spacing!r}: give two numbers above 0, millimetres between rows and between columns.")


def _slice(source: object, window: WindowConfig, spacing: tuple[float, float] | None) -> Slice:
    if isinstance(source, str | Path | bytes):
        if spacing:
            raise DataError("spacing belongs to arrays; of a file, the file says it. Leave it out.")
        source = Path(source) if isinstance(source, str) else source
        # Path.is_dir would raise for a name that is too long, and for one in a closed folder.
        if isinstance(source, Path) and (os.path.isdir(source) or source.suffix.lower() == ".zip"):  # noqa: PTH112
            raise DataError(
                f"{source} holds many files: predict_scan takes folders and archives, predict lists of files."
            )
        return decode(source, window)
    if not isinstance(source, np.ndarray):
        raise DataError(
            f"{type(source).__name__} is no slice: give a path, the bytes of a file, a numpy array [H, W], or a list "
            "of these. Of a torch tensor that is tensor.numpy(force=True); of a picture of PIL's, the path of its file."
        )
    if source.ndim != 2 or not source.size:
        raise DataError(
            f"An array of shape {list(source.shape)} is no slice: give [H, W], or, for many, list(volume) of [N, H, W]."
        )
    source = np.asarray(source)  # a np.matrix has two dimensions whatever is done to it
    if source.dtype.kind == "i":
        source = windowed(source, window)
    if source.dtype.kind == "f" and source.min() >= 0 and source.max() <= 1:  # NaN is neither
        source = source.astype(np.float32)
    elif source.dtype != np.uint8:
        span = f" from {source.min():g} to {source.max():g}" if source.dtype.kind == "f" else ""
        raise DataError(
            f"An array of {source.dtype}{span} is neither uint8 nor floats in [0, 1]. Hounsfield units are given as "
            "signed integers: array.astype('int16')."
        )
    return Slice(source, "array", str(source.dtype), spacing=spacing)


def bundle_folder(source: str, cfg: Config | None = None) -> str:
    """The bundle's folder; MLflow, which takes seconds to import, only for a name elsewhere. Raises ConfigError."""
    if not source.startswith(ELSEWHERE):
        return source
    try:
        from chestct.config.compose import compose
        from chestct.tracking.registry import fetch_bundle

        return fetch_bundle(source, cfg or compose())
    except ModuleNotFoundError as error:  # as in the image
        raise ConfigError(f"bundle={source} needs {error.name}, which is not installed. Give a folder.") from None
