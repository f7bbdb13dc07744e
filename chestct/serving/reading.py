"""From what a visitor of the page uploaded to what is shown of each slice: files out of archives, answers, pictures.

Archives are opened in memory, where a name can lead nowhere, and their directory is believed as little as any header.
One bad file spoils no other, and of an answer only what is shown is kept.
"""

import io
import logging
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from chestct.errors import ChestCTError, DecodeError
from chestct.imaging.decode import Size, declared_size
from chestct.imaging.slice_files import is_slice_name
from chestct.models.bundle import Bundle
from chestct.serving.api import UploadError
from chestct.serving.prediction import Prediction, jpeg_uri
from chestct.serving.predictor import OnAnswer, Predictor
from chestct.serving.scan import BEST, FEWEST, VALIDATION, scan_score
from chestct.serving.sentences import UNREADABLE, explanation, headline, plain, score_name, verdict

logger = logging.getLogger("chestct.serving")

Files = list[tuple[str, bytes]]
"""(name, bytes); names are as their owner calls them: shown to them, never logged."""


def take(files: list[dict[str, Any]], folder: Path) -> Files:
    """The uploads that Gradio names by `path` and `orig_name`; the folder has them no longer. Raises UploadError."""
    paths = [Path(str(file.get("path") if isinstance(file, dict) else "")) for file in files or []]
    if any(path.parent != folder for path in paths):
        raise UploadError("This is no file that was uploaded.")
    try:
        if not paths:
            raise UploadError("No file came with it. Choose at least one.")
        names = [str(file.get("orig_name") or "unnamed") for file in files]
        return [(name, path.read_bytes()) for name, path in zip(names, paths, strict=True)]
    except OSError:
        raise UploadError("The upload is no longer there. Choose the file again.") from None
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def expand(files: Files, max_slices: int, max_bytes: int) -> Files:
    """The files, archives opened, in the order of the scan. Raises UploadError.

    That is by position (see `Size`); files that have none, whatever they are, come last, by name with numbers in order.
    max_slices: frames and pages counted by their headers; max_bytes: all together, inflated.
    """
    slices: Files = []
    for name, data in files:
        left = max_bytes - sum(len(part) for _, part in slices)
        slices += (
            unzip(data, max_slices, max(0, left)) if data[:4] in (b"PK\x03\x04", b"PK\x05\x06") else [(name, data)]
        )
    if not slices:
        raise UploadError("There is no file in it. Choose PNG, JPEG, TIFF or DICOM files, or a zip of them.")
    headers = [_header(data) for _, data in slices]
    _check_count(sum(header.frames for header in headers), max_slices)
    order = sorted(
        range(len(slices)),
        key=lambda i: (not headers[i].position, headers[i].position or (), natural(slices[i][0])),
    )
    return [slices[i] for i in order]


def unzip(data: bytes, max_files: int, max_bytes: int) -> Files:
    """The files in an archive; folders and what `slice_files` skips are left out. Raises UploadError."""
    files: Files = []
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [entry for entry in archive.infolist() if is_slice_name(entry.filename)]
            _check_count(len(entries), max_files)
            for entry in entries:
                with archive.open(entry) as file:
                    content = file.read(max_bytes + 1)  # whatever size is announced
                max_bytes -= len(content)
                if max_bytes < 0:
                    raise UploadError("The zip archive holds more bytes than one request may send.")
                files.append((entry.filename, content))
    except UploadError:
        raise
    except Exception as error:  # whatever wrong bytes lead zipfile and zlib to
        reason = error or type(error).__name__
        raise UploadError(f"The zip archive cannot be opened ({reason}). Make it again, without a password.") from None
    return files


def _check_count(count: int, most: int) -> None:
    if count > most:
        raise UploadError(
            f"{count} slices at once; this service takes up to {most}. Send fewer, or use the command line for whole "
            "folders: chestct predict."
        )


def _header(data: bytes) -> Size:
    try:
        return declared_size(data)
    except DecodeError:  # decoding will say why
        return Size(0, 0, 1)


def natural(name: str) -> list[tuple[str, int]]:
    """Sorting key in which `slice 9` comes before `slice 10`."""
    return [(text, int(digits[:18] or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name.lower())]


@dataclass(frozen=True)
class Reading:
    """What is shown of one slice. Texts are Markdown, pictures data URIs or "" for none."""

    name: str
    decision: str  # as in Prediction, or unreadable
    verdict: str
    headline: str = UNREADABLE
    score_name: str = ""
    why: str = ""
    score: float = 0.0
    threshold: float = 0.0
    slice: str = ""
    heat: str = ""
    series: str = ""  # as in Slice

    @property
    def suspicion(self) -> tuple[int, float]:
        """Highest for the slice to show first: by score among those answered, then among the refused."""
        return {"unreadable": 0, "refused": 1}.get(self.decision, 2), self.score


def read(predictor: Predictor, name: str, data: bytes, on_answer: OnAnswer | None = None) -> list[Reading]:
    """The readings of one file. A frame that cannot be read ends it, and those before it stay."""
    readings: list[Reading] = []
    frames = _header(data).frames
    try:
        with predictor.room(data):
            for prediction in predictor.predict_frames(data, name="file"):
                if on_answer:
                    on_answer(prediction)
                shown = name if frames == 1 else f"{name}, frame {len(readings) + 1}"
                readings.append(_reading(predictor.bundle, shown, prediction))
        return readings
    except DecodeError as error:
        message = f"This file cannot be read: {error.reason}."
    except ChestCTError as error:
        message = str(error)
    except Exception:
        logger.exception("an answer failed")
        message = "Something went wrong with this file on our side. It was noted in the log."
    return [*readings, Reading(name, "unreadable", plain(message))]


def _reading(bundle: Bundle, name: str, prediction: Prediction) -> Reading:
    heat = prediction.overlay()
    return Reading(
        name,
        prediction.decision,
        verdict(prediction, bundle),
        headline(prediction.decision, bundle),
        score_name(bundle),
        explanation(prediction, bundle),
        prediction.score,
        bundle.point.threshold,
        jpeg_uri(Image.fromarray(prediction.gray)),
        jpeg_uri(heat) if heat else "",
        prediction.slice.series,
    )


def scan_of(readings: list[Reading]) -> tuple[list[Reading], str]:
    """The answered slices of the series with most of them, and what is said of it; none and "" where it is no scan."""
    series: dict[str, list[Reading]] = {}
    for reading in readings:
        if reading.series and reading.suspicion[0] == 2:
            series.setdefault(reading.series, []).append(reading)
    scan = max(series.values(), key=len, default=[])
    if len(scan) < FEWEST:
        return [], ""
    score = scan_score([reading.score for reading in scan])
    others = len(readings) - len(scan)
    rest = f" {others} other images are left out of it." if others else ""
    return scan, f"Scan of {len(scan)} slices, score {score:.2f}: the mean of its {BEST} highest.{rest} {VALIDATION}"
