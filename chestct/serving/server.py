"""The process: loads, then listens; takes its bundle anew on SIGHUP, and on SIGTERM answers whoever is waiting.

The port opens when model and page are ready: a health probe is refused before, which every platform takes for
`starting`.
"""

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chestct.config.schema import Config, ServeConfig
from chestct.errors import ChestCTError, ConfigError
from chestct.imaging.slice import Limits
from chestct.serving.api import Login, make_app
from chestct.serving.predictor import Predictor
from chestct.serving.prometheus import Metrics
from chestct.serving.protocol import PatientProtocol

logger = logging.getLogger("chestct.serving")

GRACE_S = 30
"""Seconds that requests under way get after SIGTERM; a container's own patience is often 30."""

OnAnswer = Callable[[Any], None]
Locate = Callable[[], str]


def serve(cfg: Config, locate: Locate, on_answer: OnAnswer | None = None) -> None:
    """Serves until SIGTERM or Ctrl-C.

    locate: where the bundle lies, called at the start and at each SIGHUP, since a name may have moved on; on_answer:
    called with each Prediction, for a record of what the service saw. Raises ConfigError, BundleError and what else a
    user can mend.
    """
    _log_to_stderr()
    login = Login.from_environment()
    listening = bind(cfg.serve.host, cfg.serve.port)
    with upload_folder() as uploads, predictor_for(cfg, locate()) as predictor:
        server = make_server(cfg, predictor, uploads, on_answer, login)
        # uvicorn handles the signal, then puts this handler back and raises it again: that end was a good one
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=reload, args=(predictor, locate)).start())
        logger.info("ready: http://%s:%s bundle %s", cfg.serve.host, cfg.serve.port, predictor.bundle.id)
        server.run(sockets=[listening])


def make_server(
    cfg: Config, predictor: Predictor, uploads: Path, on_answer: OnAnswer | None = None, login: Login | None = None
) -> "GracefulServer":
    """The server with API and page, not yet running."""
    from chestct.serving.examples import make_examples

    metrics = Metrics()

    def answered(prediction: Any) -> None:
        metrics.answered(prediction)
        if on_answer:
            on_answer(prediction)

    app = make_app(predictor, cfg.serve, uploads, metrics, answered, login)
    examples = make_examples()
    predictor.predict(examples[3].data)  # the first pass of a network is slower than the rest
    page = mount_page(app, predictor, cfg.serve, uploads, examples, answered)
    return GracefulServer(
        uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            loop="asyncio",
            log_config=None,
            access_log=False,  # `limits` logs, without paths that a client made up
            server_header=False,
            proxy_headers=bool(cfg.serve.proxies),
            forwarded_allow_ips=cfg.serve.proxies,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=GRACE_S,
        ),
        page.stop_event.set,
    )


def mount_page(
    app: FastAPI, predictor: Predictor, cfg: ServeConfig, uploads: Path, examples: Any, on_answer: OnAnswer
) -> Any:
    """Puts the page at / of the app; returns Gradio's own app. What Gradio would keep, show or open is switched off."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
    import gradio as gr
    from gradio.route_utils import FnIndexInferError

    from chestct.serving.page import LOOKS, make_page

    page = make_page(predictor, cfg, uploads, examples, on_answer)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=cfg.host,
        server_port=cfg.port,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        show_error=False,  # of errors that are no gr.Error: their messages name folders of this machine
        max_file_size=cfg.max_upload_bytes,
        app_kwargs={
            "exception_handlers": dict.fromkeys((RequestValidationError, KeyError, FnIndexInferError), _unreadable)
        },
        **LOOKS,
    )
    return app.routes[-1].app  # type: ignore[attr-defined]


async def _unreadable(_: Request, error: Exception) -> Response:
    """Gradio's own answers quote the request, which fails over NaN, and an unknown function is a failure to it."""
    return JSONResponse({"error": "The request cannot be understood: no such function, or a wrong value."}, 422)


class GracefulServer(uvicorn.Server):
    """Ends the streams of open pages before it waits for requests: they would last until its patience ends."""

    def __init__(self, config: uvicorn.Config, end_streams: Callable[[], object]) -> None:
        super().__init__(config)
        self.end_streams = end_streams

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.end_streams()
        await super().shutdown(sockets)


@contextlib.contextmanager
def predictor_for(cfg: Config, bundle: str) -> Iterator[Predictor]:
    """The service's predictor, with its limits."""
    serve = cfg.serve
    predictor = Predictor(
        bundle,
        Limits(min(cfg.data.max_bytes, serve.max_upload_bytes), min(cfg.data.max_pixels, serve.max_pixels)),
        batch=serve.batch_size,
        waiting=4 * serve.max_slices,
        seconds=serve.request_timeout_s,
        pixels=serve.max_pixels_in_flight,
    )
    try:
        yield predictor
    finally:
        predictor.close()


def reload(predictor: Predictor, locate: Locate) -> None:
    """Takes the bundle anew from where it lies by now; where that fails, the old one goes on."""
    try:
        logger.info("bundle reloaded: %s", predictor.reload(locate()))
    except ChestCTError as error:
        logger.error("bundle not reloaded, %s stays: %s", predictor.bundle.id, error)
    except Exception:
        logger.exception("bundle not reloaded, %s stays", predictor.bundle.id)


def bind(host: str, port: int) -> socket.socket:
    """A socket that nobody else can listen on; connections are refused until the server runs.

    Raises ConfigError where the address is taken or impossible.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
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
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


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
