import io
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chestct.errors import BundleError, DecodeError
from chestct.imaging.decode import decode
from chestct.imaging.slice import Limits, Slice, pixel_hash
from chestct.models.bundle import FACTS
from chestct.serving.api import answer
from chestct.serving.predictor import FRAMES_AHEAD, BusyError, Predictor, why_refused
from tests.models.test_bundle import make


def png(seed: int, size: int = 96, mode: str = "L") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(small_bundle: Path) -> Path:
    return small_bundle


@pytest.fixture
def predictor(folder: Path):
    made = Predictor(folder)
    yield made
    made.close()


def test_a_file_gets_the_numbers_that_the_bundle_gives_its_square(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    result = predictor.predict(tmp_path / "a.png")
    square = predictor.bundle.preprocess(decode(png(1), predictor.bundle.window).gray)
    direct = predictor.bundle.predict(square[None], explain=True)
    assert result.score == pytest.approx(direct.score[0], abs=1e-6)
    assert result.novelty == pytest.approx(direct.novelty[0], abs=1e-4)
    assert result.heat is not None
    assert result.heat.shape == result.gray.shape == (96, 96)
    assert result.bundle == predictor.bundle.id
    assert set(result.seconds) == {"decode", "wait", "draw"}


def test_concurrent_callers_get_their_own_answers_in_shared_passes(predictor: Predictor) -> None:
    expected = [predictor.predict(png(seed), explain=False).score for seed in range(12)]
    passes: list[int] = []
    real = predictor.bundle.predict
    object.__setattr__(predictor.bundle, "predict", lambda x, explain: passes.append(len(x)) or real(x, explain))
    with ThreadPoolExecutor(12) as pool:
        result = list(pool.map(lambda i: predictor.predict(png(i % 12)), range(60)))
    assert [one.score for one in result] == pytest.approx([expected[i % 12] for i in range(60)], abs=1e-5)
    assert sum(passes) == 60
    assert max(passes) > 1


def test_every_page_of_a_file_is_answered(predictor: Predictor) -> None:
    pages = [Image.open(io.BytesIO(png(seed))) for seed in range(3)]
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    result = list(predictor.predict_frames(file.getvalue()))
    assert [one.slice.frame for one in result] == [0, 1, 2]
    assert [one.score for one in result] == pytest.approx(
        [predictor.predict(png(seed)).score for seed in range(3)], abs=1e-5
    )


def test_of_a_file_with_many_frames_only_a_few_are_held(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Slice] = weakref.WeakSet()

    def frames(*_: object, **__: object) -> Iterator[Slice]:
        for i in range(40):
            result = decode(png(i), predictor.bundle.window)
            alive.add(result)
            yield result

    monkeypatch.setattr("chestct.serving.predictor.decode_frames", frames)
    held = [len(alive) for _ in predictor.predict_frames(b"")]
    assert len(held) == 40
    assert max(held) <= FRAMES_AHEAD + 2


def test_a_file_that_ends_in_rubbish_is_answered_up_to_there(predictor: Predictor) -> None:
    file = io.BytesIO()
    pages = [Image.open(io.BytesIO(png(seed))) for seed in range(6)]
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    answers = predictor.predict_frames(file.getvalue()[:-20_000], name="scan.tiff")
    assert next(answers).slice.frame == 0
    with pytest.raises(DecodeError, match=r"scan\.tiff"):
        list(answers)


@pytest.mark.parametrize("data", [b"", b"rubbish", png(0)[:200]])
def test_rubbish_is_one_clear_error_and_the_predictor_lives_on(predictor: Predictor, data: bytes) -> None:
    with pytest.raises(DecodeError, match=r"scan\.png"):
        predictor.predict(data, name="scan.png")
    assert predictor.predict(png(0))


def test_limits_are_those_of_the_predictor(folder: Path) -> None:
    predictor = Predictor(folder, Limits(max_pixels=1000))
    with pytest.raises(DecodeError, match="max_pixels"):
        predictor.predict(png(0))
    predictor.close()


def test_slices_of_the_training_data_are_known_again(folder: Path) -> None:
    predictor = Predictor(folder)
    seen = pixel_hash(decode(png(3), predictor.bundle.window).gray)[:16]
    predictor.bundle.facts["data"]["seen"].append(seen)
    assert predictor.predict(png(3)).known
    assert not predictor.predict(png(4)).known
    predictor.close()


def gray(height: int = 100, width: int = 100) -> np.ndarray:
    return np.zeros((height, width), np.float32)


@pytest.mark.parametrize(
    ("result", "novelty", "reason"),
    [
        (Slice(gray(), "PNG", "RGB", color=0.3), 0.5, "colour"),
        (Slice(gray(), "DICOM", "DICOM", modality="MR"), 0.5, "not CT"),
        (Slice(gray(20), "PNG", "L"), 0.5, "too small"),
        (Slice(gray(), "PNG", "L"), 1.7, "1.70"),
        (Slice(gray(), "DICOM", "DICOM", modality="CT"), 0.99, ""),
    ],
)
def test_what_is_no_chest_ct_is_refused_with_its_reason(result: Slice, novelty: float, reason: str) -> None:
    assert (reason in why_refused(result, novelty)) if reason else not why_refused(result, novelty)


def test_a_failing_network_fails_the_request_and_not_the_predictor(predictor: Predictor) -> None:
    real = predictor.bundle.predict

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    object.__setattr__(predictor.bundle, "predict", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        predictor.predict(png(0))
    object.__setattr__(predictor.bundle, "predict", real)
    assert predictor.predict(png(0))


def test_who_waits_too_long_is_told_so(folder: Path) -> None:
    predictor = Predictor(folder, seconds=0.2, waiting=1, batch=1)
    started = threading.Event()
    real = predictor.bundle.predict

    def slow(*arguments: object):
        started.set()
        time.sleep(1.0)
        return real(*arguments)

    object.__setattr__(predictor.bundle, "predict", slow)
    with pytest.raises(BusyError):
        predictor.predict(png(0))
    predictor.close()


def test_reloading_takes_the_new_bundle_and_keeps_the_old_one_if_it_is_bad(tmp_path: Path) -> None:
    make(tmp_path / "b")
    predictor = Predictor(tmp_path / "b")
    before = predictor.bundle.id
    make(tmp_path / "b", classes=4)
    after = predictor.reload()
    assert after != before
    assert set(predictor.predict(png(0)).probabilities) == {"normal", "adenocarcinoma", "large_cell", "squamous"}
    (tmp_path / "b" / FACTS).write_text("{")
    with pytest.raises(BundleError):
        predictor.reload()
    assert predictor.predict(png(0)).bundle == after
    predictor.close()


def held(predictor: Predictor) -> threading.Event:
    """The network of its bundle waits for this event."""
    gate, real = threading.Event(), predictor.bundle.predict

    def gated(*arguments: object):
        assert gate.wait(30)
        return real(*arguments)

    object.__setattr__(predictor.bundle, "predict", gated)
    return gate


def test_requests_under_way_end_with_the_bundle_they_began_with(tmp_path: Path) -> None:
    make(tmp_path / "old")
    make(tmp_path / "new", classes=4)
    predictor = Predictor(tmp_path / "old", batch=1)
    before, gate = predictor.bundle.id, held(predictor)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(predictor.predict, png(seed)) for seed in range(4)]
        while predictor._jobs.qsize() < 3:
            time.sleep(0.01)
        after = predictor.reload(tmp_path / "new")
        later = pool.submit(predictor.predict, png(9))
        gate.set()
        assert {job.result(30).bundle for job in waiting} == {before}
    assert later.result().bundle == after != before
    predictor.close()


def test_closing_answers_what_waits_and_nothing_after(folder: Path) -> None:
    predictor = Predictor(folder, batch=1)
    gate = held(predictor)
    with ThreadPoolExecutor(7) as pool:
        waiting = [pool.submit(predictor.predict, png(seed)) for seed in range(6)]
        while predictor._jobs.qsize() < 5:  # one is in the network
            time.sleep(0.01)
        closing = pool.submit(predictor.close)
        gate.set()
        closing.result(30)
        assert all(job.result(10) for job in waiting)
    with pytest.raises(BusyError, match="shutting down"):
        predictor.predict(png(0))


def test_pixels_in_flight_have_a_budget(folder: Path) -> None:
    predictor = Predictor(folder, pixels=2 * 96 * 96)
    inside, most, lock = 0, 0, threading.Lock()

    def work(data: bytes) -> str:
        nonlocal inside, most
        with predictor.room(data):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1
            return predictor.predict(data).decision

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(work, [png(seed) for seed in range(12)]))) == 12
    assert most == 2
    with predictor.room(png(0, 200)):  # more than the whole budget: let in alone
        pass
    predictor.close()


def test_who_waits_for_room_too_long_is_told_so(folder: Path) -> None:
    predictor = Predictor(folder, pixels=96 * 96, seconds=0.2)
    with predictor.room(png(0)), pytest.raises(BusyError), predictor.room(png(1)):
        pass
    with predictor.room(png(1)):  # the first has left
        pass
    predictor.close()


def test_a_cancelled_request_costs_no_more_work(folder: Path) -> None:
    predictor = Predictor(folder, batch=1, pixels=10 * 96 * 96)
    passes: list[int] = []
    gate, real = threading.Event(), predictor.bundle.predict

    def gated(x: np.ndarray, explain: bool):
        passes.append(len(x))
        assert gate.wait(30)
        return real(x, explain)

    object.__setattr__(predictor.bundle, "predict", gated)
    cancelled = threading.Event()
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(predictor.predict, png(0))
        while not passes:
            time.sleep(0.01)
        given_up = [pool.submit(predictor.predict, png(seed), cancelled=cancelled) for seed in range(4)]
        while predictor._jobs.qsize() < 4:
            time.sleep(0.01)
        cancelled.set()
        gate.set()
        assert first.result(30)
        assert all(isinstance(one.exception(30), BusyError) for one in given_up)
    with pytest.raises(BusyError):
        predictor.predict(png(0), cancelled=cancelled)
    assert passes == [1]
    predictor.close()


def test_a_large_image_with_its_overlay_takes_a_few_bytes_a_pixel(predictor: Predictor) -> None:
    data = png(0, 3000)
    tracemalloc.start()
    try:
        assert answer(predictor, data, with_overlay=True)["overlay"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 30 * 3000 * 3000


def test_predicting_imports_nothing_that_trains_or_serves(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    code = (
        "import sys; from pathlib import Path; from chestct.serving.predictor import Predictor; "
        f"Predictor({str(folder)!r}).predict(Path({str(tmp_path / 'a.png')!r})); "
        "print([m for m in ('lightning', 'hydra', 'mlflow', 'dvc', 'gradio', 'sklearn', 'pandas', "
        "'scipy', 'matplotlib', 'pydicom') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
