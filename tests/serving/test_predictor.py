import io
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from chestct.errors import BundleError, DecodeError
from chestct.imaging.decode import decode
from chestct.imaging.slice import Slice, pixel_hash
from chestct.serving.api import answer
from chestct.serving.predictor import NEVER, BusyError, Predictor, _why_uncertain, why_refused
from chestct.serving.server import reload
from tests.imaging.files import encoded
from tests.models.test_bundle import make


def png(seed: int, size: int = 96, mode: str = "L") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), np.uint8)
    return encoded(Image.fromarray(pixels).convert(mode), "PNG")


def tiff(pages: int) -> bytes:
    images = [Image.open(io.BytesIO(png(seed))) for seed in range(pages)]
    return encoded(images[0], "TIFF", save_all=True, append_images=images[1:])


def gated(predictor: Predictor) -> tuple[threading.Event, threading.Event]:
    """Two events: the network of this predictor has begun, and it may go on."""
    begun, gate, real = threading.Event(), threading.Event(), predictor.bundle.predict

    def wait(*arguments: object):
        begun.set()
        assert gate.wait(30)
        return real(*arguments)

    object.__setattr__(predictor.bundle, "predict", wait)
    return begun, gate


@pytest.fixture
def predictor(small_bundle: Path) -> Predictor:
    return Predictor(small_bundle)


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


def test_concurrent_callers_get_their_own_answers(predictor: Predictor) -> None:
    expected = [predictor.predict(png(seed), explain=False).score for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        result = list(pool.map(lambda i: predictor.predict(png(i % 6)).score, range(24)))
    assert result == pytest.approx([expected[i % 6] for i in range(24)], abs=1e-5)


def test_a_file_that_ends_in_rubbish_is_answered_up_to_there(predictor: Predictor) -> None:
    answers = predictor.predict_frames(tiff(6)[:-20_000], name="scan.tiff")
    assert next(answers).slice.frame == 0
    with pytest.raises(DecodeError, match=r"scan\.tiff"):
        list(answers)


def test_slices_of_the_training_data_are_known_again(predictor: Predictor) -> None:
    seen = pixel_hash(decode(png(3), predictor.bundle.window).gray)[:16]
    predictor.bundle.facts["data"]["seen"].append(seen)
    assert predictor.predict(png(3)).known
    assert not predictor.predict(png(4)).known


GRAY = np.zeros((100, 100), np.float32)


@pytest.mark.parametrize(
    ("result", "novelty", "reason"),
    [
        (Slice(GRAY, "PNG", "RGB", color=0.3), 0.5, "colour"),
        (Slice(GRAY, "DICOM", "DICOM", unfit="This DICOM file is not CT: its modality is MR."), 0.5, "not CT"),
        (Slice(GRAY[:20], "PNG", "L"), 0.5, "too small"),
        (Slice(GRAY, "PNG", "L"), 1.7, "1.70"),
        (Slice(GRAY, "DICOM", "DICOM"), 0.99, ""),
    ],
)
def test_what_is_no_chest_ct_is_refused_with_its_reason(result: Slice, novelty: float, reason: str) -> None:
    assert (reason in why_refused(result, novelty)) if reason else not why_refused(result, novelty)


@pytest.mark.parametrize(
    ("possible", "reason"),
    [
        ((), "fits no class"),
        (("normal", "cancer"), "fits more than one answer: normal or cancer."),
        (("normal", "squamous"), "fits more than one answer: normal or squamous."),
        (("normal",), "fits normal alone, which is not the side of the threshold that it lies on."),
        (("cancer",), "fits cancer alone, which is not the side of the threshold that it lies on."),
        (("large_cell", "squamous"), "fits large_cell or squamous alone, which is not the side of the threshold"),
    ],
)
def test_why_an_answer_is_uncertain_is_true(predictor: Predictor, possible: tuple[str, ...], reason: str) -> None:
    assert f"At 90% coverage the score {reason}" in _why_uncertain(predictor.bundle, possible, 0.5)


def test_a_request_under_way_keeps_its_bundle_when_another_is_loaded(tmp_path) -> None:
    make(tmp_path / "b")
    predictor = Predictor(tmp_path / "b")
    before, (begun, gate) = predictor.bundle.id, gated(predictor)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(predictor.predict, png(0))
        assert begun.wait(10)
        make(tmp_path / "b", classes=4)
        after = predictor.reload(tmp_path / "b")
        gate.set()
        assert waiting.result(30).bundle == before != after


def test_further_files_of_a_request_are_answered_by_the_bundle_that_it_began_with(tmp_path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", classes=4)
    predictor = Predictor(tmp_path / "a")
    before = predictor.bundle
    assert predictor.reload(tmp_path / "b") != before.id
    assert {one.bundle for one in predictor.predict_frames(tiff(2), bundle=before)} == {before.id}


def test_of_two_reloads_the_later_one_has_the_last_word(tmp_path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", classes=4)
    loading: Future[Predictor] = Future()
    begun, gate, calls = threading.Event(), threading.Event(), iter("ab")

    def locate() -> str:
        if (name := next(calls)) == "a":
            begun.set()
            assert gate.wait(30)
        return str(tmp_path / name)

    threads = [threading.Thread(target=reload, args=(loading, locate)) for _ in range(2)]
    threads[0].start()
    loading.set_result(Predictor(tmp_path / "a"))  # only now: a signal may come before
    assert begun.wait(10)
    threads[1].start()
    threads[1].join(0.5)  # were it to overtake
    gate.set()
    for thread in threads:
        thread.join(30)
    assert loading.result().bundle.id == Predictor(tmp_path / "b").bundle.id


@pytest.mark.parametrize("fault", [BundleError("No bundle"), PermissionError("no")])
def test_where_no_bundle_can_be_had_the_old_one_goes_on_and_the_log_says_so(small_bundle, caplog, fault) -> None:
    loading: Future[Predictor] = Future()
    loading.set_result(Predictor(small_bundle))
    reload(loading, Mock(side_effect=fault))
    assert f"bundle not reloaded, {loading.result().bundle.id} stays" in caplog.text


def test_pixels_in_flight_have_a_budget(small_bundle: Path) -> None:
    predictor = Predictor(small_bundle, pixels=2 * 96 * 96, seconds=0.3)
    with predictor.room(png(0)), predictor.room(png(1)), pytest.raises(BusyError), predictor.room(png(2)):
        pass
    with predictor.room(png(0, 200)):  # the others have left; more than the whole budget: let in alone
        pass


def test_waiting_ends_with_its_request_or_its_deadline(small_bundle: Path) -> None:
    predictor, cancelled = Predictor(small_bundle, pixels=96 * 96), threading.Event()
    begun, gate = gated(predictor)
    with ThreadPoolExecutor(4) as pool, predictor.room(png(0)):
        pool.submit(predictor.predict, png(0))
        assert begun.wait(10)
        waiting = [
            pool.submit(lambda: predictor.room(png(1), cancelled).__enter__()),
            pool.submit(predictor.predict, png(1), gone=cancelled.is_set),
            pool.submit(predictor.predict, png(1), gone=lambda: True),
        ]
        time.sleep(0.3)
        cancelled.set()
        for future in waiting:
            with pytest.raises(BusyError):
                future.result(10)
        gate.set()


def test_a_large_image_with_its_overlay_takes_a_few_bytes_a_pixel(predictor: Predictor) -> None:
    data = png(0, 3000)
    tracemalloc.start()
    try:
        assert answer(predictor, data, True, None, NEVER)["overlay"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 30 * 3000 * 3000


def test_predicting_imports_nothing_that_trains_or_serves(small_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    code = (
        "import sys; from pathlib import Path; from chestct.serving.predictor import Predictor; "
        f"Predictor({str(small_bundle)!r}).predict(Path({str(tmp_path / 'a.png')!r})); "
        "print([m for m in ('lightning', 'hydra', 'mlflow', 'dvc', 'gradio', 'sklearn', 'pandas', 'torchvision', "
        "'scipy', 'matplotlib', 'pydicom', 'sympy', 'torch._dynamo') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
