"""The HTTP side: who may ask what, how much, and what comes back when it is wrong."""

import asyncio
import base64
import io
import logging
import shutil
import socket
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from chestct.config.schema import Config
from chestct.errors import ConfigError
from chestct.serving.auth import Gate, hash_password, verify
from chestct.serving.counters import Counters
from chestct.serving.guard import HEADERS, Guard, RateLimit, route_of
from chestct.serving.service import Service, listen
from chestct.serving.web import sweep
from tests.serving.conftest import Served, serving

pytestmark = pytest.mark.slow  # a service is started


async def echo(scope, receive, send) -> None:
    """An app that reads its whole body and tells its length."""
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def ask(guard: Guard, method: str, path: str, **options) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(guard, client=("10.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def guarded(app=echo, gate: Gate | None = None, max_upload: int = 1000, rate: int = 0) -> Guard:
    return Guard(app, gate or Gate(), Counters(), max_upload, rate)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file=http://example.org/"),
        ("GET", "/gradio_api/proxy=http://example.org/"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/monitoring"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/vibe-edit/"),
        ("POST", "/gradio_api/component_server"),
        ("DELETE", "/predict"),
        ("PUT", "/"),
    ],
)
def test_commands_that_the_page_does_not_need_are_shut(method: str, path: str) -> None:
    assert ask(guarded(), method, path).status_code == 404


def test_routes_that_the_page_needs_are_open() -> None:
    assert route_of("GET", "/") == "/"
    assert route_of("HEAD", "/healthz") == "/healthz"
    assert route_of("GET", "/assets/index-1.js") == "/assets/*"
    assert route_of("POST", "/gradio_api/call/predict") == "/gradio_api/call/*"


def test_every_answer_has_security_headers_also_a_refusal() -> None:
    for path in ("/", "/nothing"):
        found = ask(guarded(), "GET", path).headers
        assert {name: found[name] for name in HEADERS} == HEADERS
        assert found["cache-control"] == "no-store"


def test_a_large_body_is_refused_before_it_is_sent() -> None:
    async def app(scope, receive, send) -> None:
        raise AssertionError("the app is not to see it")

    found = ask(guarded(app), "POST", "/predict", content=b"x" * 1001)
    assert found.status_code == 413
    assert "1,000 bytes" in found.json()["error"]


def test_a_large_body_without_a_length_is_cut_off() -> None:
    async def parts():
        for _ in range(1000):
            yield b"x" * 100

    found = ask(guarded(), "POST", "/predict", content=parts())
    assert found.status_code == 413


def test_a_body_within_the_limit_passes_whole() -> None:
    assert ask(guarded(), "POST", "/predict", content=b"x" * 1000).text == "1000"


def test_a_lying_length_is_refused() -> None:
    assert ask(guarded(), "POST", "/predict", headers={"content-length": "-5"}).status_code == 413


def test_more_requests_than_a_minute_allows_have_to_wait() -> None:
    guard = guarded(rate=3)
    answers = [ask(guard, "POST", "/predict", content=b"x") for _ in range(5)]
    assert [found.status_code for found in answers] == [200, 200, 200, 429, 429]
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert ask(guard, "GET", "/").status_code == 200  # looking costs nothing


def test_the_rate_is_for_each_client_and_refills() -> None:
    limit = RateLimit(2)
    assert [limit.wait("a", 0.0), limit.wait("a", 0.0)] == [0.0, 0.0]
    assert limit.wait("a", 0.0) == pytest.approx(30)
    assert limit.wait("b", 0.0) == 0
    assert limit.wait("a", 31.0) == 0
    assert limit.wait("a", 31.0) > 0


def test_an_error_of_ours_is_a_sentence_and_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope, receive, send) -> None:
        raise RuntimeError("secret")

    found = ask(guarded(broken), "POST", "/predict", content=b"x")
    assert found.status_code == 500
    assert "secret" not in found.text
    assert "POST /predict failed" in caplog.text


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate({"ann": hash_password("right")}, (hash_password("token"),))


def basic(name: str, password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (basic("ann", "right"), 200),
        (basic("ann", "wrong"), 401),
        (basic("bob", "right"), 401),
        (basic("nobody", ""), 401),
        ({"authorization": "Bearer token"}, 200),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Basic !!!"}, 401),
        ({"authorization": "Basic"}, 401),
    ],
)
def test_only_those_with_the_password_or_token_come_in(gate: Gate, headers: dict[str, str], status: int) -> None:
    found = ask(guarded(gate=gate), "GET", "/", headers=headers)
    assert found.status_code == status
    assert ("www-authenticate" in found.headers) == (status == 401)


def test_the_health_probe_needs_no_password(gate: Gate) -> None:
    assert ask(guarded(gate=gate), "GET", "/healthz").status_code == 200
    assert ask(guarded(gate=gate), "GET", "/metrics").status_code == 401


def test_guessing_passwords_is_slowed_down(gate: Gate) -> None:
    guard = guarded(gate=gate)
    guard.tries = RateLimit(2)
    codes = [ask(guard, "GET", "/", headers=basic("ann", f"guess {i}")).status_code for i in range(4)]
    assert codes == [401, 401, 429, 429]


def test_hashes_are_salted_and_read_from_the_environment() -> None:
    one, two = hash_password("word"), hash_password("word")
    assert one != two
    assert verify("word", one)
    assert not verify("Word", one)
    found = Gate.from_environment({"CHESTCT_USERS": f"ann:{one}; bob:{two}", "CHESTCT_TOKENS": one})
    assert found.users == {"ann": one, "bob": two}
    assert found.tokens == (one,)
    assert Gate.from_environment({}).open


@pytest.mark.parametrize("entry", ["ann", "ann:secret", "ann:scrypt$$", "ann:scrypt$abc$def", "ann:scrypt$!$!"])
def test_a_plain_password_in_the_environment_is_an_error_that_tells_the_way(entry: str) -> None:
    with pytest.raises(ConfigError, match="--hash-password"):
        Gate.from_environment({"CHESTCT_USERS": entry})


# --- the running service ---


def test_the_answer_has_the_numbers_of_the_predictor(served: Served, files: list[bytes]) -> None:
    for data in files[:3]:
        own = served.predictor.predict(data)
        found = httpx.post(f"{served.url}/predict", content=data).json()
        assert found["score"] == pytest.approx(own.score, abs=1e-5)
        assert found["decision"] == own.decision
        assert found["possible"] == list(own.possible)
        assert found["bundle"] == served.predictor.bundle.id
        assert set(found["seconds"]) == {"decode", "wait", "draw"}
        assert "overlay" not in found


def test_a_form_works_like_a_body_and_the_overlay_is_a_picture(served: Served, files: list[bytes]) -> None:
    plain = httpx.post(f"{served.url}/predict", content=files[0]).json()
    form = httpx.post(f"{served.url}/predict?overlay=true", files={"file": ("any.png", files[0])}).json()
    assert form["score"] == pytest.approx(plain["score"], abs=1e-5)
    picture = Image.open(io.BytesIO(base64.b64decode(form["overlay"].split(",")[1])))
    assert picture.mode == "RGB"
    assert picture.size == Image.open(io.BytesIO(files[0])).size


def test_a_photograph_is_refused_with_its_reason(served: Served, examples: dict[str, bytes]) -> None:
    found = httpx.post(f"{served.url}/predict", content=examples["hills.jpg"]).json()
    assert found["decision"] == "refused"
    assert "colour" in found["reason"]
    assert 0 <= found["score"] <= 1


FORM = {"content-type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    ("content", "headers", "status", "said"),
    [
        (b"", {}, 400, "no file"),
        (b"rubbish", {}, 422, "neither PNG"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, {}, 422, "cannot be read"),
        (b"\0" * 128 + b"DICM" + b"\xff" * 60, {}, 422, "DICOM"),
        (b"no multipart at all", FORM, 400, "form"),
        (b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\ntext\r\n--x--\r\n", FORM, 400, "no file"),
        (b"", FORM, 400, "no file"),
        (b"x" * 3_000_001, {}, 413, "too large"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_in_a_sentence(
    served: Served, content: bytes, headers: dict[str, str], status: int, said: str
) -> None:
    found = httpx.post(f"{served.url}/predict", content=content, headers=headers)
    assert found.status_code == status, found.text
    assert said in found.json()["error"]
    assert httpx.get(f"{served.url}/healthz").status_code == 200


def test_a_decompression_bomb_is_refused(served: Served) -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((9000, 9000), np.uint8)).save(file, "PNG")
    found = httpx.post(f"{served.url}/predict", content=file.getvalue())
    assert found.status_code == 422
    assert "max_pixels" in found.json()["error"]


def test_two_announced_gigabytes_are_refused_without_reading_them(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 2147483648\r\n\r\n")
        assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]


def test_an_endless_stream_is_cut_off(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        sent = 0
        try:
            while sent < 50_000_000:
                connection.sendall(chunk)
                sent += 65536
        except OSError:
            pass
        assert sent < 50_000_000


def test_a_client_that_hangs_up_leaves_the_service_well(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    for path in (b"/predict", b"/gradio_api/upload"):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(
                b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
                b"Content-Length: 90000\r\n\r\n--x\r\nContent-Disposition: form-data; name=files; filename=a\r\n\r\nabc"
            )
    with socket.create_connection((host, int(port)), timeout=10) as connection:  # and one that does not want to wait
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\nrubbish")
    time.sleep(0.3)
    assert httpx.get(f"{served.url}/healthz").status_code == 200
    assert not served.left()


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/call/predict"])
@pytest.mark.parametrize("headers", [{}, {"content-type": "multipart/form-data"}, {"content-type": "application/json"}])
def test_rubbish_for_gradio_is_refused_and_no_failure_of_ours(served: Served, path: str, headers) -> None:
    found = httpx.post(f"{served.url}{path}", content=b"\xff{rubbish", headers=headers)
    assert 400 <= found.status_code < 500, found.text
    assert httpx.get(f"{served.url}/healthz").status_code == 200
    assert not served.left()


def test_health_tells_bundle_and_version(served: Served) -> None:
    found = httpx.get(f"{served.url}/healthz").json()
    assert found["status"] == "ok"
    assert found["bundle"] == served.predictor.bundle.id
    assert found["version"]


def test_metrics_count_requests_decisions_and_failures(served: Served, files: list[bytes]) -> None:
    def value(name: str) -> float:
        lines = httpx.get(f"{served.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    before = [value(name) for name in ("chestct_slices_total", "chestct_score_count", "chestct_failures_total")]
    decision = httpx.post(f"{served.url}/predict", content=files[0]).json()["decision"]
    httpx.post(f"{served.url}/predict", content=b"rubbish")
    after = [value(name) for name in ("chestct_slices_total", "chestct_score_count", "chestct_failures_total")]
    assert np.subtract(after, before).tolist() == [1, decision != "refused", 1]
    assert value('chestct_requests_total{route="/predict",status="422"}') >= 1
    assert value("chestct_bundle_info") == 1


def test_uploads_have_random_names_and_are_swept_away(served: Served, files: list[bytes]) -> None:
    path = Path(httpx.post(f"{served.url}/gradio_api/upload", files={"files": ("Jane Doe.png", files[0])}).json()[0])
    assert path.is_relative_to(served.uploads)
    assert "Jane" not in str(path)
    assert path.read_bytes() == files[0]
    assert [entry.name for entry in served.left()] == [path.parent.name]
    sweep(served.uploads, 60)
    assert path.read_bytes() == files[0]
    assert sweep(served.uploads, -1) >= 1
    assert not served.left()


def test_two_hundred_files_at_once_are_refused_and_leave_nothing(served: Served) -> None:
    form = [("files", (f"{i}.png", str(i).encode())) for i in range(200)]
    found = httpx.post(f"{served.url}/gradio_api/upload", files=form)
    assert found.status_code == 413
    assert "200 files" in found.text
    assert not served.left()


def test_nothing_of_an_upload_is_in_the_log(
    served: Served, files: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "chestct")
    for content in (files[0], b"patient Jane Doe"):
        httpx.post(f"{served.url}/predict?name=Jane", files={"Jane": ("Jane.png", content)})
    httpx.get(f"{served.url}/Jane")
    said = [record.getMessage() for record in caplog.records if record.name.startswith("chestct")]
    assert said
    assert not [line for line in said if "Jane" in line]


def test_health_says_starting_until_the_model_is_there(tmp_path: Path) -> None:
    service = Service(Config(), Gate(), tmp_path, lambda: "packaged")
    go = threading.Event()

    def build():
        go.wait(30)
        raise ConfigError("enough seen")

    service._build = build
    listening = listen("127.0.0.1", 0)
    thread = threading.Thread(target=service.run, args=(listening,))
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    found = httpx.get(f"{url}/healthz", timeout=10)
    go.set()
    thread.join(20)
    assert found.status_code == 503
    assert found.json()["status"] == "starting"
    assert isinstance(service.failure, ConfigError)  # and the program ends with it


def test_a_taken_port_is_an_error_that_tells_the_way() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"serve\.port"):
            listen("127.0.0.1", taken.getsockname()[1])


def test_requests_under_way_are_answered_before_the_service_ends(bundle_folder: Path, files: list[bytes]) -> None:
    with serving(bundle_folder) as found:
        real = found.predictor.predict

        def slow(*arguments, **options):
            time.sleep(1.5)  # as reading a large file takes
            return real(*arguments, **options)

        found.predictor.predict = slow
        answers = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{found.url}/predict", content=files[0], timeout=30))
        )
        asking.start()
        time.sleep(0.5)
        found.service.server.should_exit = True
        asking.join(30)
    assert [answer.status_code for answer in answers] == [200]


def test_a_bundle_whose_name_moves_on_is_followed_and_one_that_disappears_stays_at_work(
    bundle_folder: Path, tmp_path: Path, files: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(bundle_folder, tmp_path / "bundle"))
    with serving(folder) as found:

        def ask() -> dict:
            return httpx.post(f"{found.url}/predict", content=files[0]).json()

        before = ask()
        shutil.rmtree(folder)
        found.service.reload()
        assert "not reloaded" in caplog.text
        assert "Traceback" not in caplog.text
        assert ask()["score"] == before["score"]

        def lost() -> str:
            raise RuntimeError("the store is gone")

        found.service.locate = lost
        found.service.reload()
        assert "the store is gone" in caplog.text
        assert ask()["bundle"] == before["bundle"]
        found.service.locate = lambda: "packaged"
        found.service.reload()
        assert ask()["bundle"] == httpx.get(f"{found.url}/healthz").json()["bundle"] != before["bundle"]
