"""From a file to an answer and its pictures: decode, preprocess, network, decision, heat. Imports nothing that trains.

The network takes a slice at a time: on a processor a shared pass is no faster a slice, and more passes at once than the
backend has streams would fight for the same cores. Everything else happens in the caller's thread, within a budget of
pixels.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from chestct.errors import BusyError
from chestct.imaging.decode import declared_size, decode, decode_frames
from chestct.imaging.preprocess import Placement
from chestct.imaging.slice import Limits, Slice, pixel_hash
from chestct.models.backends import threads
from chestct.models.bundle import Bundle, load_bundle
from chestct.models.novelty import FOREIGN
from chestct.models.operating_point import NORMAL, REFUSED, UNCERTAIN, Outputs
from chestct.serving.prediction import Prediction

COLOR = 0.05
"""Mean chroma (see chestct.imaging.slice.Slice) above which an image is a colour photograph, not CT."""

SMALLEST = 64
"""Shorter side in pixels below which nothing can be seen on a slice."""

NEVER = threading.Event()
"""A request that nobody cancels."""

Gone = Callable[[], bool]
"""Whether nobody waits for an answer any more."""

OnAnswer = Callable[[Prediction], None]


class Predictor:
    """Answers for files. Safe to call from any number of threads.

    source: a bundle folder or `packaged`; limits: what a file may cost; seconds: how long a request may wait for room
    and the network together; pixels: how many may be decoded at once within `room`, each of which takes some 20 bytes;
    backend, accelerator: what computes, as `load_bundle` takes them; whole_process: whether torch is left one thread
    where another program computes, as threads of its that wait for work take the cores from it.
    """

    def __init__(
        self,
        source: str | Path = "packaged",
        limits: Limits = Limits(),  # noqa: B008 - frozen
        *,
        seconds: float = 24 * 3600.0,
        pixels: int = 128_000_000,
        backend: str = "auto",
        accelerator: str = "auto",
        whole_process: bool = False,
    ) -> None:
        self.limits, self.seconds, self.pixels = limits, seconds, pixels
        self.backend, self.accelerator = backend, accelerator
        self.whole_process = whole_process
        self.reload(source)
        self._free_pixels, self._pixels_changed = pixels, threading.Condition()

    @contextmanager
    def room(self, data: bytes, cancelled: threading.Event = NEVER) -> Iterator[Gone]:
        """Waits until there is room for a frame of this file, and holds it: predict, draw and drop the arrays within.

        Gives whether the request was cancelled, or has waited for longer than `seconds` by now. Raises DecodeError
        where the file's header is wrong or announces more than `limits`, and BusyError.
        """
        size = declared_size(data, self.limits, name="file")
        pixels = min(self.pixels, size.width * size.height)
        ends = time.monotonic() + self.seconds

        def gone() -> bool:
            return cancelled.is_set() or time.monotonic() > ends

        with self._pixels_changed:
            while self._free_pixels < pixels:
                if gone():
                    raise BusyError
                self._pixels_changed.wait(0.1)  # who hangs up does not notify
            self._free_pixels -= pixels
        try:
            yield gone
        finally:
            with self._pixels_changed:
                self._free_pixels += pixels
                self._pixels_changed.notify_all()

    def predict(
        self, source: Path | bytes, *, name: str | None = None, explain: bool = True, gone: Gone = NEVER.is_set
    ) -> Prediction:
        """The answer for a file; of one with several frames, for the one that `decode` chooses.

        name: of the file in errors; explain: with `heat`; gone: as `room` gives it, then no more work is done. DICOM is
        seen through the bundle's window. Raises DecodeError for whatever is wrong with the file, and BusyError.
        """
        bundle = self.bundle  # `reload` may come in between
        return self._answers(bundle, [decode(source, bundle.window, self.limits, name=name)], explain, gone)[0]

    def predict_frames(
        self, source: Path | bytes, *, name: str | None = None, explain: bool = True, bundle: Bundle | None = None
    ) -> Iterator[Prediction]:
        """The answer for each frame or page of a file in turn, as `predict` gives it; one frame is held at a time.

        bundle: this predictor's of a moment ago, for the further files of a request that began with it.
        """
        bundle = bundle or self.bundle
        for decoded in decode_frames(source, bundle.window, self.limits, name=name):
            yield self._answers(bundle, [decoded], explain, NEVER.is_set)[0]

    def predict_slices(self, slices: list[Slice]) -> list[Prediction]:
        """The answers for decoded slices with their heat, in one pass of the network."""
        return self._answers(self.bundle, slices, explain=True, gone=NEVER.is_set)

    def reload(self, source: str | Path) -> str:
        """Loads another bundle, or the same again, and returns its id; after a BundleError the old one stays."""
        self.bundle = load_bundle(source, self.backend, self.accelerator)
        self._network = threading.Semaphore(getattr(self.bundle.graph, "at_once", 1))
        if self.whole_process:
            torch.set_num_threads(1 if self.bundle.graph else threads())
        return self.bundle.id

    def _answers(self, bundle: Bundle, batch: list[Slice], explain: bool, gone: Gone) -> list[Prediction]:
        """The answers for decoded slices, in one pass of the network."""
        squares, places = zip(*(bundle.preprocess.placed(decoded.gray) for decoded in batch), strict=True)
        network, held = self._network, False  # `reload` replaces it
        while not held:
            if gone():
                raise BusyError
            held = network.acquire(timeout=0.1)
        try:
            answer = bundle.predict(np.stack(squares), explain)
        finally:
            network.release()
        return [_prediction(bundle, *part, answer, i) for i, part in enumerate(zip(batch, places, strict=True))]


def _prediction(bundle: Bundle, decoded: Slice, place: Placement, answer: Outputs, i: int) -> Prediction:
    """The i-th of a bundle's answers as that for a slice."""
    novelty = float(answer.novelty[i])
    sets = bundle.point.sets(answer.probabilities[i : i + 1])[0]
    possible = tuple(name for name, held in zip(bundle.classes, sets, strict=True) if held)
    refusal = why_refused(decoded, novelty)
    decision = REFUSED if refusal else str(answer.decision[i])
    return Prediction(
        score=float(answer.score[i]),
        decision=decision,
        reason=refusal or (_why_uncertain(bundle, possible, novelty) if decision == UNCERTAIN else ""),
        probabilities=dict(zip(bundle.classes, answer.probabilities[i].tolist(), strict=True)),
        possible=possible,
        novelty=novelty,
        known=pixel_hash(decoded.levels)[:16] in bundle.seen,
        heat_grid=None if answer.heat is None else answer.heat[i],
        slice=decoded,
        bundle=bundle.id,
        caveat=bundle.elsewhere,
        place=place,
    )


def why_refused(decoded: Slice, novelty: float) -> str:
    """Why no answer is given for a slice, in a sentence; "" where one is."""
    if decoded.unfit:
        return decoded.unfit
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
    fit, classes = f"At {bundle.point.coverage:.0%} coverage the score fits", " or ".join(possible)
    if not possible:
        return f"{fit} no class: it is unlike the validation slices of each."
    if len(possible) == 1 or NORMAL not in possible:  # one side alone
        return f"{fit} {classes} alone, which is not the side of the threshold that it lies on."
    return f"{fit} more than one answer: {classes}."
