"""The HTTP side around the page: health, metrics, one plain endpoint, and uploads under names that tell nothing."""

import asyncio
import logging
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles

import chestct
from chestct.config.schema import ServeConfig
from chestct.errors import ChestCTError, DecodeError
from chestct.serving.api import as_json
from chestct.serving.counters import Counters
from chestct.serving.predictor import BusyError, Predictor
from chestct.serving.reading import OnAnswer, tell

logger = logging.getLogger("chestct.serving")

STATIC = Path(__file__).with_name("static")


def make_app(
    predictor: Predictor, cfg: ServeConfig, counters: Counters, uploads: Path, on_answer: OnAnswer | None = None
) -> FastAPI:
    """A FastAPI app with every route but the page's. uploads: the folder that Gradio looks for uploads in."""
    app = FastAPI(title="chestct", docs_url=None, redoc_url=None, openapi_url=None)
    running = 0

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok", "bundle": predictor.bundle.id, "version": chestct.__version__})

    async def metrics(_: Request) -> Response:
        counters.serves(predictor.bundle.id)
        return Response(counters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def predict(request: Request) -> Response:
        nonlocal running
        if running >= cfg.queue:
            return _error(503, "The service is busy. Try again in a few seconds.", {"retry-after": "3"})
        running += 1
        try:
            data = await _body(request)
            overlay = request.query_params.get("overlay", "").lower() in ("1", "true", "yes")
            work = run_in_threadpool(predictor.predict, data, name="file", explain=overlay)
            found = await asyncio.wait_for(work, cfg.seconds)
            tell(found, on_answer)
            return JSONResponse(await run_in_threadpool(as_json, found, overlay))
        except DecodeError as error:
            counters.failures.labels("unreadable").inc()
            return _error(422, f"This file cannot be read: {error.reason}.")
        except (BusyError, TimeoutError) as error:
            counters.failures.labels("busy").inc()
            return _error(503, str(error) or "It took too long. Try again later.", {"retry-after": "10"})
        except ChestCTError as error:
            return _error(400, str(error))
        except ClientDisconnect:
            logger.info("a client hung up")
            return Response(status_code=499)
        finally:
            running -= 1

    async def upload(request: Request) -> Response:
        return await _upload(request, cfg, uploads)

    app.add_api_route("/healthz", healthz, methods=["GET", "HEAD"])
    app.add_api_route("/metrics", metrics, methods=["GET"])
    app.add_api_route("/predict", predict, methods=["POST"])
    app.add_api_route("/gradio_api/upload", upload, methods=["POST"])  # stands before Gradio's own
    app.mount("/page", StaticFiles(directory=STATIC))
    return app


class RequestError(ChestCTError):
    """A request without a file in it."""


async def _body(request: Request) -> bytes:
    """The file in a request: its body, or the first file of a form. Raises RequestError where there is none."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        data = await request.body()
    else:
        try:
            async with request.form(max_files=1, max_fields=8) as form:
                file = next((part for part in form.values() if isinstance(part, UploadFile)), None)
                data = await file.read() if file else b""
        except (HTTPException, MultiPartException) as error:
            said = getattr(error, "detail", None) or getattr(error, "message", "")
            raise RequestError(f"The form cannot be read: {said} Send one file as multipart/form-data.") from None
    if not data:
        raise RequestError("There is no file in the request. Send it as the body, or as a form with one file.")
    return data


async def _upload(request: Request, cfg: ServeConfig, folder: Path) -> Response:
    """Gradio's upload, after which each file moves to a folder with a random name, and its own name is forgotten."""
    from gradio.route_utils import upload_fn
    from gradio.routes import file_upload_statuses

    own = folder / secrets.token_hex(16)  # whatever the parser leaves behind goes with it
    own.mkdir(mode=0o700)
    try:
        upload_id = request.query_params.get("upload_id")
        found, _, _ = await upload_fn(
            request, str(own), cfg.max_upload, upload_id, force_move=True, upload_progress=file_upload_statuses
        )
        if len(found) > cfg.max_slices:
            return PlainTextResponse(f"{len(found)} files at once; this service takes up to {cfg.max_slices}.", 413)
        return JSONResponse([str(_hidden(Path(path), folder)) for path in found])
    except (MultiPartException, HTTPException) as error:
        said = getattr(error, "detail", None) or getattr(error, "message", "")
        return PlainTextResponse(f"The upload cannot be read: {said}", 400)
    except ClientDisconnect:
        logger.info("a client hung up while it sent a file")
        return Response(status_code=499)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _hidden(path: Path, folder: Path) -> Path:
    """Moves an upload to FOLDER/RANDOM/RANDOM."""
    new = folder / secrets.token_hex(16) / secrets.token_hex(16)
    new.parent.mkdir(mode=0o700)
    path.replace(new)
    return new


def sweep(folder: Path, seconds: float) -> int:
    """Removes what has lain in a folder for longer than that: uploads nobody asked about. Returns how many."""
    oldest = time.time() - seconds
    gone = 0
    for path in folder.iterdir():
        try:
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                gone += 1
        except OSError:  # removed by its request meanwhile
            continue
    return gone


def _error(status: int, said: str, headers: dict[str, str] | None = None) -> Response:
    body: dict[str, Any] = {"error": said}
    return JSONResponse(body, status, headers)
