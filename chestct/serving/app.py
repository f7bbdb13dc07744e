"""The page: a Gradio app whose every visible part is plain HTML of ours, and one named endpoint for programs.

Gradio brings the queue, the sessions, the uploads and the API; what it would keep, show or open beyond that is
switched off here or in `guard`. A file lies on disk from its upload until it is read, once, and never longer.
"""

import logging
import shutil
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from chestct.config.schema import ServeConfig
from chestct.errors import ChestCTError
from chestct.serving import about, answer, history
from chestct.serving.api import answer as answer_one
from chestct.serving.examples import Example
from chestct.serving.pages import BANNER, EMPTY, HEADER, api_help, example_buttons
from chestct.serving.predictor import Predictor
from chestct.serving.quiet_gradio import File, UploadBox, gr
from chestct.serving.reading import OnAnswer, Reading, read_all
from chestct.serving.uploads import UploadError, expand

logger = logging.getLogger("chestct.serving")

SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]

SESSION_SECONDS = 3600


def make_page(
    predictor: Predictor,
    cfg: ServeConfig,
    examples: list[Example],
    on_answer: OnAnswer | None = None,
) -> gr.Blocks:
    """The Blocks of the page."""

    def look(files: list[File], rows: list[history.Row]) -> Iterator[tuple[Any, ...]]:
        try:
            received = taken(files)
            yield from _read(received, rows, on_answer)
        except ChestCTError as error:
            yield answer.message(str(error)), rows, gr.skip(), None

    def look_at_example(rows: list[history.Row], event: gr.EventData) -> Iterator[tuple[Any, ...]]:
        example = examples[int(event._data["index"]) % len(examples)]
        # Not told to anybody: what the house shows is no sign of what visitors bring.
        yield from _read([(example.name, example.data)], rows, None)

    def _read(
        files: list[tuple[str, bytes]], rows: list[history.Row], told: OnAnswer | None
    ) -> Iterator[tuple[Any, ...]]:
        found = expand(files, cfg.max_slices, cfg.max_upload_bytes)
        readings: list[Reading] = []
        yield answer.waiting(0, len(found)), gr.skip(), gr.skip(), gr.skip()
        shown = time.monotonic()
        for done, part in enumerate(read_all(predictor, found, cfg.max_slices, cfg.request_timeout_s, told), start=1):
            readings += part
            if time.monotonic() - shown > 0.5 and done < len(found):
                shown = time.monotonic()
                yield answer.waiting(done, len(found)), gr.skip(), gr.skip(), gr.skip()
        rows = (rows + history.rows(readings, time.strftime("%H:%M:%S")))[-history.MOST :]
        yield answer.render(readings, predictor.bundle), rows, history.render(rows), None

    def predict(file: list[File], overlay: bool) -> dict[str, Any]:
        """Scores one slice. file: PNG, JPEG, TIFF or DICOM; overlay: add the slice with its heat as a PNG data URI."""
        try:
            ((_, data),) = taken(file, most=1)
            return answer_one(predictor, data, overlay, on_answer)
        except ChestCTError as error:
            raise gr.Error(getattr(error, "reason", None) or str(error), print_exception=False) from None

    with gr.Blocks(title="chestct: cancer or normal on chest CT", analytics_enabled=False, fill_width=True) as page:
        rows = gr.State([], time_to_live=SESSION_SECONDS)
        html = partial(gr.HTML, apply_default_css=False)  # `static/page.css` is all the style there is
        html(BANNER, elem_id="banner")
        html(HEADER, elem_id="header")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Look at a slice", id="look"), gr.Row(elem_id="desk"):
                with gr.Column(elem_id="ask", min_width=260):
                    box = UploadBox(
                        label="Chest CT slices", show_label=False, file_count="multiple", elem_id="drop", height=170
                    )
                    chosen = html(
                        example_buttons(examples),
                        elem_id="examples",
                        js_on_load="element.addEventListener('click', (e) => { const b = e.target.closest"
                        "('[data-example]'); if (b) trigger('select', {index: Number(b.dataset.example)}); });",
                    )
                with gr.Column(elem_id="told", min_width=300):
                    result = html(EMPTY, elem_id="result")
            with gr.Tab("History", id="history"):
                table = html(history.render([]), elem_id="visit")
            with gr.Tab("Model", id="about"):
                model = html(about.render(predictor.bundle), elem_id="model")
            with gr.Tab("API", id="api"):
                html(api_help(cfg.host, cfg.port), elem_id="programs")
        shown = [result, rows, table, box]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 4}
        box.upload(look, [box, rows], shown, **quiet)
        chosen.select(look_at_example, [rows], shown, **quiet)
        page.load(lambda: about.render(predictor.bundle), None, model, **quiet | {"concurrency_limit": None})
        one = UploadBox(label="file", file_count="single", visible=False)
        overlay = gr.Checkbox(False, label="overlay", visible=False)
        told = gr.JSON(label="answer", visible=False)
        gr.Button(visible=False).click(
            predict, [one, overlay], told, api_name="predict", concurrency_limit=4, api_description=predict.__doc__
        )
    page.queue(max_size=cfg.queue_size, default_concurrency_limit=4)
    return page


LOOKS: dict[str, Any] = {
    "theme": gr.themes.Base(font=SYSTEM_FONTS, font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"]),
    "head": '<link rel="stylesheet" href="page/page.css"><script src="page/page.js" defer></script>'
    '<meta name="color-scheme" content="light dark">',
}
"""What `gr.mount_gradio_app` is given for this page."""


def taken(files: list[File], most: int | None = None) -> list[tuple[str, bytes]]:
    """The files' bytes; the files themselves are gone afterwards, whatever happens.

    Raises UploadError where there are none, more than `most`, or one has gone already.
    """
    try:
        if not files or (most and len(files) > most):
            raise UploadError("Send one file." if most == 1 else "No file came with it. Choose at least one.")
        return [(name, path.read_bytes()) for name, path in files]
    except OSError:
        raise UploadError("The upload is no longer there. Choose the file again.") from None
    finally:
        for _, path in files:
            shutil.rmtree(path.parent, ignore_errors=True)  # each upload has a folder of its own
