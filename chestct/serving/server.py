"""The process: listens, then loads; takes its bundle anew on SIGHUP, and on SIGTERM answers whoever is waiting.

The server has a thread of its own and answers health probes from the first second; whoever asks for more waits for the
predictor, which the main thread loads, where signals interrupt it. The page follows: what makes it takes longer to
import than all else together. Nothing of either is imported before the port is open.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, cast

import uvicorn
from prometheus_client import Counter
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from chestct.config.schema import Config
from chestct.errors import BusyError, ChestCTError, ConfigError
from chestct.serving.api import make_app, netloc
from chestct.serving.limits import login_from

if TYPE_CHECKING:
    from chestct.serving.examples import Example
    from chestct.serving.prediction import Prediction
    from chestct.serving.predictor import OnAnswer, Predictor

logger = logging.getLogger("chestct.serving")

SLICES = Counter("chestct_slices", "Slices answered, by decision; examples are not counted", ["decision"])

STILL_S = 15.0
"""Seconds for which a connection may wait for the head of a request, or leave an answer unread."""

MAX_CONNECTIONS = 700
"""Of all clients together. A process may usually open 1,024 files, sockets included."""

RELOADING = Lock()
"""Held while a bundle is located and loaded: of two SIGHUPs the later one has the last word."""


def serve(cfg: Config, locate: Callable[[], str], on_answer: "OnAnswer | None" = None) -> None:
    """Serves until SIGTERM or Ctrl-C. Raises ConfigError, BundleError and what else a user can mend.

    locate: where the bundle lies, called at the start and at each SIGHUP, since a name may have moved on; on_answer:
    called with each Prediction, for a record of what the service saw.
    """
    _log_to_stderr()
    loading: Future[Predictor] = Future()
    loading.set_running_or_notify_cancel()
    login = login_from(os.environ)
    listening = bind(cfg.serve.host, cfg.serve.port)
    signal.signal(signal.SIGHUP, lambda *_: Thread(target=reload, args=(loading, locate), daemon=True).start())
    with upload_folder() as uploads:
        server = make_server(cfg, loading, uploads, on_answer, login)
        with running(server, listening) as thread:
            try:
                predictor = predictor_for(cfg, locate())
                signal.signal(signal.SIGTERM, server.handle_exit)
                loading.set_result(predictor)
                logger.info(
                    "ready: http://%s:%s bundle %s", netloc(cfg.serve.host), cfg.serve.port, predictor.bundle.id
                )
                wait_for(thread)
            finally:
                if not loading.done():
                    loading.set_exception(BusyError("The service could not start: its log says why."))
                signal.signal(signal.SIGINT, server.handle_exit)  # a second Ctrl-C waits for nobody
    if RELOADING.acquire(timeout=STILL_S):  # to end amid loading may crash; who never answers holds up nothing more
        RELOADING.release()


@contextlib.contextmanager
def running(server: uvicorn.Server, listening: socket.socket) -> Iterator[Thread]:
    """A server in its thread, answering; it ends when requests under way are answered."""
    thread = Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            time.sleep(0.01)
        yield thread
    finally:
        server.should_exit = True
        wait_for(thread)


def wait_for(thread: Thread) -> None:
    """Until it ends. A signal that comes soon after another may reach any thread; this one has to wake to handle it."""
    while thread.is_alive():
        thread.join(0.5)


def predictor_for(cfg: Config, bundle: str) -> "Predictor":
    """The service's predictor, with its limits."""
    from chestct.imaging.slice import Limits
    from chestct.serving.predictor import Predictor

    serve = cfg.serve
    limits = Limits(min(cfg.data.max_bytes, serve.max_upload_bytes), min(cfg.data.max_pixels, serve.max_pixels))
    return Predictor(
        bundle,
        limits,
        seconds=serve.request_timeout_s,
        pixels=serve.max_pixels_in_flight,
        backend=serve.backend,
        accelerator=cfg.trainer.accelerator,
        whole_process=True,
    )


def make_server(
    cfg: Config, loading: "Future[Predictor]", uploads: Path, on_answer: "OnAnswer | None" = None, login: bytes = b""
) -> "PatientServer":
    """The server with API and page, not yet running. loading: as `make_app` takes it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported

    def count(prediction: "Prediction") -> None:
        SLICES.labels(prediction.decision).inc()
        if on_answer:
            on_answer(prediction)

    async def make() -> Starlette:
        predictor = await asyncio.wrap_future(loading)
        make_page_app, examples = await run_in_threadpool(_import_page)
        return make_page_app(predictor, cfg.serve, uploads, examples, count)

    page, app = Page(make), make_app(loading, cfg.serve, uploads, count, login)
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
            proxy_headers=False,  # `limits` reads them, and needs the address of the proxy for it
            timeout_graceful_shutdown=30,  # a container's own patience after SIGTERM is often that
        ),
        page.end_streams,
    )


def _import_page() -> tuple[Callable[..., Starlette], "list[Example]"]:
    from chestct.serving.examples import make_examples
    from chestct.serving.page import make_page_app

    return make_page_app, make_examples()


class Page:
    """The page, an app that is made while the API answers already. Whoever asks for it before then waits."""

    def __init__(self, make: Callable[[], Awaitable[Starlette]]) -> None:
        self.make = make
        self.app: asyncio.Task[Starlette] | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Of the app that it is mounted in."""
        async with contextlib.AsyncExitStack() as stack:
            self.app = asyncio.create_task(self._start(stack))
            yield
            await asyncio.gather(self.app, return_exceptions=True)

    async def _start(self, stack: contextlib.AsyncExitStack) -> Starlette:
        try:
            app = await self.make()
            await stack.enter_async_context(app.router.lifespan_context(app))
            return app
        except BusyError:  # of which the command tells
            raise
        except Exception:
            logger.exception("there is no page")
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None
        app = await asyncio.shield(self.app)  # who hangs up must not end it for all
        await app(scope, receive, send)

    def end_streams(self) -> None:
        """Of open pages: the end of the service would wait for them."""
        if self.app and self.app.done() and not self.app.exception():
            self.app.result().routes[-1].app.stop_event.set()  # type: ignore[attr-defined]


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


def reload(loading: "Future[Predictor]", locate: Callable[[], str]) -> None:
    """Takes the bundle anew from where it lies by now; where that fails, the old one goes on."""
    with RELOADING, contextlib.suppress(BusyError):  # nothing was loaded, of which the command tells
        predictor = loading.result()
        try:
            logger.info("bundle reloaded: %s", predictor.reload(locate()))
        except ChestCTError as error:
            logger.error("bundle not reloaded, %s stays: %s", predictor.bundle.id, error)
        except Exception:
            logger.exception("bundle not reloaded, %s stays", predictor.bundle.id)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; connections wait until the server runs. Raises ConfigError."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"Cannot listen on {netloc(host)}:{port}: {error.strerror}. Choose another with serve.port=PORT or "
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
