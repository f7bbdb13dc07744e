"""The HTTP side as one FastAPI app: POST /predict, /metrics, uploads for the page, and the page itself.

Host names, CORS and the password are Starlette's middleware; what it has nothing for stands in `limits`. One password
guards page and API alike, which is why it is not Gradio's `auth`: that covers its own routes alone.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import logging
import os
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.authentication import (
    AuthCredentials,
    AuthenticationBackend,
    AuthenticationError,
    BaseUser,
    SimpleUser,
)
from starlette.concurrency import run_in_threadpool
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

import chestct
from chestct.config.schema import ServeConfig
from chestct.errors import ConfigError, DecodeError
from chestct.serving.limits import RequestLimits
from chestct.serving.pictures import data_uri, overlay
from chestct.serving.predictor import NEVER, NOT_MEDICAL, BusyError, Prediction, Predictor
from chestct.serving.prometheus import Metrics
from chestct.serving.reading import OnAnswer, record
from chestct.serving.uploads import FormError, UploadError, files_in_form, keep, sweep

logger = logging.getLogger("chestct.serving")

HOSTS = ("localhost", "[::1]", *(f"*.{last}" for last in range(256)))
"""Hosts that are always answered: no DNS name ends in a number, so the patterns are IPv4 addresses, which a page on a
rebound name cannot claim to be."""

SHORTEST_PASSWORD = 12
WRONG_PASSWORD_S = 1.0
"""Seconds before a wrong password is answered; requests at once from one address are limited."""

SWEEP_S = 15.0
"""Seconds between two looks for uploads that were never read."""


def make_app(
    predictor: Predictor,
    cfg: ServeConfig,
    uploads: Path,
    metrics: Metrics,
    on_answer: OnAnswer | None = None,
    login: "Login | None" = None,
) -> FastAPI:
    """The app with every route but the page's. uploads: folder for the page's uploads; login: None: open to all."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep_often(uploads, 2 * cfg.request_timeout_s))
        yield
        sweeping.cancel()

    app = FastAPI(title="chestct", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    pool = ThreadPoolExecutor(cfg.batch_size, "predict")
    slots = threading.Semaphore(cfg.queue_size)

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "bundle": predictor.bundle.id, "version": chestct.__version__})

    async def report(_: Request) -> Response:
        metrics.serves(predictor.bundle.id)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def predict(request: Request) -> Response:
        with_overlay = request.query_params.get("overlay", "").lower() in ("1", "true", "yes")
        cancelled = threading.Event()
        try:
            body, content_type = await request.body(), request.headers.get("content-type", "")
            data = await run_in_threadpool(_file_in, body, content_type)
            if not slots.acquire(blocking=False):  # only now: a slow body holds none
                raise BusyError("The service is busy. Try again in a few seconds.")
            work = pool.submit(answer, predictor, data, with_overlay, on_answer, cancelled)
            work.add_done_callback(lambda _: slots.release())
            return JSONResponse(await _while_connected(request, asyncio.wrap_future(work), cfg.request_timeout_s))
        except DecodeError as error:
            metrics.failures.labels("unreadable").inc()
            return _error(422, f"This file cannot be read: {error.reason}.")
        except BusyError as error:
            metrics.failures.labels("busy").inc()
            return _error(503, str(error), {"retry-after": "10"})
        except UploadError as error:
            return _error(400, str(error))
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            cancelled.set()

    async def upload(request: Request) -> Response:
        """What Gradio's page and clients expect of its own route, which this one stands before."""
        try:
            body, content_type = await request.body(), request.headers.get("content-type", "")
            files = await run_in_threadpool(files_in_form, body, content_type)
            paths = await run_in_threadpool(keep, files, uploads, cfg.max_slices, 2 * cfg.max_upload_bytes)
            return JSONResponse([path.relative_to(uploads).as_posix() for path in paths])
        except UploadError as error:
            return PlainTextResponse(str(error), 400 if isinstance(error, FormError) else 413)  # shown on the page
        except ClientDisconnect:
            return Response(status_code=499)

    async def upload_progress(_: Request) -> Response:
        return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")  # the page waits for that much

    app.add_api_route("/metrics", report, methods=["GET"])
    app.add_api_route("/predict", predict, methods=["POST"])
    app.add_api_route("/gradio_api/upload", upload, methods=["POST"])
    app.add_api_route("/gradio_api/upload_progress", upload_progress, methods=["GET"])
    # The last one added is the first one that a request meets.
    if login:
        app.add_middleware(AuthenticationMiddleware, backend=login, on_error=_unauthorized)
    app.add_middleware(CORSMiddleware, allow_origins=())  # and Gradio then leaves out its own, which trusts localhost
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*HOSTS, cfg.host, *cfg.hosts], www_redirect=False)
    app.add_middleware(RequestLimits, health=Route("/healthz", health).app, metrics=metrics, cfg=cfg, uploads=uploads)
    return app


def answer(
    predictor: Predictor,
    data: bytes,
    with_overlay: bool,
    on_answer: OnAnswer | None = None,
    cancelled: threading.Event = NEVER,
) -> dict[str, Any]:
    """The answer for one file as plain JSON. Raises DecodeError and BusyError."""
    with predictor.room(data, cancelled=cancelled):
        prediction = predictor.predict(data, name="file", explain=with_overlay, cancelled=cancelled)
        record(prediction, on_answer)
        return as_json(prediction, with_overlay)


def as_json(prediction: Prediction, with_overlay: bool = False) -> dict[str, Any]:
    """score and decision first; seconds: where the time went; with_overlay: with `overlay`, a PNG as data URI."""
    fields: dict[str, Any] = {
        "score": round(prediction.score, 6),
        "decision": prediction.decision,
        "reason": prediction.reason,
        "probabilities": {name: round(share, 6) for name, share in prediction.probabilities.items()},
        "possible": list(prediction.possible),
        "novelty": round(prediction.novelty, 4),
        "known": prediction.known,
        "bundle": prediction.bundle,
        "seconds": {name: round(seconds, 4) for name, seconds in prediction.seconds.items()},
        "notice": NOT_MEDICAL,
    }
    return fields | {"overlay": data_uri(overlay(prediction), "png")} if with_overlay else fields


class Login(AuthenticationBackend):
    """HTTP Basic with one name and password. Times tell nothing: both are compared at once, in constant time."""

    def __init__(self, username: str, password: str) -> None:
        self.username, self._expected = username, _hash(f"{username}:{password}".encode())

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "Login | None":
        """From CHESTCT_USERNAME and CHESTCT_PASSWORD; None where they are not set. Raises ConfigError."""
        if old := next((name for name in ("CHESTCT_USERS", "CHESTCT_TOKENS") if environ.get(name)), ""):
            raise ConfigError(
                f"{old} is no longer read. Set CHESTCT_USERNAME and CHESTCT_PASSWORD for one login, or give many users "
                "theirs at a proxy (docs/deploy.md)."
            )
        username, password = environ.get("CHESTCT_USERNAME", ""), environ.get("CHESTCT_PASSWORD", "")
        if not username and not password:
            return None
        if not username or ":" in username or len(password) < SHORTEST_PASSWORD:
            raise ConfigError(
                "CHESTCT_USERNAME and CHESTCT_PASSWORD belong together: a name without a colon, and a password of at "
                f"least {SHORTEST_PASSWORD} characters, such as `python -c 'import secrets; "
                "print(secrets.token_urlsafe())'` makes."
            )
        return cls(username, password)

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser]:
        """Raises AuthenticationError unless the request brings name and password."""
        scheme, _, credentials = conn.headers.get("authorization", "").partition(" ")
        try:
            given = base64.b64decode(credentials, validate=True)
        except ValueError:  # not base64, or not ASCII
            given = b""
        if scheme.lower() == "basic" and hmac.compare_digest(_hash(given), self._expected):
            return AuthCredentials(["authenticated"]), SimpleUser(self.username)
        if credentials:
            await asyncio.sleep(WRONG_PASSWORD_S)
        raise AuthenticationError("Name and password, please.")


def _hash(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()  # of one length, whatever is compared


def _unauthorized(_: HTTPConnection, error: Exception) -> Response:
    return _error(401, str(error), {"www-authenticate": 'Basic realm="chestct", charset="UTF-8"'})


async def _while_connected(request: Request, work: asyncio.Future[Any], seconds: float) -> dict[str, Any]:
    """The result of `work`; raises ClientDisconnect when the client hangs up before, BusyError when time runs out."""
    gone: asyncio.Future[Any] = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({work, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if gone.done():
            raise ClientDisconnect
        raise BusyError(f"No answer within {seconds:.0f} s: the service is busy. Try again.")
    finally:
        gone.cancel()
        work.cancel()  # unless it has begun; then its request's `cancelled` stops it


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _file_in(body: bytes, content_type: str) -> bytes:
    """The file in a request: its body, or the first file of a form. Raises UploadError where there is none."""
    data = body
    if content_type.startswith("multipart/form-data"):
        data = next(iter(files_in_form(body, content_type)), b"")
    if not data:
        raise UploadError("There is no file in the request. Send it as the body, or as a form with one file.")
    return data


async def _sweep_often(folder: Path, seconds: float) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        await run_in_threadpool(sweep, folder, seconds)


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)
