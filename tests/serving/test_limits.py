"""What one client may cost the others: slowly sent requests, idle sockets, large bodies, many requests at once.

Sockets are real and on loopback; deadlines are shortened, and nothing here asserts how long something took.
"""

import contextlib
import signal
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import Receive, Scope, Send

from chestct.config.schema_serving import ServeConfig
from chestct.errors import ConfigError
from chestct.serving import limits, server
from chestct.serving.limits import HEADERS, RequestLimits, login_from, route_of
from chestct.serving.server import PatientServer, bind, running, wait_for
from tests.conftest import until

PASSWORD = "correct horse battery staple"
LOGIN = {"CHESTCT_USERNAME": "ann", "CHESTCT_PASSWORD": PASSWORD}


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the length of the body, and with the names of the headers."""
    names = " ".join(name.decode() for name, _ in scope["headers"])
    body = await Request(scope, receive).body()
    await JSONResponse({"length": len(body), "headers": names})(scope, receive, send)


async def health(scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse({"status": "ok"})(scope, receive, send)


@dataclass
class Listening:
    address: tuple[str, int]
    server: uvicorn.Server
    limits: RequestLimits

    @property
    def under_way(self) -> int:
        return len(self.server.server_state.tasks)

    def open(self, head: bytes) -> socket.socket:
        connection = socket.create_connection(self.address, timeout=20)
        connection.sendall(head)
        return connection

    def request(self, method: str, path: str, **options) -> httpx.Response:
        return httpx.request(method, "http://{}:{}{}".format(*self.address, path), timeout=20, **options)

    def post(self, content, **options) -> httpx.Response:
        return self.request("POST", "/predict", content=content, **options)

    def healthy(self) -> bool:
        return self.request("GET", "/healthz").status_code == 200


@contextlib.contextmanager
def listening(app=echo, login: bytes = b"", **settings) -> Iterator[Listening]:
    cfg = ServeConfig(**{"max_upload_bytes": 1_000_000} | settings)
    limited = RequestLimits(app, health, cfg, Path("uploads"), login)
    config = uvicorn.Config(
        limited, http="h11", lifespan="off", log_config=None, proxy_headers=False, timeout_graceful_shutdown=1
    )
    bound = bind("127.0.0.1", 0)
    service = PatientServer(config)
    with running(service, bound):
        yield Listening(bound.getsockname(), service, limited)


@pytest.fixture(scope="module")
def service() -> Iterator[Listening]:
    with listening() as running:
        yield running


@pytest.mark.parametrize(
    "request_line",
    [
        *("GET /gradio_api/file=/etc/passwd", "GET /gradio_api/proxy=http://example.org/", "GET /monitoring"),
        *("POST /gradio_api/run/predict", "POST /gradio_api/component_server", "DELETE /predict", "OPTIONS /predict"),
    ],
)
def test_paths_that_the_page_does_not_need_do_not_exist(service: Listening, request_line: str) -> None:
    assert service.request(*request_line.split()).status_code == 404
    assert route_of("GET", "/assets/index-1.js") == "/assets/*"
    assert route_of("HEAD", "/metrics") == "/metrics"


def test_every_answer_has_security_headers_also_a_refusal(service: Listening) -> None:
    for path in ("/", "/nothing"):
        headers = service.request("GET", path).headers
        assert {name: headers[name] for name in HEADERS} == HEADERS
        assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("proxies", "believed"),
    [([], False), (["10.0.0.1"], False), (["127.0.0.1"], True), (["10.0.0.1", "127.0.0.0/8"], True), (["*"], True)],
)
def test_addresses_that_a_client_makes_up_reach_nobody(proxies: list[str], believed: bool) -> None:
    forwarded = {f"x-forwarded-{name}": "evil.example.com" for name in ("host", "proto", "for")}
    with listening(proxies=proxies) as service:
        answer = service.request("GET", "/", headers=forwarded | {"x-gradio-server": "http://evil.example.com"})
        received = set(answer.json()["headers"].split())
        assert received & forwarded.keys() == (forwarded.keys() if believed else set())
        assert "x-gradio-server" not in received


def test_a_body_may_be_as_large_as_the_limit_announced_or_not(service: Listening) -> None:
    def parts(count: int) -> Iterator[bytes]:
        for _ in range(count):
            yield b"x" * 10_000

    assert service.post(parts(100)).json()["length"] == 1_000_000
    assert service.post(b"x" * 1_000_000).json()["length"] == 1_000_000
    with contextlib.suppress(httpx.TransportError):  # cut off while it sends
        assert service.post(parts(5000)).status_code == 413
    with service.open(POST.replace(b"1000", b"2147483648")) as connection:
        assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]


@pytest.mark.parametrize(
    ("given", "status"),
    [
        *((None, 401), (("ann", PASSWORD), 200), (("ann", "wrong"), 401), (("bob", PASSWORD), 401)),
        *((b"Basic \xe9", 401), (b"basic  " + b64encode(f"ann:{PASSWORD}".encode()), 200)),
    ],
)
def test_only_who_has_the_password_comes_in(monkeypatch: pytest.MonkeyPatch, given, status: int) -> None:
    monkeypatch.setattr(limits, "WRONG_PASSWORD_S", 0)
    options = {"auth": given} if isinstance(given, tuple) else {"headers": {"authorization": given} if given else {}}
    with listening(login=login_from(LOGIN)) as service:
        answer = service.request("GET", "/config", **options)
        assert answer.status_code == status
        assert ("www-authenticate" in answer.headers) == (status == 401)
        assert service.healthy()


@pytest.mark.parametrize("changed", [{"CHESTCT_USERNAME": ""}, {"CHESTCT_USERNAME": "a:b"}, {"CHESTCT_PASSWORD": "x"}])
def test_a_login_that_cannot_be_used_is_an_error_that_tells_the_way(changed: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="CHESTCT_PASSWORD"):
        login_from(LOGIN | changed)
    assert login_from({}) == b""
    assert len({len(login_from(LOGIN | {"CHESTCT_USERNAME": "a" * n})) for n in (1, 999)}) == 1  # compared alike


def test_a_signal_that_reaches_another_thread_is_handled_too() -> None:
    handled, in_time = threading.Event(), list[bool]()

    def work() -> None:
        time.sleep(0.1)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        in_time.append(handled.wait(10))

    before = signal.signal(signal.SIGUSR1, lambda *_: handled.set())
    (thread := threading.Thread(target=work)).start()
    wait_for(thread)
    signal.signal(signal.SIGUSR1, before)
    assert in_time == [True]


def test_a_taken_port_is_an_error_that_tells_the_way() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match=r"serve\.port"):
            bind("127.0.0.1", taken.getsockname()[1])


# --- slowly, or many at once ---


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
    monkeypatch.setattr(server, "STILL_S", 0.3)
    with listening() as service, service.open(head) as connection:
        assert ends(connection).count(b"HTTP/1.1") == head.count(b"healthz")


@pytest.mark.slow
def test_a_body_that_trickles_is_refused_and_one_that_flows_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_S", 2.0)
    with listening() as service, service.open(POST) as slow:
        slow.sendall(b"x")
        assert b" 408 " in ends(slow).split(b"\r\n")[0]
        monkeypatch.setattr(limits, "BODY_RATE", 10_000)
        with service.open(POST.replace(b"1000", b"60000")) as steady:  # longer than BODY_S, at more than BODY_RATE
            for _ in range(6):
                steady.sendall(b"x" * 10_000)
                time.sleep(0.5)
            assert b'"length":60000' in steady.recv(4096)


def test_slow_bodies_and_idle_sockets_shut_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 100)
    with listening() as service, contextlib.ExitStack() as stack:
        bodies = [stack.enter_context(service.open(POST)) for _ in range(40)]
        until(lambda: service.under_way == 40)
        for i in range(200):
            stack.enter_context(service.open(b"" if i % 2 else b"GET /"))
        until(lambda: len(service.server.server_state.connections) <= 101)
        assert service.post(b"abc").json()["length"] == 3
        assert service.healthy()
        bodies[0].sendall(b"x" * 1000)  # a request under way is not given up for idle ones
        assert b" 200 " in bodies[0].recv(4096).split(b"\r\n")[0]


@pytest.mark.parametrize(("each", "together", "status"), [(5, 400, 429), (50, 5, 503)])
def test_requests_at_once_are_bounded_and_health_is_not_counted(monkeypatch, each, together, status) -> None:
    monkeypatch.setattr(limits, "MAX_REQUESTS", together)
    with listening(max_requests_per_address=each) as service:
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(service.open(POST)).sendall(b"x")
            until(lambda: service.under_way == 5)
            refused = service.post(b"abc")
            assert refused.status_code == status
            assert "retry-after" in refused.headers
            assert service.healthy()
        until(lambda: not service.under_way)
        assert [service.post(b"abc").status_code for _ in range(12)] == [200] * 12  # ended ones are forgotten


@pytest.mark.parametrize("proxies", [[], ["10.9.9.9"], ["127.0.0.1"]])
def test_only_a_proxy_that_is_named_may_say_who_a_client_is(proxies: list[str]) -> None:
    head = POST.replace(b"Host", b"X-Forwarded-For: 10.1.1.%d\r\nHost")
    with listening(max_requests_per_address=3, proxies=proxies) as service, contextlib.ExitStack() as stack:
        for i in range(3):
            stack.enter_context(service.open(head % i)).sendall(b"x")
        until(lambda: service.under_way == 3)
        answer = service.post(b"abc", headers={"x-forwarded-for": "10.1.1.9"})
        assert answer.status_code == (200 if proxies == ["127.0.0.1"] else 429)


@pytest.mark.parametrize(("clients", "held"), [(6, 2), (1, 1)])
def test_bodies_in_flight_have_a_budget_and_slices_of_others_fit_beside_them(monkeypatch, clients, held) -> None:
    monkeypatch.setattr(limits, "UNCOUNTED", 1000)
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 10.0.0.%d\r\nContent-Length: 900000\r\n\r\n"
    with listening(proxies=["127.0.0.1"]) as service:
        with contextlib.ExitStack() as stack:

            def unfinished(i: int) -> socket.socket:
                connection = stack.enter_context(service.open(head % (i % clients)))
                with contextlib.suppress(ConnectionError):
                    connection.sendall(b"x" * 800_000)
                return connection

            for i in range(held):  # two million bytes have room, half of them for one client
                unfinished(i)
            until(lambda: service.limits.bytes.total() == held * 799_000)
            assert [unfinished(i).recv(12) for i in range(held, 6)] == [b"HTTP/1.1 503"] * (6 - held)
            until(lambda: service.under_way == held)
            assert service.post(b"x" * 900).json()["length"] == 900
        until(lambda: not service.under_way)
        assert service.post(b"x" * 900_000).json()["length"] == 900_000


def test_an_answer_that_is_not_read_ends_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("x" * 30_000_000)(scope, receive, send)

    monkeypatch.setattr(server, "STILL_S", 0.3)
    with listening(large) as service, service.open(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
        connections = service.server.server_state.connections
        until(lambda: len(connections) == 1)
        until(lambda: not connections)
