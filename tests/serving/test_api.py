"""The HTTP side: who may ask what, and what comes back, also when it is wrong."""

import base64
import io
import logging
import re
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from chestct.errors import BundleError, ConfigError
from chestct.serving import api
from chestct.serving.api import Login
from chestct.serving.server import QuietFormatter, bind, reload
from chestct.serving.uploads import sweep
from tests.serving.conftest import Served, serving

pytestmark = pytest.mark.slow  # a service is started

PASSWORD = "correct horse battery staple"
FORM = {"content-type": "multipart/form-data; boundary=x"}


def form(disposition: str, content: bytes) -> bytes:
    head = f"--x\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode()
    return head + content + b"\r\n--x--\r\n"


def test_the_answer_has_the_numbers_of_the_predictor(served: Served, files: list[bytes]) -> None:
    for data in files[:3]:
        own = served.predictor.predict(data)
        answer = httpx.post(f"{served.url}/predict", content=data).json()
        assert answer["score"] == pytest.approx(own.score, abs=1e-5)
        assert answer["decision"] == own.decision
        assert answer["possible"] == list(own.possible)
        assert answer["bundle"] == served.predictor.bundle.id
        assert set(answer["seconds"]) == {"decode", "wait", "draw"}
        assert "overlay" not in answer


def test_a_form_works_like_a_body_and_the_overlay_is_a_picture(served: Served, files: list[bytes]) -> None:
    plain = httpx.post(f"{served.url}/predict", content=files[0]).json()
    with_form = httpx.post(f"{served.url}/predict?overlay=true", files={"file": ("any.png", files[0])}).json()
    assert with_form["score"] == pytest.approx(plain["score"], abs=1e-5)
    picture = Image.open(io.BytesIO(base64.b64decode(with_form["overlay"].split(",")[1])))
    assert picture.mode == "RGB"
    assert picture.size == Image.open(io.BytesIO(files[0])).size


@pytest.mark.parametrize(
    "disposition",
    [
        "name=file; filename*=UTF-8''l%C3%A4sion.png",  # RFC 5987
        'name="file"; filename="läsion.png"',
        'name="file"; filename="C:\\scans\\a.png"',
        "name=file; filename=a.png",
    ],
)
def test_a_file_in_a_form_may_be_called_as_its_client_likes(
    served: Served, files: list[bytes], disposition: str
) -> None:
    answer = httpx.post(f"{served.url}/predict", content=form(disposition, files[0]), headers=FORM)
    assert answer.status_code == 200, answer.text


def test_a_photograph_is_refused_with_its_reason(served: Served, examples: dict[str, bytes]) -> None:
    answer = httpx.post(f"{served.url}/predict", content=examples["hills.jpg"]).json()
    assert answer["decision"] == "refused"
    assert "colour" in answer["reason"]
    assert 0 <= answer["score"] <= 1


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (b"", {}, 400, "no file"),
        (b"rubbish", {}, 422, "neither PNG"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, {}, 422, "cannot be read"),
        (b"\0" * 128 + b"DICM" + b"\xff" * 60, {}, 422, "DICOM"),
        (b"no multipart at all", FORM, 400, "form"),
        (form("name=a; filename=b", b"rubbish")[:-6], FORM, 400, "cut off"),
        (b"", {"content-type": "multipart/form-data"}, 400, "boundary"),
        (form("name=a", b"text"), FORM, 400, "no file"),
        (b"", FORM, 400, "form"),
        (b"x" * 3_000_001, {}, 413, "too large"),
        (form("name=a; filename*=b; filename*0=c", b"x"), FORM, 400, "parameters"),
        (b"--x--", {"content-type": "multipart/form-data; boundary*=a; boundary*1=b"}, 400, "parameters"),
        (b"--x\r\n" + b"x" * 20_000 + b"\r\n--x--\r\n", FORM, 400, "head of a part"),
    ],
)
def test_what_is_wrong_with_a_request_is_one_sentence(
    served: Served, content: bytes, headers: dict[str, str], status: int, message: str
) -> None:
    answer = httpx.post(f"{served.url}/predict", content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]
    assert httpx.get(f"{served.url}/healthz").status_code == 200


@pytest.mark.parametrize("path", ["/predict", "/gradio_api/upload"])
def test_a_form_is_read_off_the_event_loop(served: Served, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    def parse(*_: object) -> list[bytes]:
        with pytest.raises(RuntimeError):
            api.asyncio.get_running_loop()
        raise api.FormError("read in a thread")

    monkeypatch.setattr(api, "files_in_form", parse)
    answer = httpx.post(f"{served.url}{path}", content=b"x", headers=FORM)
    assert answer.status_code == 400
    assert "read in a thread" in answer.text


def test_a_decompression_bomb_is_refused(served: Served) -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((5000, 5000), np.uint8)).save(file, "PNG")  # training would take it, serving does not
    answer = httpx.post(f"{served.url}/predict", content=file.getvalue())
    assert answer.status_code == 422
    assert "max_pixels" in answer.json()["error"]


def test_a_client_that_hangs_up_leaves_the_service_well(served: Served) -> None:
    for path in (b"/predict", b"/gradio_api/upload"):
        with socket.create_connection(served.address, timeout=10) as connection:
            connection.sendall(
                b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
                b"Content-Length: 90000\r\n\r\n--x\r\nContent-Disposition: form-data; name=files; filename=a\r\n\r\nabc"
            )
    time.sleep(0.3)
    assert httpx.get(f"{served.url}/healthz").status_code == 200
    assert not served.left()


JOIN, CALL = "/gradio_api/queue/join", "/gradio_api/call/predict"
LOST = '{"data": [], "fn_index": %s, "session_hash": "a"}'


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *((path, "\xff{rubbish") for path in (JOIN, CALL, "/gradio_api/cancel", "/gradio_api/reset")),
        *((JOIN, LOST % index) for index in ("99999", "-1", "NaN", "1e999", '"a"', "null", "[]", "1.5")),
        *((path, body) for path in (JOIN, CALL) for body in ("NaN", "[]", "null", "{}", "[" * 100_000)),
        ("/gradio_api/call/nothing", '{"data": []}'),
        (JOIN, '{"data": [NaN], "fn_index": 0, "session_hash": "a"}'),
        (JOIN, '{"data": [], "fn_index": 0, "session_hash": {}}'),
        ("/gradio_api/upload", "rubbish"),
    ],
)
def test_rubbish_for_gradio_is_refused_and_no_failure_of_ours(served: Served, path: str, body: str) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{served.url}{path}", content=body.encode("latin-1"), headers=headers)
    assert 400 <= answer.status_code < 500, answer.text
    assert httpx.get(f"{served.url}/healthz").status_code == 200
    assert not served.left()


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "http://127.0.0.1:9/secret-name"])
def test_a_path_of_a_client_is_neither_opened_nor_logged_nor_answered_with_ours(
    served: Served, path: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    answer = httpx.post(f"{served.url}{CALL}", json={"data": [file, False]})
    assert (answer.status_code, answer.json()) == (400, {"error": "This is no file that was uploaded."})
    printed = caplog.text + "".join(capfd.readouterr())
    assert not [text for text in ("passwd", "secret-name", "Traceback") if text in printed]


def test_health_tells_bundle_and_version(served: Served) -> None:
    answer = httpx.get(f"{served.url}/healthz").json()
    assert answer["status"] == "ok"
    assert answer["bundle"] == served.predictor.bundle.id
    assert answer["version"]


def test_metrics_count_requests_decisions_and_failures(served: Served, files: list[bytes]) -> None:
    def value(name: str) -> float:
        lines = httpx.get(f"{served.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    names = ("chestct_slices_total", "chestct_score_count", "chestct_failures_total")
    before = [value(name) for name in names]
    decision = httpx.post(f"{served.url}/predict", content=files[0]).json()["decision"]
    httpx.post(f"{served.url}/predict", content=b"rubbish")
    assert np.subtract([value(name) for name in names], before).tolist() == [1, decision != "refused", 1]
    assert value('chestct_requests_total{route="/predict",status="422"}') >= 1
    assert value("chestct_bundle_info") == 1


def test_uploads_have_random_names_and_are_swept_away(served: Served, files: list[bytes]) -> None:
    (name,) = httpx.post(f"{served.url}/gradio_api/upload", files={"files": ("Jane Doe.png", files[0])}).json()
    assert re.fullmatch("[0-9a-f]{32}/[0-9a-f]{32}", name)  # neither the file's own name nor our folder
    path = served.uploads / name
    assert path.read_bytes() == files[0]
    assert [entry.name for entry in served.left()] == [path.parent.name]
    sweep(served.uploads, 60)
    assert path.read_bytes() == files[0]
    assert sweep(served.uploads, -1) >= 1
    assert not served.left()


def test_too_many_files_or_bytes_are_refused_and_leave_nothing_behind(served: Served) -> None:
    url = f"{served.url}/gradio_api/upload"
    many = httpx.post(url, files=[("files", (f"{i}.png", str(i).encode())) for i in range(200)])
    assert many.status_code == 413
    assert "200 slices" in many.text
    assert not served.left()
    answers = [httpx.post(url, files={"files": ("a", b"x" * 2_500_000)}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 413]
    assert "wait to be read" in answers[-1].text
    sweep(served.uploads, -1)


def test_nothing_of_an_upload_is_in_the_log(
    served: Served, files: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "chestct")
    for content in (files[0], b"patient Jane Doe"):
        httpx.post(f"{served.url}/predict?name=Jane", files={"Jane": ("Jane.png", content)})
    httpx.get(f"{served.url}/Jane")
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("chestct")]
    assert messages
    assert not [line for line in messages if "Jane" in line]


def test_a_traceback_in_the_log_quotes_nobody() -> None:
    quoted = " ".join(("Jane", "Doe"))
    try:
        raise ValueError(quoted)
    except ValueError as error:
        text = QuietFormatter().formatException((type(error), error, error.__traceback__))
    assert "test_api.py" in text
    assert "ValueError" in text
    assert quoted not in text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:7860", 200),
        ("localhost", 200),
        ("[::1]:7860", 200),
        ("192.168.3.4", 200),
        ("ct.example.org", 200),  # in serve.hosts
        ("rebound.example.com", 400),
        ("127.0.0.1.example.com", 400),
        ("", 400),
    ],
)
def test_only_its_own_names_are_answered(guarded: Served, host: str, status: int) -> None:
    headers = {"host": host}
    assert httpx.get(f"{guarded.url}/config", headers=headers, auth=("ann", PASSWORD)).status_code == status
    assert httpx.get(f"{guarded.url}/healthz", headers=headers).status_code == 200


def test_other_sites_may_read_nothing(served: Served) -> None:
    for origin in ("http://localhost:3000", "http://127.0.0.1:9", "https://example.com", "null"):
        for path in ("/config", "/gradio_api/info", "/healthz"):
            headers = httpx.get(f"{served.url}{path}", headers={"origin": origin}).headers
            assert not [name for name in headers if name.startswith("access-control")]


@pytest.fixture(scope="module")
def guarded(bundle_folder: Path) -> Served:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "WRONG_PASSWORD_S", 0.05)
        with serving(bundle_folder, login=Login("ann", PASSWORD), hosts=["ct.example.org"]) as running:
            yield running


def basic(text: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(text.encode()).decode()}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (basic(f"ann:{PASSWORD}"), 200),
        (basic("ann:wrong"), 401),
        (basic(f"bob:{PASSWORD}"), 401),
        (basic(":"), 401),
        ({"authorization": f"Bearer {PASSWORD}"}, 401),
        ({"authorization": "Basic !!!"}, 401),
        ({"authorization": "Basic"}, 401),
        ({"authorization": b"Basic \xe9"}, 401),
    ],
)
def test_only_who_has_the_password_comes_in(guarded: Served, headers: dict[str, Any], status: int) -> None:
    for path in ("/", "/config", "/metrics", "/gradio_api/info"):
        answer = httpx.get(f"{guarded.url}{path}", headers=headers)
        assert answer.status_code == status
        assert ("www-authenticate" in answer.headers) == (status == 401)
    assert httpx.post(f"{guarded.url}/predict", content=b"x", headers=headers).status_code in (401, 422)
    assert httpx.get(f"{guarded.url}/healthz").status_code == 200


def test_unknown_names_are_compared_like_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr(api.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or False)
    login = Login("ann", PASSWORD)
    monkeypatch.setattr(api, "WRONG_PASSWORD_S", 0)
    for text in ("ann:wrong", "nobody:wrong", "a" * 9000):
        connection = api.HTTPConnection(
            {"type": "http", "headers": [(b"authorization", basic(text)["authorization"].encode())]}
        )
        with pytest.raises(api.AuthenticationError):
            api.asyncio.run(login.authenticate(connection))
    assert {(len(a), len(b)) for a, b in compared} == {(32, 32)}
    assert len(compared) == 3


@pytest.mark.parametrize(
    "environ",
    [
        {"CHESTCT_USERNAME": "ann"},
        {"CHESTCT_PASSWORD": PASSWORD},
        {"CHESTCT_USERNAME": "ann", "CHESTCT_PASSWORD": "short"},
        {"CHESTCT_USERNAME": "a:b", "CHESTCT_PASSWORD": PASSWORD},
        {"CHESTCT_USERS": "ann:scrypt$a$b"},  # of earlier versions: it must not open the service
        {"CHESTCT_TOKENS": "scrypt$a$b"},
    ],
)
def test_a_login_that_cannot_be_used_is_an_error_that_tells_the_way(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="CHESTCT_PASSWORD"):
        Login.from_environment(environ)
    assert Login.from_environment({}) is None


def test_a_taken_port_is_an_error_that_tells_the_way() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"serve\.port"):
            bind("127.0.0.1", taken.getsockname()[1])


def slowed(predictor, seconds: float) -> threading.Event:
    """The network of this predictor takes so long; returns an event that is set when it begins."""
    begun, real = threading.Event(), predictor.bundle.predict

    def slow(*arguments: object):
        begun.set()
        time.sleep(seconds)
        return real(*arguments)

    object.__setattr__(predictor.bundle, "predict", slow)
    return begun


def test_requests_under_way_are_answered_before_the_service_ends(bundle_folder: Path, files: list[bytes]) -> None:
    with serving(bundle_folder) as running:
        begun = slowed(running.predictor, 1.0)
        answers = []
        client = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{running.url}/predict", content=files[0], timeout=30))
        )
        client.start()
        assert begun.wait(10)
        running.server.should_exit = True
        client.join(30)
    assert [answer.status_code for answer in answers] == [200]


def test_work_ends_with_its_request(bundle_folder: Path, files: list[bytes]) -> None:
    with serving(bundle_folder, batch_size=1, request_timeout_s=2) as running:
        passes: list[int] = []
        real = running.predictor.bundle.predict

        def counted(x, explain):
            passes.append(len(x))
            time.sleep(1.0)
            return real(x, explain)

        object.__setattr__(running.predictor.bundle, "predict", counted)

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
        assert post(10) == 200  # not behind six passes for nobody, which would take longer than a request may
    assert len(passes) <= 3


def test_a_bundle_whose_name_moves_on_is_followed_and_one_that_disappears_stays_at_work(
    bundle_folder: Path, tmp_path: Path, files: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(bundle_folder, tmp_path / "bundle"))
    with serving(folder) as running:

        def post() -> dict:
            return httpx.post(f"{running.url}/predict", content=files[0]).json()

        before = post()
        shutil.rmtree(folder)
        reload(running.predictor, lambda: str(folder))
        assert "not reloaded" in caplog.text
        assert "Traceback" not in caplog.text
        assert post()["score"] == before["score"]

        def lost() -> str:
            raise BundleError("the store is gone")

        reload(running.predictor, lost)
        assert "the store is gone" in caplog.text
        assert post()["bundle"] == before["bundle"]
        reload(running.predictor, lambda: "packaged")
        assert post()["bundle"] == httpx.get(f"{running.url}/healthz").json()["bundle"] != before["bundle"]
