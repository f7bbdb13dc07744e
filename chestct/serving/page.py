"""The page: Gradio's components in one `gr.Blocks`, and one named endpoint for programs.

Files are taken as Gradio's raw payload (`preprocess=False`) and pictures are given as data URIs (`postprocess=False`):
so an upload is never copied, is gone once it is read, and no picture of it is ever written to disk. Slice and heat are
two images next to each other and not a gr.ImageSlider, which always hides a part of both and which no keyboard moves.
"""

import base64
import shutil
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import api

from chestct.config.schema import ServeConfig
from chestct.errors import ChestCTError
from chestct.serving.answer_panel import AnswerPanel
from chestct.serving.api import answer
from chestct.serving.examples import Example
from chestct.serving.predictor import Predictor
from chestct.serving.reading import OnAnswer, Reading, read_all
from chestct.serving.sentences import GLOSSARY, NOTICE, card_body, reliability
from chestct.serving.uploads import UploadError, expand
from chestct.serving.visit import COLUMNS, MOST_ROWS, Row, as_csv, visit_rows

File = dict[str, Any]
"""What Gradio tells of an upload: `path` on this machine, `orig_name` as its owner calls it."""

SESSIONS = 64
"""Visitors whose last answer is kept at once; the one who has been away longest starts anew."""

SESSION_SECONDS = 1800

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]

THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="slate",
    font=FONTS,
    font_mono=FONTS,  # else labels and tables come in it
).set(
    body_background_fill="*neutral_100",
    block_background_fill="white",
    block_radius="10px",
    block_label_text_color="*neutral_600",
    block_title_text_color="*neutral_600",
    body_text_color_subdued="*neutral_600",
    stat_background_fill="*primary_700",
    stat_background_fill_dark="*primary_400",
    slider_color="*primary_700",
    slider_color_dark="*primary_400",
)

CSS = """
#notice { position: fixed; inset: 0 0 auto 0; z-index: 20; background: #26312f; padding: 6px 16px;
  border-radius: 0; }
#notice * { color: #f2f6f5; text-align: center; font-size: clamp(12px, 3.2vw, 14px); }
.gradio-container { padding-top: 48px !important; }
.label-wrap span { font-weight: 600; }
.gr-group .block { border-width: 0 !important; }
.prose :is(table, tr, th, td) { border-color: var(--border-color-primary) !important; }
.selected[role="tab"] { color: var(--body-text-color) !important; font-weight: 600; }
.prose :is(pre, pre code) { white-space: pre-wrap !important; overflow-wrap: anywhere; }
.prose :is(code, code *) { font-family: ui-monospace, Menlo, Consolas, monospace !important; }
.grid-container { grid-template-columns: repeat(auto-fill, minmax(125px, 1fr)) !important; }
"""

LOOKS: dict[str, Any] = {"theme": THEME, "css": CSS}
"""For `gr.mount_gradio_app`."""

START = """## Drop a slice, or try an example
1. **Give it** one or more axial chest CT slices: PNG, JPEG, TIFF or DICOM, or a zip of them.
2. **Read** the decision, how probable cancer is, and what that number is worth.
3. **Look** at where the model looked, and at when not to trust it.

Files are read once and deleted at once. Nothing leaves the machine that this page runs on."""

PROGRAMS = """## For programs
One slice a request, JSON back. For folders use the command line: `chestct predict FOLDER`.

```
$ curl --data-binary @slice.png ADDRESS/predict
$ curl -F file=@slice.dcm "ADDRESS/predict?overlay=true"
```

```
from gradio_client import Client, handle_file

client = Client("ADDRESS")
answer = client.predict(file=handle_file("slice.png"), overlay=False, api_name="/predict")
print(answer["decision"], answer["score"])
```

- `score`: calibrated probability of cancer, 0 to 1
- `decision`: cancer, normal, uncertain or refused; `reason` says why, for the last two
- `possible`: the answers that cannot be excluded
- `novelty`: distance to the training slices; uncertain beyond 1, refused beyond 1.5
- `known`: whether this very slice was used for training
- `bundle`: which model answered

What is wrong with a request comes back as `{"error": "…"}` with a status of 4xx or 5xx. `/healthz` tells whether the
service is ready, `/metrics` is for Prometheus."""


def make_page(
    predictor: Predictor,
    cfg: ServeConfig,
    uploads: Path,
    examples: list[Example],
    on_answer: OnAnswer | None = None,
) -> gr.Blocks:
    """The Blocks of the page. uploads: the folder that holds each upload as X/Y, with X its own; see `take`."""

    def look(files: list[File], rows: list[Row]) -> Iterator[dict[Any, Any]]:
        try:
            yield from read(take(files, uploads), rows, on_answer)
        except ChestCTError as error:
            yield {status: gr.update(value=failed(str(error)), visible=True), box: None}

    def look_at_example(index: int, rows: list[Row]) -> Iterator[dict[Any, Any]]:
        example = examples[index if index in range(len(examples)) else 0]
        # Not recorded: what the house shows is no sign of what visitors bring.
        yield from read([(example.name, example.data)], rows, None)

    def read(files: list[tuple[str, bytes]], rows: list[Row], record: OnAnswer | None) -> Iterator[dict[Any, Any]]:
        slices = expand(files, cfg.max_slices, cfg.max_upload_bytes)
        readings: list[Reading] = []
        shown_at = 0.0
        yield {status: gr.update(value=waiting(0, len(slices)), visible=True)}
        parts = read_all(predictor, slices, cfg.max_slices, cfg.request_timeout_s, record)
        for done, part in enumerate(parts, start=1):
            readings += part
            if time.monotonic() - shown_at > 0.5:
                shown_at = time.monotonic()
                yield {status: gr.update(value=waiting(done, len(slices)), visible=True)}
        rows = (rows + visit_rows(readings, time.strftime("%H:%M:%S")))[-MOST_ROWS:]
        yield {
            **panel.show_all(readings),
            status: gr.update(visible=False),
            start: gr.update(visible=False),
            box: None,
            visit: rows,
            table: {"headers": list(COLUMNS), "data": [list(row) for row in reversed(rows)]},
            download: gr.update(value=_csv_file(rows), interactive=True),
        }

    def predict(file: File, overlay: bool = False) -> dict[str, Any]:
        """Scores one slice. file: PNG, JPEG, TIFF or DICOM; overlay: add the slice with its heat as a PNG data URI."""
        try:
            ((_, data),) = take([file], uploads)
            return answer(predictor, data, overlay, on_answer)
        except ChestCTError as error:
            raise gr.Error(getattr(error, "reason", None) or str(error), print_exception=False) from None

    with gr.Blocks(title="chestct: cancer or normal on chest CT", analytics_enabled=False) as page:
        visit = gr.State([], time_to_live=SESSION_SECONDS)
        gr.Markdown(NOTICE, elem_id="notice")
        gr.Markdown("# chestct\nCancer or normal on a chest CT slice, with the odds, the reasons and the doubts.")
        with gr.Tabs():
            with gr.Tab("Slices"), gr.Row():
                with gr.Column(scale=2, min_width=270):
                    box = gr.File(
                        label="Chest CT slices, or a zip", file_count="multiple", height=170, elem_id="upload"
                    )
                    samples = gr.Dataset(
                        label="Or try one of these",
                        components=["html"],
                        samples=[[_sample(example)] for example in examples],
                        layout="gallery",
                        elem_id="examples",
                        type="index",
                    )
                with gr.Column(scale=7, min_width=320):
                    status = gr.HTML(visible=False, elem_id="status")
                    start = gr.Markdown(START, container=True)
                    panel = AnswerPanel(predictor, SESSION_SECONDS)
            with gr.Tab("This visit"):
                with gr.Row():
                    gr.Markdown("Every slice that you look at is listed here. The list is forgotten when you leave.")
                    download = gr.DownloadButton("Download as CSV", interactive=False, scale=0, elem_id="csv")
                table = gr.Dataframe(
                    headers=list(COLUMNS),
                    column_widths=["100px", "190px", "110px", "110px", "100px", "440px", "140px"],
                    interactive=False,
                    show_label=False,
                    wrap=True,
                    elem_id="visit",
                )
            with gr.Tab("Model"):
                with gr.Accordion("What the figures mean", open=False):
                    gr.Markdown(GLOSSARY)
                with gr.Accordion("Does the probability hold?", open=False):
                    bins = gr.Markdown(elem_id="reliability")
                card = gr.Markdown(container=True, elem_id="card")
            with gr.Tab("API"):
                host = "127.0.0.1" if cfg.host in ("0.0.0.0", "::") else cfg.host
                gr.Markdown(PROGRAMS.replace("ADDRESS", f"http://{host}:{cfg.port}"), container=True)
        answered = [status, start, box, visit, table, download, *panel.outputs]
        raw: dict[str, Any] = {"preprocess": False, "postprocess": False, "concurrency_limit": 4}
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        box.upload(look, [box, visit], answered, **raw, **quiet)
        samples.click(look_at_example, [samples, visit], answered, **raw, **quiet)
        panel.listen(**quiet)
        page.load(
            lambda: (card_body(predictor.bundle.card), reliability(predictor.bundle.facts)), None, [card, bins], **quiet
        )
        api(predict, api_name="predict", concurrency_limit=4)
    page.state_session_capacity = SESSIONS
    page.has_launched = True  # else Gradio, when it is mounted, copies whatever file of this machine a client names
    page.queue(max_size=cfg.queue_size, default_concurrency_limit=4)
    return page


def take(files: list[File], uploads: Path) -> list[tuple[str, bytes]]:
    """(name, bytes) of each file; the files themselves are gone afterwards, whatever happens.

    Raises UploadError where there are none, one has gone already, or one is not an upload.
    """
    paths = [_upload_path(file, uploads) for file in files or []]
    try:
        if not paths:
            raise UploadError("No file came with it. Choose at least one.")
        names = [str(file.get("orig_name") or "unnamed") for file in files]
        return [(name, path.read_bytes()) for name, path in zip(names, paths, strict=True)]
    except OSError:
        raise UploadError("The upload is no longer there. Choose the file again.") from None
    finally:
        for path in paths:
            shutil.rmtree(path.parent, ignore_errors=True)  # each upload has a folder of its own


def _upload_path(file: File, uploads: Path) -> Path:
    """Where an upload lies: exactly UPLOADS/X/Y, links resolved, because X is removed with it."""
    path = Path(str(file.get("path") if isinstance(file, dict) else "")).resolve()
    if path.parent.parent != uploads.resolve():
        raise UploadError("This is no file that was uploaded.")
    return path


def waiting(done: int, count: int) -> str:
    """While slices are read. The role makes screen readers say what changes."""
    text = "Reading the slice…" if count == 1 else f"Reading slice {min(done + 1, count)} of {count}…"
    return f'<p role="status">{text}</p><progress max="{count}" value="{done}" aria-label="Progress"></progress>'


def failed(message: str) -> str:
    return f'<p role="alert"><b>That did not work.</b> {escape(message)}</p>'


def _sample(example: Example) -> str:
    return (
        '<span style="display: flex; gap: 8px; align-items: center; width: 10em; text-align: left; white-space: pre">'
        f'<img src="{example.thumb}" alt="" width="32" height="32" style="border-radius: 6px">'
        f"<span><b>{escape(example.title)}</b><br><small>{escape(example.about)}</small></span></span>"
    )


def _csv_file(rows: list[Row]) -> dict[str, str]:
    data = base64.b64encode(as_csv(rows).encode("utf-8-sig")).decode()  # with a mark, or Excel takes it for Latin-1
    return {"path": "", "url": f"data:text/csv;charset=utf-8;base64,{data}", "orig_name": "chestct-visit.csv"}
