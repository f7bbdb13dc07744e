"""From what a visitor of the page uploaded to what is shown of each slice: files out of archives, answers, pictures.

Archives are opened in memory, where a name can lead nowhere, and their directory is believed as little as any header.
One bad file spoils no other, in an archive neither, and of an answer only what is shown is kept.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from chestct.errors import ChestCTError, DataError, DecodeError
from chestct.files import digest
from chestct.imaging.decode import declared_size
from chestct.imaging.slice_files import entries
from chestct.models.bundle import Bundle
from chestct.serving.api import UploadError
from chestct.serving.batch import row_of
from chestct.serving.prediction import Prediction, jpeg_uri
from chestct.serving.predictor import OnAnswer, Predictor
from chestct.serving.scan import BEST, VALIDATION, Row, scans_in
from chestct.serving.sentences import capped, explanation, plain, verdict

logger = logging.getLogger("chestct.serving")

Content = bytes | DataError
"""The bytes of a file, or why it cannot be had."""

Files = list[tuple[str, Content]]
"""(name, content); names are as their owner calls them: shown to them, never logged."""


def take(files: list[dict[str, Any]], folder: Path, max_files: int, max_bytes: int) -> Files:
    """The uploads that Gradio names by `path` and `orig_name`; the folder has them no longer. Raises UploadError.

    max_files, max_bytes: all together; a client may list one upload many times, or several that were sent one by one.
    """
    paths = [Path(str(file.get("path") if isinstance(file, dict) else "")) for file in files or []]
    if any(path.parent != folder for path in paths):
        raise UploadError("This is no file that was uploaded.")
    try:
        if not paths:
            raise UploadError("No file came with it. Choose at least one.")
        if len(set(paths)) < len(paths):
            raise UploadError("The same upload is listed twice. Choose each file once.")
        _check_count(len(paths), max_files)
        if sum(path.stat().st_size for path in paths) > max_bytes:
            raise UploadError(f"These are more than {max_bytes:,} bytes. Send fewer files at once.")
        names = [str(file.get("orig_name") or "unnamed") for file in files]
        return [(name, path.read_bytes()) for name, path in zip(names, paths, strict=True)]
    except OSError:
        raise UploadError("The upload is no longer there. Choose the file again.") from None
    finally:
        for path in set(paths):
            path.unlink(missing_ok=True)


def expand(files: Files, max_slices: int, max_bytes: int) -> Files:
    """The files, archives opened, by name with numbers in order. Raises UploadError.

    max_slices: frames and pages counted by their headers; max_bytes: all together, inflated.
    """
    slices: Files = []
    for name, data in files:
        if isinstance(data, bytes) and data[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            left = max_bytes - sum(len(part) for _, part in slices if isinstance(part, bytes))
            try:
                slices += unzip(data, max_slices, left)
            except DataError as error:
                slices.append((name, error))
        else:
            slices.append((name, data))
    if not slices:
        raise UploadError("There is no file in it. Choose PNG, JPEG, TIFF or DICOM files, or a zip of them.")
    _check_count(sum(_frames(data) for _, data in slices), max_slices)
    return sorted(slices, key=lambda one: natural(one[0]))


def unzip(data: bytes, max_files: int, max_bytes: int) -> Files:
    """The files in an archive that may be slices. Raises UploadError, and DataError where it cannot be opened."""
    listed = entries(data)
    _check_count(len(listed), max_files)
    if sum(entry.info.file_size for entry in listed) > max_bytes:
        raise UploadError("The zip archive holds more bytes than one request may send. Give it to chestct predict.")
    files: Files = []
    for entry in listed:
        try:
            files.append((entry.info.filename, entry.read(max_bytes)))
        except DecodeError as error:
            files.append((entry.info.filename, error))
    return files


def _check_count(count: int, most: int) -> None:
    if count > most:
        raise UploadError(
            f"{count} slices at once; this service takes up to {most}. Send fewer, or use the command line for whole "
            "folders: chestct predict."
        )


def _frames(data: Content) -> int:
    try:
        return declared_size(data).frames if isinstance(data, bytes) else 1
    except DecodeError:  # decoding will say why
        return 1


def natural(name: str) -> list[tuple[str, int]]:
    """Sorting key in which `slice 9` comes before `slice 10`."""
    return [(text, int(digits[:18] or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name.lower())]


@dataclass(frozen=True)
class Reading:
    """What is shown of one slice. Texts are Markdown, pictures data URIs or "" for none."""

    name: str
    row: Row  # as in the table of `chestct predict`
    verdict: str
    why: str = ""
    threshold: float = 0.0
    slice: str = ""
    heat: str = ""

    @property
    def decision(self) -> str:
        return self.row["decision"]

    @property
    def score(self) -> float:
        return float(self.row.get("score", 0))

    @property
    def suspicion(self) -> tuple[int, float]:
        """Highest for the slice to show first: by score among those answered, then among the refused."""
        return {"unreadable": 0, "refused": 1}.get(self.decision, 2), self.score


def read(
    predictor: Predictor, bundle: Bundle, name: str, data: Content, on_answer: OnAnswer | None = None
) -> list[Reading]:
    """The readings of one file. A frame that cannot be read ends it, and those before it stay.

    bundle: one for all files of a request, whatever the predictor loads meanwhile.
    """
    readings: list[Reading] = []
    frames = _frames(data)
    try:
        if isinstance(data, DataError):
            raise data
        file_hash = digest(data)
        with predictor.room(data):
            for prediction in predictor.predict_frames(data, name="file", bundle=bundle):
                if on_answer:
                    on_answer(prediction)
                shown = name if frames == 1 else f"{name}, frame {len(readings) + 1}"
                readings.append(_reading(bundle, shown, prediction, file_hash))
        return readings
    except DecodeError as error:
        message = f"This file cannot be read: {error.reason}."
    except ChestCTError as error:
        message = str(error)
    except Exception:
        logger.exception("an answer failed")
        message = "Something went wrong with this file on our side. It was noted in the log."
    return [*readings, Reading(name, {"decision": "unreadable"}, plain(message))]


def _reading(bundle: Bundle, name: str, prediction: Prediction, file_hash: str) -> Reading:
    heat = prediction.overlay()
    return Reading(
        name,
        row_of(name, prediction) | {"file_hash": file_hash},
        verdict(prediction, bundle),
        explanation(prediction, bundle),
        bundle.point.threshold,
        jpeg_uri(Image.fromarray(prediction.gray)),
        jpeg_uri(heat) if heat else "",
    )


def scan_of(readings: list[Reading]) -> tuple[list[Reading], str]:
    """The answered slices of the series with most of them, and what is said of it; none and "" where it is no scan."""
    scan = max(scans_in(reading.row for reading in readings), key=lambda scan: len(scan.answered), default=None)
    if not scan or scan.score is None:  # as one that is left out
        return [], ""
    rows = {id(row) for row in scan.answered}
    others = len(readings) - len(rows)
    rest = f" {others} other images are left out of it." if others else ""
    score = f"score {capped(scan.score):.2f}: the mean of its {BEST} highest"
    about = f"Scan of {len(rows)} slices, {score}.{rest} {VALIDATION}"
    return [reading for reading in readings if id(reading.row) in rows], about
