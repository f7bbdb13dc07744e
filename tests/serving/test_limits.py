"""What one client may cost the others: slowly sent requests, idle sockets, large bodies, many requests at once.

Sockets are real and on loopback; deadlines are shortened, and nothing here asserts how long something took.
"""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import Receive, Scope, Send

from chestct.config.schema import ServeConfig
from chestct.serving import limits, protocol
from chestct.serving.limits import HEADERS, RequestLimits, route_of
from chestct.serving.prometheus import Metrics
from chestct.serving.protocol import PatientProtocol


async def length(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that reads its whole body and answers with its length."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await PlainTextResponse(str(size))(scope, receive, send)


async def health(scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse({"status": "ok"})(scope, receive, send)


def limited(app=length, **settings) -> RequestLimits:
    return RequestLimits(app, health, Metrics(), ServeConfig(**{"max_upload_bytes": 1000} | settings), Path("uploads"))


def request(app: RequestLimits, method: str, path: str, **options) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=("10.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://example.org/"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/monitoring"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/vibe-edit/"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/login"),
        ("DELETE", "/predict"),
        ("OPTIONS", "/predict"),
        ("PUT", "/"),
    ],
)
def test_paths_that_the_page_does_not_need_do_not_exist(method: str, path: str) -> None:
    assert request(limited(), method, path).status_code == 404


def test_paths_that_the_page_needs_exist() -> None:
    assert route_of("GET", "/") == "/"
    assert route_of("HEAD", "/metrics") == "/metrics"
    assert route_of("GET", "/assets/index-1.js") == "/assets/*"
    assert route_of("POST", "/gradio_api/call/predict") == "/gradio_api/call/*"


def test_every_answer_has_security_headers_also_a_refusal() -> None:
    for path in ("/", "/nothing"):
        headers = request(limited(), "GET", path).headers
        assert {name: headers[name] for name in HEADERS} == HEADERS
        assert headers["cache-control"] == "no-store"


def test_a_large_body_is_refused_before_it_is_sent() -> None:
    async def app(scope, receive, send) -> None:
        raise AssertionError("the app is not to see it")

    answer = request(limited(app), "POST", "/predict", content=b"x" * 1001)
    assert answer.status_code == 413
    assert "1,000 bytes" in answer.json()["error"]
    assert request(limited(app), "POST", "/predict", headers={"content-length": "-5"}).status_code == 413


def test_a_large_body_without_a_length_is_cut_off() -> None:
    async def parts():
        for _ in range(1000):
            yield b"x" * 100

    assert request(limited(), "POST", "/predict", content=parts()).status_code == 413
    assert request(limited(), "POST", "/predict", content=b"x" * 1000).text == "1000"


def test_an_error_of_ours_is_a_sentence_and_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope, receive, send) -> None:
        raise RuntimeError("secret")

    answer = request(limited(broken), "POST", "/predict", content=b"x")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "POST /predict failed" in caplog.text


def test_addresses_that_a_client_makes_up_reach_nobody() -> None:
    async def names(scope, receive, send) -> None:
        await PlainTextResponse(" ".join(name.decode() for name, _ in scope["headers"]))(scope, receive, send)

    forwarded = {"x-forwarded-host": "evil.example.com", "x-forwarded-proto": "https", "x-forwarded-for": "1.2.3.4"}
    assert "forwarded" not in request(limited(names), "GET", "/", headers=forwarded).text
    assert "x-forwarded-host" in request(limited(names, proxies=["10.0.0.1"]), "GET", "/", headers=forwarded).text


# --- on real sockets ---


@dataclass
class Listening:
    """A server in a thread: its address, and its count of open connections."""

    address: tuple[str, int]
    server: uvicorn.Server

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)

    def open(self, head: bytes) -> socket.socket:
        connection = socket.create_connection(self.address, timeout=20)
        connection.sendall(head)
        return connection

    def healthy(self) -> bool:
        return httpx.get(f"{self.url}/healthz", timeout=20).status_code == 200


@contextlib.contextmanager
def listening(app=length, **settings) -> Iterator[Listening]:
    cfg = ServeConfig(**{"max_upload_bytes": 1_000_000} | settings)
    config = uvicorn.Config(
        RequestLimits(app, health, Metrics(), cfg, Path("uploads")),
        http=PatientProtocol,
        lifespan="off",
        log_config=None,
        proxy_headers=bool(cfg.proxies),
        forwarded_allow_ips=cfg.proxies,
        timeout_graceful_shutdown=1,
    )
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield Listening(bound.getsockname(), server)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def ends(connection: socket.socket) -> bytes:
    """What the server still sends until it ends the connection; socket.timeout where it does not."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
    return received


POST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"


@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1\r\nHost:", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET"])
def test_a_head_that_does_not_come_ends_its_connection(monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.3)
    with listening() as service, service.open(head) as connection:
        assert ends(connection).count(b"HTTP/1.1") == head.count(b"healthz")


def test_a_body_that_trickles_is_refused_and_one_that_flows_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_S", 0.5)
    with listening() as service, service.open(POST) as slow:
        slow.sendall(b"x")
        assert b" 408 " in ends(slow).split(b"\r\n")[0]
        with service.open(POST.replace(b"1000", b"60000")) as steady:  # longer than BODY_S, at more than BODY_RATE
            monkeypatch.setattr(limits, "BODY_RATE", 10_000)
            for _ in range(6):
                steady.sendall(b"x" * 10_000)
                time.sleep(0.2)
            assert steady.recv(4096).endswith(b"60000")


def test_slow_bodies_take_no_place_of_others() -> None:
    with listening() as service, contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(service.open(POST)).sendall(b"x")
        assert httpx.post(f"{service.url}/predict", content=b"abc").text == "3"
        assert service.healthy()


def test_idle_sockets_shut_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 50)
    with listening() as service, contextlib.ExitStack() as stack:
        for i in range(200):
            stack.enter_context(service.open(b"" if i % 2 else b"GET /"))
        assert httpx.post(f"{service.url}/predict", content=b"abc").text == "3"
        assert service.healthy()
        assert len(service.server.server_state.connections) <= 51


def test_a_request_under_way_is_not_given_up_for_idle_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 20)
    with listening() as service, contextlib.ExitStack() as stack:
        busy = stack.enter_context(service.open(POST))
        while not service.server.server_state.tasks:
            time.sleep(0.01)
        for _ in range(60):
            stack.enter_context(service.open(b""))
        assert service.healthy()
        busy.sendall(b"x" * 1000)
        assert b" 200 " in busy.recv(4096).split(b"\r\n")[0]


def test_one_address_has_its_share_of_requests_and_health_is_not_counted() -> None:
    with listening(max_requests_per_address=5) as service, contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(service.open(POST)).sendall(b"x")
        time.sleep(0.2)
        refused = httpx.post(f"{service.url}/predict", content=b"abc")
        assert refused.status_code == 429
        assert "retry-after" in refused.headers
        assert service.healthy()
    with listening(max_requests_per_address=5) as service:  # ended requests are forgotten
        assert [httpx.post(f"{service.url}/predict", content=b"abc").status_code for _ in range(12)] == [200] * 12


@pytest.mark.parametrize("proxies", [[], ["10.9.9.9"], ["127.0.0.1"]])
def test_only_a_proxy_that_is_named_may_say_who_a_client_is(proxies: list[str]) -> None:
    head = POST.replace(b"Host", b"X-Forwarded-For: 10.1.1.%d\r\nHost")
    with listening(max_requests_per_address=3, proxies=proxies) as service, contextlib.ExitStack() as stack:
        for i in range(3):
            stack.enter_context(service.open(head % i)).sendall(b"x")
        time.sleep(0.2)
        answer = httpx.post(f"{service.url}/predict", content=b"abc", headers={"x-forwarded-for": "10.1.1.9"})
        assert answer.status_code == (200 if proxies == ["127.0.0.1"] else 429)


def test_bodies_in_flight_have_a_budget_and_slices_of_others_fit_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "UNCOUNTED", 1000)
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 10.0.0.%d\r\nContent-Length: 900000\r\n\r\n"
    with listening(proxies=["127.0.0.1"]) as service, contextlib.ExitStack() as stack:
        answers = []
        for i in range(6):  # unfinished ones of six clients: only two million bytes have room
            connection = stack.enter_context(service.open(head % i))
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"x" * 800_000)
            time.sleep(0.1)
            connection.settimeout(0.3)
            try:
                answers.append(connection.recv(12))
            except TimeoutError:
                answers.append(b"")
        assert answers == [b"", b""] + [b"HTTP/1.1 503"] * 4
        assert httpx.post(f"{service.url}/predict", content=b"x" * 900).text == "900"
        stack.close()
        time.sleep(0.2)
        assert httpx.post(f"{service.url}/predict", content=b"x" * 900_000).text == "900000"


def test_one_client_fills_half_of_that_budget_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "UNCOUNTED", 1000)
    with listening() as service, service.open(POST.replace(b"1000", b"900000")) as one:
        one.sendall(b"x" * 800_000)
        time.sleep(0.2)
        assert httpx.post(f"{service.url}/predict", content=b"x" * 900_000).status_code == 503


def test_an_answer_that_is_not_read_ends_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("x" * 30_000_000)(scope, receive, send)

    monkeypatch.setattr(protocol, "SEND_S", 0.3)
    with listening(large) as service, service.open(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
        deadline = time.monotonic() + 20
        while not service.server.server_state.connections:
            time.sleep(0.01)
        while service.server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not service.server.server_state.connections


def test_two_announced_gigabytes_and_an_endless_stream_are_cut_off() -> None:
    with listening() as service:
        with service.open(POST.replace(b"1000", b"2147483648")) as connection:
            assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]
        with service.open(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n") as connection:
            sent = 0
            with contextlib.suppress(OSError):
                while sent < 50_000_000:
                    connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                    sent += 65536
            assert sent < 50_000_000
