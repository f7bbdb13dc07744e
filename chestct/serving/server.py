"""The process: loads, then listens; takes its bundle anew on SIGHUP, and on SIGTERM answers whoever is waiting.

The port opens when the model is ready: a health probe is refused before, which every platform takes for `starting`. The
page follows: what makes it takes longer to import than all else together.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import Counter
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from chestct.config.schema import Config
from chestct.errors import ChestCTError, ConfigError
from chestct.imaging.slice import Limits
from chestct.serving.api import make_app
from chestct.serving.limits import login_from
from chestct.serving.prediction import Prediction
from chestct.serving.predictor import OnAnswer, Predictor

if TYPE_CHECKING:
    from chestct.serving.examples import Example

logger = logging.getLogger("chestct.serving")

SLICES = Counter("chestct_slices", "Slices answered, by decision; examples are not counted", ["decision"])

NO_ORIGINS = Middleware(CORSMiddleware, allow_origins=())
"""With it, Gradio leaves out its own, which trusts localhost."""

STILL_S = 15.0
"""Seconds for which a connection may wait for the head of a request, or leave an answer unread."""

MAX_CONNECTIONS = 700
"""Of all clients together. A process may usually open 1,024 files, sockets included."""


def serve(cfg: Config, locate: Callable[[], str], on_answer: OnAnswer | None = None) -> None:
    """Serves until SIGTERM or Ctrl-C. Raises ConfigError, BundleError and what else a user can mend.

    locate: where the bundle lies, called at the start and at each SIGHUP, since a name may have moved on; on_answer:
    called with each Prediction, for a record of what the service saw.
    """
    _log_to_stderr()
    login = login_from(os.environ)
    listening = bind(cfg.serve.host, cfg.serve.port)
    with upload_folder() as uploads:
        predictor = predictor_for(cfg, locate())
        server = make_server(cfg, predictor, uploads, on_answer, login)
        # uvicorn handles the signal, then puts this handler back and raises it again: that end was a good one
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=reload, args=(predictor, locate)).start())
        logger.info("ready: http://%s:%s bundle %s", cfg.serve.host, cfg.serve.port, predictor.bundle.id)
        server.run(sockets=[listening])


def predictor_for(cfg: Config, bundle: str) -> Predictor:
    """The service's predictor, with its limits."""
    serve = cfg.serve
    limits = Limits(min(cfg.data.max_bytes, serve.max_upload_bytes), min(cfg.data.max_pixels, serve.max_pixels))
    computing = {"backend": serve.backend, "accelerator": cfg.trainer.accelerator}
    return Predictor(bundle, limits, seconds=serve.request_timeout_s, pixels=serve.max_pixels_in_flight, **computing)


def make_server(
    cfg: Config, predictor: Predictor, uploads: Path, on_answer: OnAnswer | None = None, login: bytes = b""
) -> "PatientServer":
    """The server with API and page, not yet running. What Gradio would keep, show or open is switched off."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported

    def count(prediction: Prediction) -> None:
        SLICES.labels(prediction.decision).inc()
        if on_answer:
            on_answer(prediction)

    async def made() -> FastAPI:
        examples = await run_in_threadpool(_import_page)
        import gradio as gr
        from gradio.route_utils import FnIndexInferError

        from chestct.serving.page import CSS, THEME, make_page

        unreadable = (RequestValidationError, KeyError, FnIndexInferError)
        return gr.mount_gradio_app(
            FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=[NO_ORIGINS]),
            make_page(predictor, cfg.serve, uploads, examples, count),
            path="/",
            server_name=cfg.serve.host,
            server_port=cfg.serve.port,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            enable_monitoring=False,
            show_error=False,  # of errors that are no gr.Error: their messages name folders of this machine
            max_file_size=cfg.serve.max_upload_bytes,
            app_kwargs={"exception_handlers": dict.fromkeys(unreadable, _unreadable)},
            theme=THEME,
            css=CSS,
        )

    page, app = Page(made), make_app(predictor, cfg.serve, uploads, count, login)
    app.router.lifespan_context = page.lifespan
    app.mount("/", page)
    return PatientServer(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            log_config=None,
            access_log=False,  # `limits` logs, without paths that a client made up
            server_header=False,
            proxy_headers=bool(cfg.serve.proxies),
            forwarded_allow_ips=cfg.serve.proxies,
            timeout_graceful_shutdown=30,  # a container's own patience after SIGTERM is often that
        ),
        page.end_streams,
    )


def _import_page() -> "list[Example]":
    import chestct.serving.page  # noqa: F401
    from chestct.serving.examples import make_examples

    return make_examples()


class Page:
    """The page, an app that is made while the API answers already. Whoever asks for it before then waits."""

    def __init__(self, made: Callable[[], Awaitable[FastAPI]]) -> None:
        self.made = made
        self.app: asyncio.Future[FastAPI] | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Of the app that it is mounted in."""
        self.app, ended = asyncio.get_running_loop().create_future(), asyncio.Event()
        living = asyncio.create_task(self._live(self.app, ended))
        yield
        ended.set()
        await living

    async def _live(self, future: "asyncio.Future[FastAPI]", ended: asyncio.Event) -> None:
        async with contextlib.AsyncExitStack() as stack:
            try:
                app = await self.made()
                await stack.enter_async_context(app.router.lifespan_context(app))
                future.set_result(app)
            except Exception as error:
                logger.exception("there is no page")
                future.set_exception(error)
            await ended.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None
        app = await asyncio.shield(self.app)  # who hangs up must not end it for all
        await app(scope, receive, send)

    def end_streams(self) -> None:
        """Of open pages: the end of the service would wait for them."""
        if self.app and self.app.done() and not self.app.exception():
            self.app.result().routes[-1].app.stop_event.set()  # type: ignore[attr-defined]


async def _unreadable(_: Request, error: Exception) -> Response:
    """Gradio's own answers quote the request, which fails over NaN, and an unknown function is a failure to it."""
    return JSONResponse({"error": "The request cannot be understood: no such function, or a wrong value."}, 422)


class PatientServer(uvicorn.Server):
    """Ends connections on which nothing moves: uvicorn waits for the head of a request for ever.

    Of more than MAX_CONNECTIONS, the ones that have waited longest go. end_streams: called before the end, which would
    wait for the streams of open pages.
    """

    def __init__(self, config: uvicorn.Config, end_streams: Callable[[], object] = lambda: None) -> None:
        super().__init__(config)
        self.end_streams = end_streams
        self._still: dict[H11Protocol, tuple[object, float]] = {}

    async def on_tick(self, counter: int) -> bool:
        now, before, self._still = time.monotonic(), self._still, {}
        for connection in cast(set[H11Protocol], self.server_state.connections):
            waits_for_head = connection.cycle is None or connection.cycle.response_complete
            if connection.transport is not None and (waits_for_head or connection.flow.write_paused):
                state = (connection.cycle, connection.transport.get_write_buffer_size())
                old = before.get(connection, (None, now))
                self._still[connection] = old if old[0] == state else (state, now)
        surplus = len(self.server_state.connections) - MAX_CONNECTIONS
        for i, connection in enumerate(sorted(self._still, key=lambda one: self._still[one][1])):
            if i < surplus or self._still[connection][1] < now - STILL_S:
                connection.transport.abort()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.end_streams()
        await super().shutdown(sockets)


def reload(predictor: Predictor, locate: Callable[[], str]) -> None:
    """Takes the bundle anew from where it lies by now; where that fails, the old one goes on."""
    try:
        logger.info("bundle reloaded: %s", predictor.reload(locate()))
    except ChestCTError as error:
        logger.error("bundle not reloaded, %s stays: %s", predictor.bundle.id, error)


def bind(host: str, port: int) -> socket.socket:
    """A socket that nobody else can listen on; connections are refused until the server runs. Raises ConfigError."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Choose another with serve.port=PORT or "
            "serve.host=ADDRESS."
        ) from None
    return bound


@contextlib.contextmanager
def upload_folder() -> Iterator[Path]:
    """A private folder for uploads, this process's own, which Gradio uses too; gone at the end."""
    with tempfile.TemporaryDirectory(prefix="chestct-uploads-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield Path(folder)


class QuietFormatter(logging.Formatter):
    """Tracebacks without the error's own message, which may quote what a client sent."""

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return "".join(traceback.format_tb(ei[2])) + ei[0].__name__


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(QuietFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in ("httpx", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # pydicom quotes odd values in its warnings, and nothing of an upload belongs into a log.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="pydicom")
