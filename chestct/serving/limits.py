"""What one client may cost: how slowly, how much and how often it may send, and which paths exist at all.

One ASGI middleware, which every request but a health probe passes first: uvicorn has no deadline for a body, and its
`limit_concurrency` turns away health probes with everybody else. Rates, many users and TLS are a proxy's work.
"""

import asyncio
import json
import logging
import re
import time
from collections import Counter
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, cast

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chestct.config.schema import ServeConfig
from chestct.serving.prometheus import Metrics

logger = logging.getLogger("chestct.serving")

BODY_S, BODY_RATE = 20.0, 50_000.0
"""Seconds that a body has at least, and bytes for each of which it gets another 1 / BODY_RATE seconds."""

MAX_REQUESTS = 400
"""Under way at once, of all clients together; fewer than connections, so that a health probe finds one."""

UNCOUNTED = 256_000
"""Bytes of each body that do not count as in flight: a large upload of one client leaves room for slices of others."""

ROUTES = {
    "GET": (
        *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"),
        *("/metrics", "/assets/*", "/static/*"),
        *("/gradio_api/info", "/gradio_api/app_id", "/gradio_api/startup-events", "/gradio_api/heartbeat/*"),
        *("/gradio_api/queue/data", "/gradio_api/call/*", "/gradio_api/upload_progress"),
    ),
    "POST": (
        *("/predict", "/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/call/*"),
        *("/gradio_api/cancel", "/gradio_api/reset"),
    ),
}
"""Paths that exist; a `*` stands for whatever follows. Gradio opens many more (files by path, proxies, code editors),
and a later Gradio may add some: they stay shut."""

WITH_FILES = ("/predict", "/gradio_api/upload")
LASTING = ("/assets/*", "/static/*")
MAX_JSON = 1_000_000
"""Bytes of a body that carries no file."""

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


UPLOAD = re.compile(r"[0-9a-f]{32}/[0-9a-f]{32}")
"""How `uploads.keep` names one."""


class NoUploadError(Exception):
    """A request that names another file than an upload."""


def route_of(method: str, path: str) -> str:
    """The entry of ROUTES that a request belongs to, or ""."""
    for route in ROUTES.get("GET" if method == "HEAD" else method, ()):
        if path == route or path.rstrip("/") == route or (route.endswith("*") and path.startswith(route[:-1])):
            return route
    return ""


class RequestLimits:
    """ASGI middleware; see the module. health: answers /healthz, to which no limit applies; uploads: their folder."""

    def __init__(self, app: ASGIApp, health: ASGIApp, metrics: Metrics, cfg: ServeConfig, uploads: Path) -> None:
        self.app, self.health, self.metrics, self.cfg, self.uploads = app, health, metrics, cfg, uploads
        self.requests: Counter[str] = Counter()  # under way, by address
        self.bytes: Counter[str] = Counter()  # received of bodies under way, by address, without UNCOUNTED

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == "/healthz":
            await self.health(scope, receive, send)
        elif scope["type"] == "http":  # nothing here speaks websocket
            await self._request(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = route_of(scope["method"], scope["path"])
        exchange = Exchange(self, scope, receive, send, route)
        begun = time.perf_counter()
        self.requests[exchange.client] += 1
        try:
            if not await self._refused(exchange):
                await self.app(scope, exchange.receive, exchange.send)
        except Exception:
            logger.exception("%s %s failed", scope["method"], route)
            await exchange.refuse(500, "Something went wrong on our side. It was noted in the log.")
        finally:
            self._forget(exchange)
            seconds = time.perf_counter() - begun
            self.metrics.requested(route or "other", exchange.status, seconds)
            # The route, not the path: what follows it may hold what a client made up.
            level = logging.INFO if scope["method"] == "POST" or exchange.status >= 400 else logging.DEBUG
            logger.log(level, "%s %s %s %.0f ms", scope["method"], route or "other", exchange.status, 1000 * seconds)

    async def _refused(self, exchange: "Exchange") -> bool:
        """Refuses what the head of a request is enough to refuse, and JSON that is none."""
        if not exchange.route:
            await exchange.refuse(404, "There is nothing here.")
        elif self.requests.total() > MAX_REQUESTS:
            await exchange.refuse(503, "The service is busy. Try again in a few seconds.")
        elif self.requests[exchange.client] > self.cfg.max_requests_per_address:
            most = self.cfg.max_requests_per_address
            await exchange.refuse(429, f"More than {most} requests at once from your address. Wait for answers first.")
        elif exchange.announced > exchange.max_bytes:
            await exchange.refuse_size()
        elif exchange.scope["method"] == "POST" and exchange.route not in WITH_FILES:
            await exchange.check_json()
        return exchange.refused

    def room_for(self, client: str) -> bool:
        """Whether bodies in flight leave room: a client may fill half of it."""
        half = self.cfg.max_upload_bytes
        return self.bytes[client] <= half and self.bytes.total() <= 2 * half

    def _forget(self, exchange: "Exchange") -> None:
        for counter, amount in ((self.requests, 1), (self.bytes, exchange.counted)):
            counter[exchange.client] -= amount
            if not counter[exchange.client]:
                del counter[exchange.client]


class Exchange:
    """A request and its answer on their way: bytes are counted while they stream, and deadlines kept.

    After `refuse`, which answers in place of the app, nothing that the app sends goes out.
    """

    def __init__(self, limits: RequestLimits, scope: Scope, receive: Receive, send: Send, route: str) -> None:
        self.limits, self.scope, self.route = limits, scope, route
        self.client = scope["client"][0] if scope.get("client") else ""
        self.max_bytes = limits.cfg.max_upload_bytes if route in WITH_FILES else MAX_JSON
        self.announced = _content_length(scope)
        self.status = self.size = self.counted = 0
        self.refused = self.complete = False
        self._receive, self._send = receive, send
        self._begun = asyncio.get_running_loop().time()
        self._again: list[Message] = []
        if not limits.cfg.proxies:  # Gradio builds addresses from these headers, whoever sent them
            scope["headers"] = [pair for pair in scope["headers"] if not pair[0].startswith(b"x-forwarded-")]

    async def receive(self) -> Message:
        """The next part of the body; http.disconnect where it comes too late or is too much."""
        if self.refused:
            return {"type": "http.disconnect"}
        if self._again:
            return self._again.pop()
        if self.complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._begun + BODY_S + self.size / BODY_RATE):
                message = await self._receive()
        except TimeoutError:
            await self.refuse(408, "The request came too slowly. Try again over a faster connection.")
            return {"type": "http.disconnect"}
        self.complete = not message.get("more_body", False)
        self._count(len(message.get("body", b"")))
        if self.size > self.max_bytes:
            await self.refuse_size()
        elif not self.limits.room_for(self.client):
            await self.refuse(503, "Too much is being sent at the moment. Try again in a few seconds.")
        return {"type": "http.disconnect"} if self.refused else message

    def _count(self, length: int) -> None:
        self.size += length
        more = max(0, self.size - UNCOUNTED) - self.counted
        self.counted += more
        self.limits.bytes[self.client] += more

    async def check_json(self) -> None:
        """Refuses a body that is not JSON, holds NaN, over which Gradio fails, or names a file that is no upload."""
        body, message = b"", cast(MutableMapping[str, Any], {"more_body": True})
        while message.get("more_body"):
            message = await self.receive()
            body += message.get("body", b"")
        try:
            content = json.loads(body, parse_constant=_no_number, object_hook=self._located)
            body = json.dumps(content).encode()
        except NoUploadError:
            await self.refuse(400, "This is no file that was uploaded.")
        except (ValueError, RecursionError):
            await self.refuse(400, "The request cannot be read: it is to be JSON.")
        self._again.append({"type": "http.request", "body": body, "more_body": False})

    def _located(self, item: dict[str, Any]) -> dict[str, Any]:
        """A file of a Gradio client with the path it has here: clients know its name alone, never the folder.

        Gradio itself would fetch a path that is an address, and copy one that leads elsewhere. Raises NoUploadError.
        """
        if "path" in item and "meta" in item:
            if not UPLOAD.fullmatch(str(item["path"])):
                raise NoUploadError
            item |= {"path": str(self.limits.uploads / item["path"]), "url": None}
        return item

    async def send(self, message: Message) -> None:
        """Sends what the app answers, with HEADERS."""
        if self.refused:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            mine = HEADERS | ({} if self.route in LASTING else {"cache-control": "no-store"})
            kept = [(name, value) for name, value in message.get("headers", []) if name.decode().lower() not in mine]
            message["headers"] = kept + [(name.encode(), value.encode()) for name, value in mine.items()]
        await self._send(message)

    async def refuse(self, status: int, message: str) -> None:
        """Answers with a sentence, unless an answer is under way, and ends the connection if its body goes on."""
        if not self.status:
            headers = {} if self.complete else {"connection": "close"}
            headers |= {"retry-after": "5"} if status in (429, 503) else {}
            await JSONResponse({"error": message}, status, headers)(self.scope, self._receive, self.send)
        self.refused = True

    async def refuse_size(self) -> None:
        """Refuses a body for its size."""
        most = f"{self.max_bytes:,}"
        await self.refuse(413, f"That is too large: one request may send {most} bytes. Send fewer or smaller files.")


def _content_length(scope: Scope) -> float:
    """The body's length as announced, 0 where it is not, infinity where it is nonsense."""
    text = dict(scope["headers"]).get(b"content-length", b"0")
    return int(text) if text.isdigit() else float("inf")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
