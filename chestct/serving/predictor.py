"""From a file to an answer: decode, preprocess, network, decision, heat map. Imports torch, and nothing that trains.

One thread runs the network for everybody: requests that wait at the same time share a forward pass, and two passes
never fight for the same cores. Everything else happens in the caller's thread, within a budget of pixels.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, TimeoutError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from chestct.errors import ChestCTError, DecodeError
from chestct.imaging.decode import declared_size, decode, decode_frames
from chestct.imaging.slice import Limits, Slice, pixel_hash
from chestct.imaging.statistics import image_statistics
from chestct.models.bundle import Bundle, Outputs, load_bundle
from chestct.models.novelty import FOREIGN
from chestct.models.operating_point import REFUSED, UNCERTAIN
from chestct.models.saliency import heat_to_slice, placement

COLOR = 0.05
"""Mean chroma (see chestct.imaging.slice.Slice) above which an image is a colour photograph, not CT."""

SMALLEST = 64
"""Shorter side in pixels below which nothing can be seen on a slice."""

FRAMES_AHEAD = 4
"""Frames of a file that are decoded before the first is answered: they share forward passes, and no more are held."""

NOT_MEDICAL = "Research use only. Not a medical device: do not use it for diagnosis or treatment."

CLOSING = "The service is shutting down. Try again in a minute."
BUSY = "The service is busy: too many slices are waiting. Try again in a minute."

NEVER = threading.Event()
"""A request that nobody cancels."""


class BusyError(ChestCTError):
    """More requests wait than the service takes on, or one took too long, or was given up by whoever sent it."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer for one slice."""

    score: float  # calibrated P(cancer), in [0, 1]; given for refused slices too, where it means little
    decision: str  # cancer, normal, uncertain or refused
    reason: str  # of a refusal or an uncertainty, else ""
    probabilities: dict[str, float]  # calibrated P(class)
    possible: tuple[str, ...]  # conformal set: classes that cannot be excluded at the bundle's coverage
    novelty: float  # distance to the training data; uncertain above 1, refused above FOREIGN
    known: bool  # whether this very slice was in train or valid
    gray: np.ndarray  # uint8 [H, W], as decoded
    heat: np.ndarray | None  # float32 [H, W] in [0, 1], evidence for cancer; all zero where there is none
    slice: Slice
    statistics: dict[str, float]  # chestct.imaging.statistics
    seconds: dict[str, float]  # decode, wait (for the network and in it), draw
    bundle: str  # id of the bundle that answered


@dataclass(eq=False)
class _Job:
    bundle: Bundle
    square: np.ndarray
    explain: bool
    cancelled: threading.Event
    answer: "Future[Outputs]"


class Predictor:
    """Answers for files. Safe to call from any number of threads; `close` ends its own.

    source: a bundle folder or `packaged`. limits: what a file may cost. batch: slices a forward pass at most; waiting:
    slices that may wait at once; seconds: how long one may take before the caller gets a BusyError; pixels: how many
    may be decoded at once within `room`, each of which takes some 20 bytes until its answer is drawn.
    """

    def __init__(
        self,
        source: str | Path = "packaged",
        limits: Limits = Limits(),  # noqa: B008 - frozen
        *,
        batch: int = 8,
        waiting: int = 256,
        seconds: float = 60.0,
        pixels: int = 128_000_000,
    ) -> None:
        self.source, self.limits, self.batch, self.seconds, self.pixels = source, limits, batch, seconds, pixels
        self.bundle = load_bundle(source)
        self._free_pixels, self._pixels_changed = pixels, threading.Condition()
        self._closed = False
        self._jobs: queue.Queue[_Job | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._work, name="predictor", daemon=True)
        self._thread.start()

    @contextmanager
    def room(self, data: bytes, *, every: bool = False, cancelled: threading.Event = NEVER) -> Iterator[None]:
        """Waits until there is room for a file's pixels, and holds it: predict, draw and drop the arrays within.

        every: room for the frames that `predict_frames` holds. Raises DecodeError where the file's header is wrong or
        announces more than `limits`, and BusyError.
        """
        width, height, frames = declared_size(data, self.limits, name="file")
        pixels = min(self.pixels, width * height * (min(frames, FRAMES_AHEAD) if every else 1))
        ends = time.monotonic() + self.seconds
        with self._pixels_changed:
            while self._free_pixels < pixels:
                if cancelled.is_set() or time.monotonic() > ends:
                    raise BusyError(BUSY)
                self._pixels_changed.wait(0.1)
            self._free_pixels -= pixels
        try:
            yield
        finally:
            with self._pixels_changed:
                self._free_pixels += pixels
                self._pixels_changed.notify_all()

    def predict(
        self, source: Path | bytes, *, name: str | None = None, explain: bool = True, cancelled: threading.Event = NEVER
    ) -> Prediction:
        """The answer for a file; of one with several frames or pages, for the one that `decode` chooses.

        name: what the file is called in errors; cancelled: once set, no more work is done for this request. DICOM is
        seen through the bundle's window, whatever a viewer shows. Raises DecodeError for whatever is wrong with the
        file, and BusyError.
        """
        window = self.bundle.window
        return next(self._answers(lambda: iter([decode(source, window, self.limits, name=name)]), explain, cancelled))

    def predict_frames(
        self, source: Path | bytes, *, name: str | None = None, explain: bool = True, cancelled: threading.Event = NEVER
    ) -> Iterator[Prediction]:
        """The answer for each frame or page of a file in turn, as `predict` gives it; FRAMES_AHEAD are held at most."""
        window = self.bundle.window
        return self._answers(lambda: decode_frames(source, window, self.limits, name=name), explain, cancelled)

    def _answers(
        self, slices: Callable[[], Iterator[Slice]], explain: bool, cancelled: threading.Event
    ) -> Iterator[Prediction]:
        bundle = self.bundle  # one for the whole file, though `reload` may come in between
        ahead: deque[tuple[Slice, _Job, float]] = deque()
        broken: DecodeError | None = None
        begun = time.perf_counter()
        try:
            for decoded in slices() if not cancelled.is_set() else ():
                job = self._submit(_Job(bundle, bundle.preprocess(decoded.gray), explain, cancelled, Future()))
                ahead.append((decoded, job, time.perf_counter() - begun))
                if len(ahead) == FRAMES_AHEAD:
                    yield self._prediction(*ahead.popleft())
                begun = time.perf_counter()
        except DecodeError as error:
            broken = error  # the frames before it are good
        while ahead:
            yield self._prediction(*ahead.popleft())
        if cancelled.is_set():
            raise BusyError(BUSY)
        if broken:
            raise broken

    def reload(self, source: str | Path | None = None) -> str:
        """Loads the bundle again, from where it lies or from `source`; requests under way end with the old one.

        Returns the id of the bundle now in use. Raises BundleError, and the old one stays.
        """
        source = source or self.source
        self.bundle, self.source = load_bundle(source), source
        return self.bundle.id

    def close(self) -> None:
        """Lets what is waiting be answered, then ends the thread; later requests get a BusyError."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join()
        while not self._jobs.empty():
            if job := self._jobs.get():
                job.answer.set_exception(BusyError(CLOSING))

    def _submit(self, job: _Job) -> _Job:
        if self._closed:
            raise BusyError(CLOSING)
        try:
            self._jobs.put(job, timeout=self.seconds)
        except queue.Full:
            raise BusyError(BUSY) from None
        return job

    def _prediction(self, decoded: Slice, job: _Job, decode_seconds: float) -> Prediction:
        begun, bundle = time.perf_counter(), job.bundle
        try:
            answer = job.answer.result(self.seconds)
        except CancelledError:
            raise BusyError(BUSY) from None
        except TimeoutError:
            job.answer.cancel()
            raise BusyError(f"No answer within {self.seconds:.0f} s: the service is busy. Try again.") from None
        answered = time.perf_counter()
        gray = (decoded.gray * 255 + 0.5).astype(np.uint8)
        heat = None
        if answer.heat is not None:
            heat = heat_to_slice(torch.from_numpy(answer.heat[0]), gray.shape, placement(gray, bundle.preprocess))
        novelty = float(answer.novelty[0])
        sets = bundle.point.sets(answer.probabilities)[0]
        possible = tuple(name for name, held in zip(bundle.classes, sets, strict=True) if held)
        refusal = why_refused(decoded, novelty)
        decision = REFUSED if refusal else str(answer.decision[0])
        return Prediction(
            score=float(answer.score[0]),
            decision=decision,
            reason=refusal or (_why_uncertain(bundle, possible, novelty) if decision == UNCERTAIN else ""),
            probabilities=dict(zip(bundle.classes, answer.probabilities[0].tolist(), strict=True)),
            possible=possible,
            novelty=novelty,
            known=pixel_hash(decoded.levels)[:16] in bundle.seen,
            gray=gray,
            heat=heat,
            slice=decoded,
            statistics=image_statistics(decoded.gray),
            seconds={"decode": decode_seconds, "wait": answered - begun, "draw": time.perf_counter() - answered},
            bundle=bundle.id,
        )

    def _work(self) -> None:
        """Takes what waits, up to a batch, and answers it."""
        while (job := self._jobs.get()) is not None:
            jobs = [job]
            with suppress(queue.Empty):
                while len(jobs) < self.batch and (job := self._jobs.get_nowait()) is not None:
                    jobs.append(job)
            for waiting in jobs:
                if waiting.cancelled.is_set():
                    waiting.answer.cancel()
            for bundle in {id(waiting.bundle): waiting.bundle for waiting in jobs}.values():
                _answer([one for one in jobs if one.bundle is bundle and one.answer.set_running_or_notify_cancel()])
            if job is None:
                return


def _answer(jobs: list[_Job]) -> None:
    """One forward pass for jobs of one bundle."""
    if not jobs:
        return
    try:
        outputs = jobs[0].bundle.predict(np.stack([job.square for job in jobs]), any(job.explain for job in jobs))
    except Exception as error:  # whatever it is belongs to the callers, not to this thread
        for job in jobs:
            job.answer.set_exception(error)
        return
    for i, job in enumerate(jobs):
        heat = outputs.heat[i : i + 1] if outputs.heat is not None and job.explain else None
        part = slice(i, i + 1)
        job.answer.set_result(
            Outputs(
                outputs.logits[part], outputs.probabilities[part], outputs.decision[part], outputs.novelty[part], heat
            )
        )


def why_refused(decoded: Slice, novelty: float) -> str:
    """Why no answer is given for a slice, in a sentence; "" where one is."""
    if decoded.modality not in ("", "CT"):
        return f"This DICOM file is not CT: its modality is {decoded.modality}."
    if decoded.color > COLOR:
        return "This is a colour image, and CT slices are grey."
    if min(decoded.gray.shape) < SMALLEST:
        height, width = decoded.gray.shape
        return f"This image is too small: {width} x {height} pixels, at least {SMALLEST} a side are needed."
    if novelty > FOREIGN:
        return (
            f"This image is unlike the chest CT slices that the model knows: its distance to them is {novelty:.2f}, "
            f"and beyond {FOREIGN:.2f} the score means nothing."
        )
    return ""


def _why_uncertain(bundle: Bundle, possible: tuple[str, ...], novelty: float) -> str:
    if novelty > 1:
        return (
            f"This slice is further from the training slices than 99 of 100 of validation are: {novelty:.2f}, where "
            "1.00 is the mark."
        )
    share = f"{bundle.point.coverage:.0%}"
    if not possible:
        return f"At {share} coverage the score fits no class: it is unlike the validation slices of each."
    return f"At {share} coverage the score fits more than one answer: {' or '.join(possible)}."
