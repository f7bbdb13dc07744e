"""The process: listens at once, loads meanwhile, takes its bundle anew on SIGHUP, and ends without cutting off anybody.

The port answers before model and page are there, so that a health probe sees `starting` and not a refused connection;
importing Gradio and loading the bundle take several seconds and run in a thread of their own.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

import chestct
from chestct.config.schema import Config
from chestct.errors import ChestCTError, ConfigError
from chestct.serving.auth import Gate
from chestct.serving.guard import App, Receive, Scope, Send, Sender

logger = logging.getLogger("chestct.serving")

GRACE = 30
"""Seconds that requests under way get after SIGTERM; a container's own patience is often 30."""

SWEEP = 15.0
"""Seconds between two looks for uploads that nobody asked about, and for memory that nobody uses."""

OnAnswer = Callable[[Any], None]
Locate = Callable[[], str]


def serve(cfg: Config, locate: Locate, on_answer: OnAnswer | None = None) -> None:
    """Serves until SIGTERM or Ctrl-C.

    locate: where the bundle lies, asked at the start and at each SIGHUP, since a name may have moved on; on_answer:
    called with each Prediction, for a record of what the service saw. Raises ConfigError, BundleError and what else a
    user can mend.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("httpx", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # pydicom quotes odd values in its warnings, and nothing of an upload belongs into a log.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="pydicom")
    gate = Gate.from_environment()
    listening = listen(cfg.serve.host, cfg.serve.port)
    with upload_folder() as uploads:
        service = Service(cfg, gate, uploads, locate, on_answer)
        service.run(listening)
    if service.failure:
        raise service.failure


def listen(host: str, port: int) -> socket.socket:
    """A listening socket: whoever knocks before the server runs waits.

    Raises ConfigError where the address is taken or impossible.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Choose another with serve.port=PORT or "
            "serve.host=ADDRESS."
        ) from None
    return bound


@contextlib.contextmanager
def upload_folder() -> Iterator[Path]:
    """A private folder for uploads, this process's own, that Gradio is told of; gone at the end."""
    with tempfile.TemporaryDirectory(prefix="chestct-uploads-", ignore_cleanup_errors=True) as folder:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


class Service:
    """ASGI app and its server. `failure`: why it could not start."""

    def __init__(
        self, cfg: Config, gate: Gate, uploads: Path, locate: Locate, on_answer: OnAnswer | None = None
    ) -> None:
        self.cfg, self.gate, self.uploads, self.locate, self.on_answer = cfg, gate, uploads, locate, on_answer
        self.app: App | None = None
        self.predictor: Any = None
        self.failure: Exception | None = None
        self.ready = threading.Event()
        self.server = uvicorn.Server(
            uvicorn.Config(
                self,
                log_config=None,
                access_log=False,  # `guard` logs, without paths that a client made up
                server_header=False,
                timeout_graceful_shutdown=GRACE,
                timeout_keep_alive=15,
                limit_concurrency=1000,
                loop="asyncio",
            )
        )

    def run(self, listening: socket.socket) -> None:
        """Serves on a bound socket until told to stop."""
        if threading.current_thread() is threading.main_thread():
            # uvicorn handles the signal, then puts this handler back and raises it again: told to stop, it did well
            signal.signal(signal.SIGTERM, lambda *_: None)
        self.server.run(sockets=[listening])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _starting(scope, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        live = asyncio.create_task(self._live())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await live
        await send({"type": "lifespan.shutdown.complete"})

    async def _live(self) -> None:
        """Loads, serves, cleans up; ends when the server is to exit."""
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGHUP, lambda: loop.run_in_executor(None, self.reload))
        try:
            app, gradio_app = await asyncio.to_thread(self._build)
            async with app.router.lifespan_context(app):
                self.app = self._guarded(app)
                self.ready.set()
                logger.info("ready: http://%s:%s bundle %s", *self._address(), self.predictor.bundle.id)
                await self._until_told()
                gradio_app.stop_event.set()  # else open pages hold the server until its patience ends
                await self._requests_done()
        except Exception as error:
            self.failure = error
            self.server.should_exit = True
        finally:
            if self.predictor:
                await asyncio.to_thread(self.predictor.close)

    def _build(self) -> tuple[Any, Any]:
        """Predictor, page and routes. What takes long to import is imported here, in two threads."""
        warm = threading.Thread(target=_import_gradio, daemon=True)
        warm.start()
        from chestct.imaging.slice import Limits
        from chestct.serving.predictor import Predictor

        serve = self.cfg.serve
        limits = Limits(min(self.cfg.data.max_bytes, serve.max_upload), self.cfg.data.max_pixels)
        self.predictor = Predictor(
            self.locate(), limits, batch=serve.batch, waiting=4 * serve.max_slices, seconds=serve.seconds
        )
        from chestct.serving.examples import make_examples

        examples = make_examples()
        self.predictor.predict(examples[3].data)  # the first pass of a network is slower than the rest
        warm.join()
        from chestct.serving.app import make_page, mount
        from chestct.serving.counters import Counters
        from chestct.serving.web import make_app, sweep

        self.counters = Counters()
        app = make_app(self.predictor, serve, self.counters, self.uploads, self._answered)
        page = make_page(self.predictor, serve, examples, self._answered)
        gradio_app = mount(app, page, serve)
        sweep(self.uploads, -1.0)  # Gradio has put a folder of its own there
        return app, gradio_app

    def _guarded(self, app: App) -> App:
        from chestct.serving.guard import Guard

        return Guard(app, self.gate, self.counters, self.cfg.serve.max_upload, self.cfg.serve.rate)

    def _answered(self, found: Any) -> None:
        self.counters.answered(found)
        if self.on_answer:
            self.on_answer(found)

    def reload(self) -> None:
        """Takes the bundle anew from where it lies by now; where that fails, the old one goes on."""
        if not self.predictor:
            return  # it is being loaded
        try:
            logger.info("bundle reloaded: %s", self.predictor.reload(self.locate()))
        except Exception as error:
            known = isinstance(error, ChestCTError)
            logger.error("bundle not reloaded, %s stays: %s", self.predictor.bundle.id, error, exc_info=not known)

    async def _until_told(self) -> None:
        from chestct.serving.web import sweep

        loop = asyncio.get_running_loop()
        next_sweep = loop.time() + SWEEP
        while not self.server.should_exit:
            await asyncio.sleep(0.1)
            if loop.time() > next_sweep:
                next_sweep = loop.time() + SWEEP
                await asyncio.to_thread(sweep, self.uploads, 2 * self.cfg.serve.seconds)
                await asyncio.to_thread(_give_back)

    async def _requests_done(self) -> None:
        """Waits for requests under way, so that page and predictor outlive them."""
        for _ in range(10 * GRACE):
            if not self.server.server_state.connections and not self.server.server_state.tasks:
                return
            await asyncio.sleep(0.1)

    def _address(self) -> tuple[str, int]:
        return self.cfg.serve.host, self.cfg.serve.port


def _give_back() -> None:
    """Hands free memory back to the system: after a crowd, glibc keeps some hundred megabytes for the next one."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def _import_gradio() -> None:
    import chestct.serving.quiet_gradio  # noqa: F401


async def _starting(scope: Scope, send: Send) -> None:
    said = {"error": "The service is starting. Try again in a few seconds."}
    if scope["path"] == "/healthz":
        said = {"status": "starting", "bundle": "", "version": chestct.__version__}
    await Sender(send, lasting=False).answer(503, said, {"retry-after": "2"})
