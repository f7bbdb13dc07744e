"""The HTTP side: who may ask what, and what comes back, also when it is wrong."""

import base64
import io
import logging
import re
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from chestct.config.schema_serving import ServeConfig
from chestct.errors import BusyError
from chestct.serving.api import make_app
from chestct.serving.examples import Example, make_examples
from chestct.serving.limits import HEADERS
from chestct.serving.predictor import Predictor
from chestct.serving.server import QuietFormatter
from tests.conftest import until
from tests.imaging.files import encoded
from tests.serving.conftest import Served, serving

pytestmark = pytest.mark.slow  # a service is started

FORM = {"content-type": "multipart/form-data; boundary=x"}
JSON = {"content-type": "application/json"}


def form(disposition: str, content: bytes) -> bytes:
    head = f"--x\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode()
    return head + content + b"\r\n--x--\r\n"


@pytest.mark.parametrize("error", [None, OSError("no such font")])
def test_the_api_answers_while_the_page_is_being_made_and_where_it_cannot_be(bundle_folder, files, monkeypatch, error):
    goes_on, make = threading.Event(), make_examples

    def late() -> list[Example]:
        assert goes_on.wait(60)
        if error:
            raise error
        return make()

    monkeypatch.setattr("chestct.serving.examples.make_examples", late)
    with serving(bundle_folder) as one, ThreadPoolExecutor() as pool:
        page = pool.submit(httpx.get, f"{one.url}/", timeout=60)
        with pytest.raises(httpx.TimeoutException):
            httpx.get(f"{one.url}/", timeout=0.5)
        assert httpx.get(f"{one.url}/healthz").status_code == 200
        assert httpx.post(f"{one.url}/predict", content=files[0]).status_code == 200
        goes_on.set()
        assert page.result().status_code == (500 if error else 200)
        assert httpx.get(f"{one.url}/openapi.json").status_code in (404, 500)


def test_probes_are_answered_before_there_is_a_predictor_and_others_wait_for_it(bundle_folder, files) -> None:
    loading: Future[Predictor] = Future()
    loading.set_running_or_notify_cancel()
    with serving(bundle_folder, loading=loading) as one, ThreadPoolExecutor() as pool:
        url = one.url
        alive = httpx.get(f"{url}/healthz")
        assert (alive.status_code, alive.json()["status"], alive.json()["bundle"]) == (200, "starting", None)
        assert httpx.get(f"{url}/readyz").status_code == 503
        assert httpx.get(f"{url}/metrics").status_code == 200
        assert httpx.post(f"{url}/predict").status_code == 400  # no file: known without a network
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{url}/predict", content=files[0], timeout=0.5)  # whose end ends nothing for others
        waiting = pool.submit(httpx.post, f"{url}/predict", content=files[0], timeout=60)
        page = pool.submit(httpx.get, f"{url}/", timeout=60)
        loading.set_result(one.predictor)
        assert waiting.result().status_code == page.result().status_code == 200
        ready = httpx.get(f"{url}/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "ok")


def test_who_waits_for_a_service_that_cannot_start_is_told_and_nothing_is_logged(bundle_folder, files, caplog) -> None:
    loading: Future[Predictor] = Future()
    loading.set_running_or_notify_cancel()
    with serving(bundle_folder, loading=loading) as one, ThreadPoolExecutor() as pool:
        waiting = pool.submit(httpx.post, f"{one.url}/predict", content=files[0], timeout=60)
        httpx.get(f"{one.url}/healthz")
        loading.set_exception(BusyError("not today"))
        assert (waiting.result().status_code, waiting.result().json()) == (503, {"error": "not today"})
        assert httpx.get(f"{one.url}/").status_code == 503
        assert httpx.get(f"{one.url}/readyz").status_code == 503
    assert not [record for record in caplog.records if record.exc_info]


def test_the_answer_has_the_numbers_of_the_predictor(served: Served, files: list[bytes]) -> None:
    own = served.predictor.predict(files[0])
    answer = httpx.post(f"{served.url}/predict", content=files[0]).json()
    assert answer["score"] == pytest.approx(own.score, abs=1e-5)
    assert answer["decision"] == own.decision
    assert answer["possible"] == list(own.possible)
    assert answer["bundle"] == served.predictor.bundle.id == httpx.get(f"{served.url}/healthz").json()["bundle"]
    assert "Not a medical device" in answer["notice"]
    assert "overlay" not in answer
    with_form = httpx.post(f"{served.url}/predict?overlay=true", files={"file": ("any.png", files[0])}).json()
    assert with_form["score"] == pytest.approx(own.score, abs=1e-5)
    picture = Image.open(io.BytesIO(base64.b64decode(with_form["overlay"].split(",")[1])))
    assert picture.mode == "RGB"
    assert picture.size == Image.open(io.BytesIO(files[0])).size


BOMB = encoded(np.zeros((5000, 5000), np.uint8), "PNG")  # training would take it, serving does not


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (b"", {}, 400, "no file"),
        (b"rubbish", {}, 422, "neither PNG"),
        (b"\0" * 128 + b"DICM" + b"\xff" * 60, {}, 422, "DICOM"),
        (BOMB, {}, 422, "max_pixels"),
        (form("name=a; filename=b", b"rubbish")[:-6], FORM, 400, "cut off"),
        (form("name=a", b"text"), FORM, 400, "no file"),
        (form("name=a", b"text"), {"content-type": FORM["content-type"].replace("form", "FORM")}, 400, "no file"),
        (form("name=a; filename=b", b"1")[:-7] + form("name=a; filename=c", b"2"), FORM, 400, "2 files"),
        (b"x" * 3_000_001, {}, 413, "chestct predict"),
    ],
)
def test_what_is_wrong_with_a_request_is_one_sentence(served: Served, content, headers, status, message) -> None:
    answer = httpx.post(f"{served.url}/predict", content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]


JOIN = "/gradio_api/queue/join"
LOST = '{"data": [], "fn_index": %s, "session_hash": "a"}'


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *((path, "\xff{rubbish") for path in (JOIN, "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/upload")),
        *((JOIN, LOST % index) for index in ("99999", "NaN", '"a"', "null", "1.5")),
        *((JOIN, body) for body in ("NaN", "{}", "[" * 100_000)),
        (JOIN, '{"data": [NaN], "fn_index": 0, "session_hash": "a"}'),
        (JOIN, '{"data": [], "fn_index": 0, "session_hash": {}}'),
    ],
)
def test_rubbish_for_gradio_is_refused_and_no_failure_of_ours(served: Served, path: str, body: str) -> None:
    answer = httpx.post(f"{served.url}{path}", content=body.encode("latin-1"), headers=JSON, timeout=60)
    assert 400 <= answer.status_code < 500, answer.text
    assert httpx.get(f"{served.url}/healthz").status_code == 200


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "http://127.0.0.1:9/secret-name", "0" * 31])
def test_a_path_of_a_client_is_neither_opened_nor_logged_nor_answered_with_ours(served, path, caplog, capfd) -> None:
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = {"data": [[file]], "fn_index": 0, "session_hash": "a"}
    answer = httpx.post(f"{served.url}{JOIN}", json=body)
    assert (answer.status_code, answer.json()) == (400, {"error": "This is no file that was uploaded."})
    printed = caplog.text + "".join(capfd.readouterr())
    assert not [text for text in ("passwd", "secret-name", "Traceback") if text in printed]


def test_metrics_count_requests_and_decisions(served: Served, files: list[bytes]) -> None:
    def value(name: str) -> float:
        lines = httpx.get(f"{served.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    names = ("chestct_slices_total", 'chestct_request_seconds_count{route="/predict",status="422"}')
    before = [value(name) for name in names]
    for content in (files[0], b"rubbish"):
        httpx.post(f"{served.url}/predict", content=content)
    assert np.subtract([value(name) for name in names], before).tolist() == [1, 1]


def test_uploads_have_random_names_and_a_budget(bundle_folder: Path, files: list[bytes]) -> None:
    with serving(bundle_folder, max_upload_bytes=1_000_000, max_slices=3) as running:

        def upload(content: bytes) -> httpx.Response:
            return httpx.post(f"{running.url}/gradio_api/upload", files={"files": ("Jane Doe.png", content)})

        (name,) = upload(files[0]).json()
        assert re.fullmatch("[0-9a-f]{32}", name)  # neither the file's own name nor our folder
        assert (running.uploads / name).read_bytes() == files[0]
        answers = [upload(b"x" * 900_000) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 503]
        assert "wait to be read" in answers[-1].text
        many = httpx.post(f"{running.url}/gradio_api/upload", files=[("files", ("a", b""))] * 4)
        assert (many.status_code, len(running.left())) == (400, 3)


def test_an_upload_that_nobody_reads_is_removed(tmp_path: Path) -> None:
    app = make_app(Future(), ServeConfig(request_timeout_s=1), tmp_path)
    with TestClient(app, "http://localhost") as client:
        assert client.post("/gradio_api/upload", files={"files": ("a.png", b"a")}).status_code == 200
        until(lambda: not [*tmp_path.iterdir()])


def test_nothing_of_an_upload_is_in_the_log(served: Served, files, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "chestct")
    for content in (files[0], b"patient Jane Doe"):
        httpx.post(f"{served.url}/predict?name=Jane", files={"Jane": ("Jane.png", content)})
    httpx.get(f"{served.url}/Jane")
    assert httpx.post(f"{served.url}/predict", content=b"--Jane", headers=FORM).status_code == 400
    assert not [record for record in caplog.records if record.name.startswith("python_multipart")]
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("chestct")]
    assert messages
    assert not [line for line in messages if "Jane" in line]
    quoted = " ".join(("Jane", "Doe"))
    try:
        raise ValueError(quoted)
    except ValueError as error:
        text = QuietFormatter().formatException((type(error), error, error.__traceback__))
    assert "test_api.py" in text
    assert quoted not in text


def test_an_error_of_ours_is_a_sentence_and_a_traceback_in_the_log(bundle_folder, files, caplog) -> None:
    with serving(bundle_folder, on_answer=Mock(side_effect=RuntimeError("secret"))) as running:
        answer = httpx.post(f"{running.url}/predict", content=files[0])
        counted = httpx.get(f"{running.url}/metrics").text
    assert answer.status_code == 500
    assert "on our side" in answer.json()["error"]
    assert HEADERS.items() <= dict(answer.headers).items()
    assert 'chestct_request_seconds_count{route="/predict",status="500"}' in counted
    assert any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(("localhost", 200), ("[::1]:7860", 200), ("192.168.3.4", 200)),
        *(("[2001:db8::1]:7860", 200), ("[2001:db8::2]", 400)),
        *(("rebound.example.com", 400), ("127.0.0.1.example.com", 400), ("", 400)),
    ],
)
def test_only_its_own_names_are_answered_and_other_sites_may_read_nothing(served: Served, host, status) -> None:
    for origin in ("http://localhost:3000", "https://example.com", "null"):
        answer = httpx.get(f"{served.url}/config", headers={"host": host, "origin": origin})
        assert answer.status_code == status
        assert status == 200 or "serve.hosts=[NAME]" in answer.json()["error"]
        assert status == 400 or "http://[2001:db8::1]:7860/predict" in answer.text  # which can be opened
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert httpx.get(f"{served.url}/healthz", headers={"host": host}).status_code == 200


def test_work_ends_with_its_request(bundle_folder: Path, files: list[bytes]) -> None:
    with serving(bundle_folder) as running:
        passes, real = [], running.predictor.bundle.predict

        def slow(x, explain):
            passes.append(len(x))
            time.sleep(1.0)
            return real(x, explain)

        object.__setattr__(running.predictor.bundle, "predict", slow)

        def post(seconds: float) -> int:
            try:
                return httpx.post(f"{running.url}/predict", content=files[0], timeout=seconds).status_code
            except httpx.TimeoutException:
                return 0

        impatient = [threading.Thread(target=post, args=(0.5,)) for _ in range(6)]
        for client in impatient:
            client.start()
        for client in impatient:
            client.join()
        assert post(60) == 200
    assert len(passes) <= 4  # not six passes for nobody before this one
