"""The HTTP side as one Starlette app: POST /predict, /metrics, uploads for the page, and room for the page itself.

Host names are Starlette's middleware; what it has nothing for stands in `limits`. Without CORS, no page elsewhere reads
an answer. The app listens before the
predictor is there, so nothing that takes long to import is imported here.
"""

import asyncio
import logging
import secrets
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyio import from_thread
from prometheus_client import generate_latest
from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, parse_options_header
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
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
    from chestct.serving.predictor import Gone, OnAnswer, Predictor

logger = logging.getLogger("chestct.serving")

MAX_FIELDS = 8
"""Parts of a form besides its files."""

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
        async with slots:
            hung_up = partial(from_thread.run, request.is_disconnected)
            return JSONResponse(await run_in_threadpool(answer, predictor, data, with_overlay, on_answer, hung_up))

    async def upload(request: Request) -> Response:
        """What Gradio's page and clients expect of its own route, which this one stands before."""
        body, content_type = await request.body(), request.headers.get("content-type", "")
        files = await run_in_threadpool(files_in_form, body, content_type, cfg.max_slices)
        named = {secrets.token_hex(16): content for content in files}
        for name in named:  # what nobody reads, or what could not be written whole
            asyncio.get_running_loop().call_later(2 * cfg.request_timeout_s, (uploads / name).unlink, True)
        await run_in_threadpool(keep, named, uploads, 2 * cfg.max_upload_bytes)
        return JSONResponse([*named])

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


def files_in_form(body: bytes, content_type: str, max_files: int) -> list[bytes]:
    """The content of each file in a body of multipart/form-data, fields left out. Raises UploadError."""
    parts: list[Field | File] = []
    ends: list[bool] = []

    def add(part: Field | File) -> None:
        if len(parts) == max_files + MAX_FIELDS:
            raise too_many
        parts.append(part)

    too_many = UploadError(
        f"More than {max_files} files at once. Send fewer, or use the command line for whole folders: chestct predict."
    )
    kind, options = parse_options_header(content_type)
    in_memory = {"MAX_MEMORY_FILE_SIZE": len(body)}
    try:
        FormParser(
            kind.decode("latin-1"), add, add, lambda: ends.append(True), options.get(b"boundary"), config=in_memory
        ).write(body)
    except FormParserError as error:
        raise UploadError(f"The form cannot be read: {error}.") from None
    if not ends:
        raise UploadError("The form cannot be read: it is cut off, or its content type names another boundary.")
    files = [part.file_object.getvalue() for part in parts if isinstance(part, File)]  # type: ignore[union-attr]
    if len(files) > max_files:
        raise too_many
    return files


def keep(named: dict[str, bytes], folder: Path, max_bytes: int) -> None:
    """Writes uploads, by name. max_bytes: everybody's together. Raises BusyError."""
    size = sum(map(len, named.values()))
    for path in folder.iterdir():
        with suppress(OSError):  # read and removed meanwhile
            size += path.stat().st_size
    if size > max_bytes:
        raise BusyError("Too many uploads wait to be read. Try again in a minute.")
    for name, content in named.items():
        (folder / name).write_bytes(content)


def _file_in(body: bytes, content_type: str, max_files: int) -> bytes:
    """The file in a request: its body, or the one file of a form. Raises UploadError where there is none, or more."""
    is_form = content_type.startswith("multipart/form-data")
    files = files_in_form(body, content_type, max_files) if is_form else [body]
    if len(files) > 1:
        raise UploadError(f"There are {len(files)} files in the request. Send one at a time.")
    if not files or not files[0]:
        raise UploadError("There is no file in the request. Send it as the body, or as a form with one file.")
    return files[0]


def answer(
    predictor: "Predictor", data: bytes, with_overlay: bool, on_answer: "OnAnswer | None", hung_up: "Gone"
) -> dict[str, Any]:
    """The answer for one file as plain JSON; with_overlay: with a JPEG. Raises DecodeError and BusyError."""
    from PIL import Image

    from chestct.serving.prediction import data_uri

    with predictor.room(data, hung_up) as gone:
        prediction = predictor.predict(data, name="file", explain=with_overlay, gone=gone)
        if on_answer:
            on_answer(prediction)
        fields = prediction.as_dict()
        if with_overlay:
            image = prediction.overlay() or Image.fromarray(prediction.gray)
            fields["overlay"] = data_uri(image, "JPEG", quality=95, subsampling=0)  # PNG takes ten times as long
        return fields
