"""The HTTP side as one Starlette app: POST /predict, /metrics, uploads for the page, and room for the page itself.

Host names and CORS are Starlette's middleware; what it has nothing for stands in `limits`. The app listens before the
predictor is there, so nothing that takes long to import is imported here.
"""

import asyncio
import logging
import re
import secrets
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import generate_latest
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chestct.config.schema_serving import ServeConfig
from chestct.errors import BusyError, ChestCTError, DecodeError
from chestct.serving.limits import SOON, Refused, RequestLimits
from chestct.version import __version__

if TYPE_CHECKING:
    from chestct.serving.predictor import OnAnswer, Predictor

logger = logging.getLogger("chestct.serving")
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it logs bytes of bodies that it cannot read

FILENAME = re.compile(rb";\s*filename\*?(0\*?)?\s*=", re.IGNORECASE)
MAX_FIELDS, MAX_HEAD = 8, 8_000
"""Parts of a form besides its files, and bytes of the head of a part."""

HOSTS = ("localhost", "[::1]", *(f"*.{last}" for last in range(256)))
"""Hosts that are always answered: no DNS name ends in a number, so the patterns are IPv4 addresses, which a page on a
rebound name cannot claim to be."""


def netloc(host: str) -> str:
    """A host as it stands in URLs and in the Host header: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


class UploadError(ChestCTError):
    """A request that asks for too much, or that cannot be read."""


def make_app(
    loading: "Future[Predictor]",
    cfg: ServeConfig,
    uploads: Path,
    on_answer: "OnAnswer | None" = None,
    login: bytes = b"",
) -> Starlette:
    """The app with every route but the page's. A request for an answer waits for the predictor.

    loading: running, so that no waiting request can cancel it; a BusyError in it is what waiting requests are told.
    uploads: folder for the page's uploads; login: from `login_from`.
    """
    slots = asyncio.Semaphore(cfg.queue_size)

    async def health(request: Request) -> Response:
        """Alive is at once, /healthz; ready is when the predictor is there, /readyz."""
        ready = loading.done() and not loading.exception()
        bundle = loading.result().bundle.id if ready else None
        status = 200 if ready or request.url.path == "/healthz" else 503
        about = {"status": "ok" if ready else "starting", "bundle": bundle, "version": __version__}
        return JSONResponse(about, status)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def predict(request: Request) -> Response:
        with_overlay = request.query_params.get("overlay", "").lower() in ("1", "true", "yes")
        data = await run_in_threadpool(
            _file_in, await request.body(), request.headers.get("content-type", ""), cfg.max_slices
        )
        predictor = await asyncio.wrap_future(loading)
        if slots.locked():  # only now: a slow body holds none
            raise BusyError
        async with slots, _cancelled_with(request) as cancelled:
            work = run_in_threadpool(answer, predictor, data, with_overlay, on_answer, cancelled)
            return JSONResponse(await work)

    async def upload(request: Request) -> Response:
        """What Gradio's page and clients expect of its own route, which this one stands before."""
        body, content_type = await request.body(), request.headers.get("content-type", "")
        files = await run_in_threadpool(files_in_form, body, content_type, cfg.max_slices)
        names = await run_in_threadpool(keep, files, uploads, 2 * cfg.max_upload_bytes)
        for name in names:  # what nobody reads
            asyncio.get_running_loop().call_later(2 * cfg.request_timeout_s, (uploads / name).unlink, True)
        return JSONResponse(names)

    async def upload_progress(_: Request) -> Response:
        return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")  # the page waits for that much

    async def explain(request: Request, error: Exception) -> Response:
        if isinstance(error, DecodeError):
            return JSONResponse({"error": f"This file cannot be read: {error.reason}."}, 422)
        status, headers = (400, None) if isinstance(error, UploadError) else (503, SOON)
        if request.url.path == "/predict":
            return JSONResponse({"error": str(error)}, status, headers)
        return PlainTextResponse(str(error), status, headers)  # shown on the page as it is

    return Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/predict", predict, methods=["POST"]),
            Route("/gradio_api/upload", upload, methods=["POST"]),
            Route("/gradio_api/upload_progress", upload_progress),
        ],
        exception_handlers={ChestCTError: explain},
        middleware=[
            Middleware(RequestLimits, health=Route("/", health).app, cfg=cfg, uploads=uploads, login=login),
            Middleware(known_hosts, hosts=[*HOSTS, netloc(cfg.host), *cfg.hosts]),
            Middleware(CORSMiddleware, allow_origins=()),  # no page elsewhere reads an answer
        ],
    )


def known_hosts(app: ASGIApp, hosts: list[str]) -> ASGIApp:
    """Starlette's check of the host name, with an answer that says the way out."""

    async def refuse(_: Message) -> None:
        raise Refused(
            400,
            "This service does not know the name in its address. Whoever runs it tells it: 'serve.hosts=[NAME]'. "
            "localhost and IPv4 addresses need no telling.",
        )

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        async def let_in(scope: Scope, receive: Receive, _: Send) -> None:
            await app(scope, receive, send)

        await TrustedHostMiddleware(let_in, hosts, www_redirect=False)(scope, receive, refuse)

    return checked


@asynccontextmanager
async def _cancelled_with(request: Request) -> AsyncIterator[threading.Event]:
    """An event that is set when the client hangs up."""
    cancelled = threading.Event()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        cancelled.set()

    watching = asyncio.create_task(watch())
    try:
        yield cancelled
    finally:
        watching.cancel()


def files_in_form(body: bytes, content_type: str, max_files: int) -> list[bytes]:
    """The content of each file in a body of multipart/form-data, fields left out. Raises UploadError.

    For Starlette, a part named by `filename*=` (RFC 5987, as older clients write names that are not ASCII) is a field.
    """
    parts: list[tuple[bytearray, bytearray]] = []  # headers and content of each
    ends: list[bool] = []  # not empty once the form's end was seen
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    too_many = UploadError(
        f"More than {max_files} files at once. Send fewer, or use the command line for whole folders: chestct predict."
    )

    def begin() -> None:
        if len(parts) == max_files + MAX_FIELDS:
            raise too_many
        parts.append((bytearray(), bytearray()))

    def head(data: bytes, start: int, end: int) -> None:
        parts[-1][0].extend(data[start:end])
        if len(parts[-1][0]) > MAX_HEAD:
            raise UploadError(f"The form cannot be read: a part of it has more than {MAX_HEAD:,} bytes of headers.")

    callbacks: Any = {
        "on_part_begin": begin,
        "on_header_value": head,
        "on_part_data": lambda data, start, end: parts[-1][1].extend(data[start:end]),
        "on_end": lambda: ends.append(True),
    }
    try:
        MultipartParser(boundary, callbacks).write(body)
    except FormParserError as error:
        raise UploadError(f"The form cannot be read: {error}.") from None
    if not boundary or not ends:
        raise UploadError("The form cannot be read: it is cut off, or its content type names another boundary.")
    files = [bytes(content) for headers, content in parts if FILENAME.search(headers)]
    if len(files) > max_files:
        raise too_many
    return files


def keep(files: list[bytes], folder: Path, max_bytes: int) -> list[str]:
    """Writes uploads under random names, which it returns. max_bytes: everybody's together. Raises BusyError."""
    size = sum(map(len, files))
    for path in folder.iterdir():
        with suppress(OSError):  # read and removed meanwhile
            size += path.stat().st_size
    if size > max_bytes:
        raise BusyError("Too many uploads wait to be read. Try again in a minute.")
    names = [secrets.token_hex(16) for _ in files]
    try:
        for name, content in zip(names, files, strict=True):
            (folder / name).write_bytes(content)
    except Exception:
        logger.exception("an upload could not be kept")
        for name in names:
            (folder / name).unlink(missing_ok=True)
        raise BusyError("The upload could not be stored on our side. Try again in a minute.") from None
    return names


def _file_in(body: bytes, content_type: str, max_files: int) -> bytes:
    """The file in a request: its body, or the one file of a form. Raises UploadError where there is none, or more."""
    is_form = content_type.lower().startswith("multipart/form-data")
    files = files_in_form(body, content_type, max_files) if is_form else [body]
    if len(files) > 1:
        raise UploadError(f"There are {len(files)} files in the request. Send one at a time.")
    if not files or not files[0]:
        raise UploadError("There is no file in the request. Send it as the body, or as a form with one file.")
    return files[0]


def answer(
    predictor: "Predictor", data: bytes, with_overlay: bool, on_answer: "OnAnswer | None", cancelled: threading.Event
) -> dict[str, Any]:
    """The answer for one file as plain JSON; with_overlay: with a JPEG. Raises DecodeError and BusyError."""
    from PIL import Image

    from chestct.serving.prediction import data_uri

    with predictor.room(data, cancelled) as gone:
        prediction = predictor.predict(data, name="file", explain=with_overlay, gone=gone)
        if on_answer:
            on_answer(prediction)
        fields = prediction.as_dict()
        if with_overlay:
            image = prediction.overlay() or Image.fromarray(prediction.gray)
            fields["overlay"] = data_uri(image, "JPEG", quality=95, subsampling=0)  # PNG takes ten times as long
        return fields
