"""What every request passes before anything else sees it: known paths only, who asks, how often, how much.

Gradio opens many doors that this page does not use (files by path, proxies, code editors). Only the ones in ROUTES
exist here, so that a new one in a later Gradio stays shut. Written as plain ASGI: a body is counted while it streams,
and nothing is held in memory.
"""

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from chestct.serving.auth import Gate
from chestct.serving.counters import Counters

logger = logging.getLogger("chestct.serving")

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ROUTES = {
    "GET": (
        *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"),
        *("/healthz", "/metrics", "/page/*", "/assets/*", "/static/*"),
        *("/gradio_api/info", "/gradio_api/app_id", "/gradio_api/startup-events", "/gradio_api/heartbeat/*"),
        *("/gradio_api/queue/data", "/gradio_api/upload_progress", "/gradio_api/call/*"),
    ),
    "POST": (
        *("/predict", "/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/call/*"),
        *("/gradio_api/cancel", "/gradio_api/reset"),
    ),
}
"""Paths that exist; a `*` stands for whatever follows."""

COUNTED = ("/predict", "/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/call/*")
"""Routes whose POST asks for work; their number a minute is limited for each client."""

LASTING = ("/assets/*", "/static/*", "/page/*")

SMALL_BODY = 1_000_000
"""Bytes for requests that carry no file."""

WITH_FILES = ("/predict", "/gradio_api/upload")

CLIENTS = 10_000

HEADERS = {
    # Gradio compiles its templates in the browser and writes inline scripts and styles: hence the unsafe ones.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class RateLimit:
    """Requests a minute for each client: a bucket that holds a minute's worth and refills steadily; 0 is no limit."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str, now: float) -> float:
        """Seconds until the client may ask again; 0: now, and it counts. now: seconds on any steady clock."""
        if not self.per_minute:
            return 0.0
        left, then = self._buckets.pop(client, (float(self.per_minute), now))
        left = min(float(self.per_minute), left + (now - then) * self.per_minute / 60)
        wait = 0.0 if left >= 1 else (1 - left) * 60 / self.per_minute
        self._buckets[client] = (left if wait else left - 1, now)
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return wait


def route_of(method: str, path: str) -> str:
    """The entry of ROUTES that a request belongs to, or ""."""
    for route in ROUTES.get("GET" if method == "HEAD" else method, ()):
        if path == route or path.rstrip("/") == route or (route.endswith("*") and path.startswith(route[:-1])):
            return route
    return ""


class Guard:
    """ASGI middleware; see the module. max_upload: bytes of a body with files."""

    def __init__(self, app: App, gate: Gate, counters: Counters, max_upload: int, rate: int) -> None:
        self.app, self.gate, self.counters, self.max_upload = app, gate, counters, max_upload
        self.rate = RateLimit(rate)
        self.tries = RateLimit(30)  # wrong passwords

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":  # nothing here speaks websocket
            return
        route = route_of(scope["method"], scope["path"])
        sender = Sender(send, lasting=route in LASTING)
        begun = time.perf_counter()
        try:
            await self._handle(scope, receive, sender, route)
        except Exception:
            logger.exception("%s %s failed", scope["method"], route)
            if not sender.status:
                await sender.refuse(500, "Something went wrong on our side. It was noted in the log.")
        finally:
            seconds = time.perf_counter() - begun
            self.counters.requested(route or "other", sender.status, seconds)
            # The route, not the path: what follows it may hold what a client made up.
            level = logging.INFO if route in COUNTED or sender.status >= 400 else logging.DEBUG
            logger.log(level, "%s %s %s %.0f ms", scope["method"], route or "other", sender.status, 1000 * seconds)

    async def _handle(self, scope: Scope, receive: Receive, sender: "Sender", route: str) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        client = scope["client"][0] if scope.get("client") else ""
        if not route:
            await sender.refuse(404, "There is nothing here.")
        elif route != "/healthz" and not self.gate.open and not await self._admitted(headers, client, sender):
            return
        elif scope["method"] == "POST" and route in COUNTED and (wait := self.rate.wait(client, time.monotonic())) > 0:
            said = f"Too many requests from your address. Try again in {wait:.0f} s."
            await sender.refuse(429, said, {"retry-after": str(max(1, round(wait)))})
        else:
            most = self.max_upload if route in WITH_FILES else SMALL_BODY
            announced = headers.get("content-length", "0")
            if not announced.isdecimal() or int(announced) > most:
                await sender.refuse(413, _too_large(most), {"connection": "close"})
                return
            receive = _counted(receive, sender, most)
            if scope["method"] == "POST" and route not in WITH_FILES:
                receive = await _checked(receive, sender)
            if not sender.refused:
                await self.app(scope, receive, sender)

    async def _admitted(self, headers: dict[str, str], client: str, sender: "Sender") -> bool:
        header = headers.get("authorization", "")
        if header and self.gate.known(header):
            return True
        if header and self.tries.wait(client, time.monotonic()) > 0:
            await sender.refuse(429, "Too many wrong passwords. Wait a minute.", {"retry-after": "60"})
            return False
        admitted: bool = await asyncio.to_thread(self.gate.admits, header)
        if admitted:
            return True
        challenge = {"www-authenticate": 'Basic realm="chestct", charset="UTF-8"'}
        await sender.refuse(401, "Name and password, please.", challenge)
        return False


class Sender:
    """Sends what the app answers, with HEADERS; after `refuse`, which answers in its place, nothing more."""

    def __init__(self, send: Send, lasting: bool) -> None:
        self.send, self.lasting = send, lasting
        self.status = 0
        self.refused = False

    async def __call__(self, message: Message) -> None:
        if self.refused:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            mine = HEADERS | ({} if self.lasting else {"cache-control": "no-store"})
            kept = [(name, value) for name, value in message.get("headers", []) if name.decode().lower() not in mine]
            message["headers"] = kept + [(name.encode(), value.encode()) for name, value in mine.items()]
        await self.send(message)

    async def refuse(self, status: int, said: str, headers: dict[str, str] | None = None) -> None:
        """Answers with a sentence, unless an answer is under way."""
        if not self.status:
            await self.answer(status, {"error": said}, headers)
        self.refused = True

    async def answer(self, status: int, told: dict[str, str], headers: dict[str, str] | None = None) -> None:
        """Answers with JSON."""
        body = json.dumps(told).encode()
        kind = {"content-type": "application/json", "content-length": str(len(body))}
        pairs = [(name.encode(), value.encode()) for name, value in (kind | (headers or {})).items()]
        await self({"type": "http.response.start", "status": status, "headers": pairs})
        await self({"type": "http.response.body", "body": body})


def _counted(receive: Receive, sender: Sender, most: int) -> Receive:
    """`receive` that ends a body which grows beyond `most` bytes, whatever its header announced."""
    size = 0

    async def counted() -> Message:
        nonlocal size
        if sender.refused:
            return {"type": "http.disconnect"}
        message = await receive()
        size += len(message.get("body", b""))
        if size > most:
            await sender.refuse(413, _too_large(most), {"connection": "close"})
            return {"type": "http.disconnect"}
        return message

    return counted


async def _checked(receive: Receive, sender: Sender) -> Receive:
    """`receive` with its body read already; one that is no text is refused here, since Gradio would fail over it."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return receive
        body, more = body + message.get("body", b""), message.get("more_body", False)
    try:
        body.decode()
    except UnicodeDecodeError:
        await sender.refuse(400, "The request cannot be read: it is to be JSON.")
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again


def _too_large(most: int) -> str:
    return f"That is too large: one request may send {most:,} bytes. Send fewer or smaller files."
