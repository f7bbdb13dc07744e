"""What one client may cost, and which paths exist at all: one ASGI middleware that every request passes first.

Bodies are read here, whole, before anything works on them: uvicorn has no deadline for one, and its
`limit_concurrency` turns away health probes with everybody else. Rates, many users and TLS are a proxy's work.
"""

import asyncio
import hmac
import json
import logging
import re
import time
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from prometheus_client import Histogram
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from chestct.config.schema_serving import ServeConfig
from chestct.errors import ConfigError

logger = logging.getLogger("chestct.serving")

REQUESTS = Histogram("chestct_request_seconds", "Time to answer, by route and HTTP status", ["route", "status"])

BODY_S, BODY_RATE = 20.0, 50_000.0
"""Seconds that a body has at least, and bytes for each of which it gets another 1 / BODY_RATE seconds."""

UNCOUNTED = 256_000
"""Bytes of each body that do not count as in flight: a large upload of one client leaves room for slices of others."""

MAX_REQUESTS = 400  # of all clients together: connections are left for health probes
MAX_JSON = 1_000_000  # bytes of a body that carries no file
WRONG_PASSWORD_S = 1.0  # before it is answered
ROUTES = {
    "GET": (
        *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/metrics", "/assets/*"),
        *("/static/*", "/gradio_api/app_id", "/gradio_api/startup-events", "/gradio_api/heartbeat/*"),
        *("/gradio_api/queue/data", "/gradio_api/upload_progress"),
    ),
    "POST": ("/predict", *(f"/gradio_api/{name}" for name in ("upload", "queue/join", "cancel", "reset"))),
}
"""Paths that exist; a `*` stands for whatever follows. Gradio opens many more (files by path, proxies, code editors),
and a later Gradio may add some: they stay shut."""

HEALTH = ("/healthz", "/readyz")
WITH_FILES = ("/predict", "/gradio_api/upload")
SOON = {"retry-after": "5"}
HEADERS = {
    # Gradio compiles its templates in the browser and writes inline scripts and styles: hence the unsafe ones.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Refused(Exception):  # noqa: N818 - an answer, not a failure
    """A request that is answered with a status and a sentence instead of by the app."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        # What of a body was not read would be taken for the next request.
        self.response = JSONResponse({"error": message}, status, {"connection": "close"} | headers)


def login_from(environ: Mapping[str, str]) -> bytes:
    """The digest of the one Authorization header that is let in; b"" where no password is set. Raises ConfigError."""
    username, password = environ.get("CHESTCT_USERNAME", ""), environ.get("CHESTCT_PASSWORD", "")
    if not username and not password:
        return b""
    if not username or ":" in username or len(password) < 12:
        raise ConfigError(
            "CHESTCT_USERNAME and CHESTCT_PASSWORD belong together: a name without a colon, and a password of at least "
            "12 characters, such as `python -c 'import secrets; print(secrets.token_urlsafe())'` makes."
        )
    return sha256(b"Basic " + b64encode(f"{username}:{password}".encode())).digest()


def route_of(method: str, path: str) -> str:
    """The entry of ROUTES that a request belongs to, or ""."""
    for route in ROUTES.get("GET" if method == "HEAD" else method, ()):
        if path == route or (route.endswith("*") and path.startswith(route[:-1])):
            return route
    return ""


class RequestLimits:
    """ASGI middleware; see the module. health: answers HEALTH, to which no limit applies; uploads: their folder."""

    def __init__(self, app: ASGIApp, health: ASGIApp, cfg: ServeConfig, uploads: Path, login: bytes = b"") -> None:
        self.app, self.health, self.cfg, self.uploads, self.login = app, health, cfg, uploads, login
        self.requests: Counter[str] = Counter()  # under way, by address
        self.bytes: Counter[str] = Counter()  # of bodies under way, by address, without UNCOUNTED
        self.behind_proxies: Any = ProxyHeadersMiddleware(cast(Any, self._request), cfg.proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] in HEALTH:
            await self.health(scope, receive, send)
        elif scope["type"] == "http":  # nothing here speaks websocket
            # Gradio builds addresses from these headers, whoever sent them.
            believed = scope.get("client") and scope["client"][0] in self.behind_proxies.trusted_hosts
            made_up = (b"x-gradio-server",) if believed else (b"x-gradio-server", b"x-forwarded-")
            scope["headers"] = [pair for pair in scope["headers"] if not pair[0].startswith(made_up)]
            await self.behind_proxies(scope, receive, send)  # from here on, `client` is who a proxy says it is

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        route, client = route_of(scope["method"], scope["path"]), scope["client"][0] if scope.get("client") else ""
        began, status, whole = time.perf_counter(), 0, list[Message]()

        async def read() -> Message:
            return whole.pop() if whole else await receive()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                ours = HEADERS | ({} if route in ("/assets/*", "/static/*") else {"cache-control": "no-store"})
                kept = [pair for pair in message.get("headers", []) if pair[0].decode().lower() not in ours]
                message["headers"] = kept + [(name.encode(), value.encode()) for name, value in ours.items()]
            await send(message)

        self.requests[client] += 1
        try:
            await self._check(scope, route, client)
            async with self._body(scope, receive, route, client) as body:
                if scope["method"] == "POST" and route not in WITH_FILES:
                    body = self._checked_json(body)
                whole.append({"type": "http.request", "body": body, "more_body": False})
                await self.app(scope, read, answer)
        except ClientDisconnect:
            pass
        except Refused as refusal:
            await refusal.response(scope, receive, answer)
        except Exception:
            logger.exception("%s %s failed", scope["method"], route)
            if not status:
                sorry = Refused(500, "Something went wrong on our side. It was noted in the log.")
                await sorry.response(scope, receive, answer)
        finally:
            self.requests -= Counter([client])  # which forgets who has none
            seconds = time.perf_counter() - began
            REQUESTS.labels(route or "other", status).observe(seconds)
            # The route, not the path: what follows it may hold what a client made up.
            level = logging.INFO if scope["method"] == "POST" or status >= 400 else logging.DEBUG
            logger.log(level, "%s %s %s %.0f ms", scope["method"], route or "other", status, 1000 * seconds)

    async def _check(self, scope: Scope, route: str, client: str) -> None:
        """Refuses what the head of a request is enough to refuse."""
        headers, most = dict(scope["headers"]), self.cfg.max_requests_per_address
        if not route:
            raise Refused(404, "There is nothing here.")
        if self.requests[client] > most:
            raise Refused(429, f"More than {most} requests at once from your address.", **SOON)
        if self.requests.total() > MAX_REQUESTS:
            raise Refused(503, "Too many requests at the moment. Try again.", **SOON)
        given = re.sub(rb"(?i)^basic +", b"Basic ", headers.get(b"authorization", b""))  # in any case, says RFC 9110
        if self.login and not hmac.compare_digest(sha256(given).digest(), self.login):
            await asyncio.sleep(WRONG_PASSWORD_S if given else 0)
            ask = {"www-authenticate": 'Basic realm="chestct", charset="UTF-8"'}
            raise Refused(401, "Name and password, please.", **ask)

    @asynccontextmanager
    async def _body(self, scope: Scope, receive: Receive, route: str, client: str) -> AsyncIterator[bytes]:
        """A whole body, read within its deadline and the budgets. Raises Refused, and ClientDisconnect."""
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        began, upload = asyncio.get_running_loop().time(), self.cfg.max_upload_bytes
        most = upload if route in WITH_FILES else MAX_JSON
        parts, more, size, counted = list[bytes](), True, 0, 0
        try:
            while True:
                if max(size, int(announced)) > most:
                    raise Refused(
                        413,
                        f"That is too large: one request may send {most:,} bytes. Send less, or use the command line "
                        "for whole scans: chestct predict.",
                    )
                if self.bytes[client] > upload or self.bytes.total() > 2 * upload:
                    raise Refused(503, "Too much is being sent at the moment. Try again.", **SOON)
                if not more:
                    break
                try:
                    async with asyncio.timeout_at(began + BODY_S + size / BODY_RATE):
                        message = await receive()
                except TimeoutError:
                    raise Refused(408, "The request came too slowly. Try again over a faster connection.") from None
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                more = message.get("more_body", False)
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                self.bytes[client] += max(0, size - UNCOUNTED) - counted
                counted = max(0, size - UNCOUNTED)
            body = b"".join(parts)
            parts.clear()
            yield body
        finally:
            self.bytes -= Counter({client: counted})

    def _checked_json(self, body: bytes) -> bytes:
        """The body, unless it is not JSON, holds NaN, over which Gradio fails, or names a file that is no upload."""
        try:
            return json.dumps(json.loads(body, object_hook=self._located), allow_nan=False).encode()
        except (ValueError, RecursionError):
            raise Refused(400, "The request cannot be read: it is to be JSON.") from None

    def _located(self, item: dict[str, Any]) -> dict[str, Any]:
        """A file of a Gradio client with the path it has here: clients know its name alone, never the folder.

        Gradio itself would fetch a path that is an address, and copy one that leads elsewhere.
        """
        if "path" in item and "meta" in item:
            if not re.fullmatch("[0-9a-f]{32}", str(item["path"])):  # as `reading.keep` names one
                raise Refused(400, "This is no file that was uploaded.")
            item |= {"path": str(self.uploads / item["path"]), "url": None}
        return item
