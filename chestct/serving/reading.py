"""From the files of one request to what is shown of each slice: read, ask, draw; one bad file spoils no other.

Slices are scored a few at a time, so that they share forward passes, and what is large about an answer is dropped
as soon as its pictures are drawn.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from chestct.errors import ChestCTError, DecodeError
from chestct.serving.pictures import Pictures, hounsfield_frames
from chestct.serving.predictor import BusyError, Prediction, Predictor
from chestct.serving.uploads import Upload, frame_count, too_many

logger = logging.getLogger("chestct.serving")

AT_ONCE = 4

MANY = 12
"""Slices from which on pictures are made smaller, so that a series stays within some megabytes."""

NOTHING = np.zeros((0, 0), np.uint8)

OnAnswer = Callable[[Prediction], None]


@dataclass(frozen=True)
class Reading:
    """What is shown of one slice: an answer, or why there is none.

    prediction: without its arrays; error: why there is none, else "".
    """

    name: str
    prediction: Prediction | None = None
    error: str = ""
    pictures: Pictures | None = None

    @property
    def decision(self) -> str:
        """The decision, or `unreadable`."""
        return self.prediction.decision if self.prediction else "unreadable"


def read_all(
    predictor: Predictor, uploads: list[Upload], max_slices: int, seconds: float, on_answer: OnAnswer | None = None
) -> Iterator[list[Reading]]:
    """The readings of each file in turn, as they become ready.

    seconds: for all together; what has not begun by then gets an error of its own. Raises UploadError where files of
    several frames make more than `max_slices`.
    """
    counts = [frame_count(upload.data, max_slices) for upload in uploads]
    if sum(counts) > max_slices:
        raise too_many(sum(counts), max_slices)
    ends = time.monotonic() + seconds
    side = 384 if sum(counts) >= MANY else 768
    cancelled = threading.Event()
    with ThreadPoolExecutor(AT_ONCE, "reading") as pool:
        try:
            yield from pool.map(lambda upload: _read(predictor, upload, side, ends, on_answer, cancelled), uploads)
        finally:
            cancelled.set()  # where a visitor leaves before the last one


def _read(
    predictor: Predictor,
    upload: Upload,
    side: int,
    ends: float,
    on_answer: OnAnswer | None,
    cancelled: threading.Event,
) -> list[Reading]:
    """The readings of one file. A frame that cannot be read ends it, and those before it stay."""
    read: list[Reading] = []
    try:
        with predictor.room(upload.data, every=True, cancelled=cancelled):
            units = hounsfield_frames(upload.data, predictor.limits)
            for prediction in _in_time(predictor.predict_frames(upload.data, name="file", cancelled=cancelled), ends):
                name = f"{upload.name}, frame {len(read) + 1}"
                read.append(_drawn(name, prediction, side, next(units, None), on_answer))
        if len(read) == 1:
            read = [dataclasses.replace(read[0], name=upload.name)]
        return read
    except DecodeError as error:
        logger.info("unreadable file")
        message = f"This file cannot be read: {error.reason}."
    except ChestCTError as error:
        logger.warning("no answer: %s", error)
        message = str(error)
    except Exception:
        logger.exception("an answer failed")
        message = "Something went wrong with this file on our side. It was noted in the log."
    return [*read, Reading(upload.name, error=message)]


def _in_time(answers: Iterator[Prediction], ends: float) -> Iterator[Prediction]:
    while True:
        if time.monotonic() > ends:
            raise BusyError("No time was left for this slice. Send fewer at once.")
        if (prediction := next(answers, None)) is None:
            return
        yield prediction


def _drawn(
    name: str, prediction: Prediction, side: int, hounsfield: np.ndarray | None, on_answer: OnAnswer | None
) -> Reading:
    record(prediction, on_answer)
    light = dataclasses.replace(
        prediction,
        gray=NOTHING,
        heat=None,
        slice=dataclasses.replace(prediction.slice, levels=NOTHING, patient="", study=""),
    )
    return Reading(name, light, "", Pictures.of(prediction, hounsfield, side))


def record(prediction: Prediction, on_answer: OnAnswer | None) -> None:
    """Passes an answer on to whoever counts or records it; their trouble is not the asker's."""
    if on_answer is None:
        return
    try:
        on_answer(prediction)
    except Exception:
        logger.exception("an answer could not be recorded")


def most_suspicious(readings: list[Reading]) -> int:
    """Index of the slice to show first: the highest score among those answered, then among the refused."""

    def rank(i: int) -> tuple[int, float]:
        prediction = readings[i].prediction
        return (0, 0.0) if prediction is None else (1 if prediction.decision == "refused" else 2, prediction.score)

    return max(range(len(readings)), key=lambda i: (rank(i), -i))
