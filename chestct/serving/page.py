"""The page: Gradio's components in one `gr.Blocks`.

Files are taken as Gradio's raw payload (`preprocess=False`) and pictures are given as data URIs (`postprocess=False`):
so an upload is never copied, is gone once it is read, and no picture of it is ever written to disk. Slice and heat are
two images next to each other and not a gr.ImageSlider, which always hides a part of both and which no keyboard moves.
"""

from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from gradio.route_utils import FnIndexInferError
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chestct.config.schema_serving import ServeConfig
from chestct.errors import ChestCTError
from chestct.serving.api import netloc
from chestct.serving.examples import Example
from chestct.serving.prediction import jpeg_uri
from chestct.serving.predictor import OnAnswer, Predictor
from chestct.serving.reading import Files, Reading, expand, read, scan_of, take
from chestct.serving.scan import in_order, place_of
from chestct.serving.sentences import HEADLINES, HEAT, NOTICE, capped, card_body, caveats, plain

SESSIONS = 64
"""Visitors whose last answer is kept at once; the one who has been away longest starts anew."""

TONES = {"cancer": "#dc2626", "normal": "#059669", "uncertain": "#d97706"}
"""Behind the headline, thinned so that its text stays readable on light and on dark ground."""

PICTURES = 24
"""Slices of a scan that are shown, the most suspicious first; the strip has the scores of all."""

STRIP: dict[str, Any] = {
    "columns": ["slice", "score", "decision"],
    "datatypes": {"slice": "quantitative", "score": "quantitative", "decision": "nominal"},
    "mark": "point",
}

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]

THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="slate",
    font=FONTS,
    font_mono=FONTS,  # else labels come in it
).set(
    body_background_fill="*neutral_100",
    block_background_fill="white",
    block_radius="10px",
    block_label_text_color="*neutral_600",
    block_title_text_color="*neutral_600",
    body_text_color_subdued="*neutral_600",
    stat_background_fill="*primary_700",
    stat_background_fill_dark="*primary_400",
)

NO_ORIGINS = Middleware(CORSMiddleware, allow_origins=())
"""With it, Gradio leaves out its own, which trusts localhost."""

CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")

REACHABLE = """() => [100, 500, 3000].forEach(wait =>
    setTimeout(() => document.querySelectorAll("#card table").forEach(table => table.tabIndex = 0), wait))"""
"""Keys scroll tables, too, that are wider than a phone. Gradio draws a tab some time after it was chosen."""

GREY = jpeg_uri(Image.new("L", (1, 1), 128))

START = """## Drop a slice, or try an example
1. **Give it** one or more axial chest CT slices: PNG, JPEG, TIFF or DICOM, or a zip of them, which may be a whole scan.
2. **Read** the decision, the score, and what both are worth.
3. **Look** at where the model looked, and at when not to trust it.

Files are read once and deleted at once. Nothing leaves the machine that this page runs on. Programs send a slice to
`/predict` and get JSON: `curl --data-binary @slice.png ADDRESS/predict`."""


def make_page_app(
    predictor: Predictor, cfg: ServeConfig, uploads: Path, examples: list[Example], on_answer: OnAnswer | None = None
) -> FastAPI:
    """The app of the page. What Gradio would keep, show or open is switched off."""
    return gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=[NO_ORIGINS]),
        make_page(predictor, cfg, uploads, examples, on_answer),
        path="/",
        server_name=cfg.host,
        server_port=cfg.port,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        show_error=False,  # of errors that are no gr.Error: their messages name folders of this machine
        max_file_size=cfg.max_upload_bytes,
        app_kwargs={
            "exception_handlers": dict.fromkeys((RequestValidationError, KeyError, FnIndexInferError), _unreadable)
        },
        theme=THEME,
        css=CSS,
    )


async def _unreadable(_: Request, error: Exception) -> Response:
    """Gradio's own answers quote the request, which fails over NaN, and an unknown function is a failure to it."""
    return JSONResponse({"error": "The request cannot be understood: no such function, or a wrong value."}, 422)


def make_page(
    predictor: Predictor, cfg: ServeConfig, uploads: Path, examples: list[Example], on_answer: OnAnswer | None = None
) -> gr.Blocks:
    """The Blocks of the page. uploads: the folder that holds each upload, see `reading.keep`."""

    def look(files: list[dict[str, Any]]) -> Iterator[dict[Any, Any]]:
        try:
            yield from read_and_show(take(files, uploads, cfg.max_slices, cfg.max_upload_bytes), on_answer)
        except ChestCTError as error:
            alert = f'<p role="alert"><b>That did not work.</b> {escape(str(error))}</p>'
            yield {status: gr.update(value=alert, visible=True), box: None}

    def look_at_example(index: int) -> Iterator[dict[Any, Any]]:
        example = examples[index if index in range(len(examples)) else 0]
        # Not recorded: what the house shows is no sign of what visitors bring.
        yield from read_and_show([(example.name, example.data)], None)

    def read_and_show(files: Files, record: OnAnswer | None) -> Iterator[dict[Any, Any]]:
        bundle, slices = predictor.bundle, expand(files, cfg.max_slices, cfg.max_upload_bytes)  # one for all of them
        shown: list[Reading] = []
        for i, (name, data) in enumerate(slices):
            text = f"Reading slice {i + 1} of {len(slices)}…"
            bar = f'<progress max="{len(slices)}" value="{i}" aria-label="Progress"></progress>'
            yield {status: gr.update(value=f'<p role="status">{text}</p>{bar}', visible=True)}
            shown += read(predictor, bundle, name, data, record)
        shown = in_order(shown, lambda one: place_of(one.row))
        scan, about = scan_of(shown)
        place = {id(reading): i for i, reading in enumerate(shown, 1)}
        points = [[place[id(one)], one.score, one.decision] for one in scan]
        if scan:
            shown = sorted(shown, key=lambda one: one.suspicion, reverse=True)[:PICTURES]
            about += f" Shown are the {PICTURES} most suspicious." * (len(place) > PICTURES)
        first = max(range(len(shown)), key=lambda i: (shown[i].suspicion, -i))
        counts = Counter(reading.decision for reading in shown).most_common()
        choice = "The most suspicious one is shown first; choose another to look at it."
        height = 170 if len(shown) < 7 else 320
        tally = ", ".join(f"{count} {decision}" for decision, count in counts)
        thumbs = [
            {"image": {"url": one.slice or GREY}, "caption": f"{place[id(one)]}: {one.decision}"} for one in shown
        ]
        summary = about or f"<b>{len(shown)} slices</b>: {tally}. {choice}"
        yield {
            **show(shown[first]),
            status: gr.update(value=summary, visible=len(shown) > 1),
            strip: gr.update(value=STRIP | {"data": points}, x_lim=[0, len(place) + 1], visible=bool(scan)),
            start: gr.update(visible=False),
            box: None,
            readings: shown,
            gallery: gr.update(value=thumbs, visible=len(shown) > 1, height=height, selected_index=first),
        }

    def choose(shown: list[Reading], event: gr.SelectData) -> Any:
        """Nothing changes where the readings are no longer kept."""
        return show(shown[event.index]) if event.index in range(len(shown)) else gr.skip()

    def show(reading: Reading) -> dict[Any, Any]:
        answered = reading.decision not in ("refused", "unreadable")
        title = "Show the score anyway" if reading.decision == "refused" else "Why this answer"
        tone = f"color-mix(in srgb, {TONES.get(reading.decision, '#64748b')} 18%, transparent)"
        shares = {"Score": reading.score, "Threshold": reading.threshold}
        bars = [{"label": name, "confidence": capped(share)} for name, share in shares.items()]
        return {
            result: gr.update(visible=True),
            headline: gr.update(value={"label": HEADLINES[reading.decision]}, color=tone),
            verdict: f"{reading.verdict}\n\nFile: {plain(reading.name)}",
            score: gr.update(value={"label": "Score", "confidences": bars}, visible=answered),
            picture: gr.update(value={"url": reading.slice}, visible=bool(reading.slice)),
            heat_box: gr.update(visible=bool(reading.heat)),
            heat: {"url": reading.heat},
            why_box: gr.update(label=title, open=answered, visible=bool(reading.why)),
            why: reading.why,
        }

    def describe_model() -> tuple[str, str]:
        text = predictor.bundle.card
        return card_body(text), caveats(text)

    address = f"http://{'127.0.0.1' if cfg.host in ('0.0.0.0', '::') else netloc(cfg.host)}:{cfg.port}"
    with gr.Blocks(title="chestct: cancer or normal on chest CT", analytics_enabled=False) as page:
        readings = gr.State([], time_to_live=1800)
        gr.Markdown(NOTICE, elem_id="notice")
        gr.Markdown("# chestct\nCancer or normal on a chest CT slice, with the reasons and the doubts.")
        with gr.Tabs():
            with gr.Tab("Slices"), gr.Row():
                with gr.Column(scale=2, min_width=270):
                    label = "Chest CT slices, or a zip"
                    box = gr.File(label=label, file_count="multiple", height=170, elem_id="upload")
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
                    start = gr.Markdown(START.replace("ADDRESS", address), container=True)
                    strip = gr.ScatterPlot(
                        **dict(zip(("x", "y", "color"), STRIP["columns"], strict=True)),
                        color_map=TONES,
                        y_lim=[0, 1.05],
                        x_axis_format="d",
                        height=260,
                        title="Scores in the order of the scan",  # a label would push the legend out of the frame
                        show_label=False,
                        visible=False,
                        elem_id="strip",
                    )
                    still: dict[str, Any] = {"allow_preview": False, "interactive": False, "buttons": []}
                    gallery = gr.Gallery(show_label=False, visible=False, columns=6, elem_id="slices", **still)
                    with gr.Column(visible=False) as result:
                        with gr.Group():
                            headline = gr.Label(show_label=False, elem_id="headline")
                            verdict = gr.Markdown(container=True, elem_id="verdict")
                            score = gr.Label(show_label=False, show_heading=False, elem_id="score")
                        looked = "Where the model looked"
                        framed: dict[str, Any] = {"interactive": False, "buttons": ["fullscreen"], "height": 360}
                        with gr.Row():
                            with gr.Column(min_width=280):
                                picture = gr.Image(label="The slice", alt_text="The slice", elem_id="slice", **framed)
                            with gr.Column(min_width=280) as heat_box:
                                heat = gr.Image(label=looked, alt_text=looked, elem_id="heat", **framed)
                                gr.Markdown(HEAT)
                        with gr.Accordion() as why_box:
                            why = gr.Markdown(elem_id="why")
                        with gr.Accordion("When not to trust it"):
                            doubts = gr.Markdown(elem_id="caveats")
            with gr.Tab("Model") as model:
                card = gr.Markdown(container=True, elem_id="card")
        shown = [result, headline, verdict, score, picture, heat_box, heat, why_box, why]
        answered = [status, start, box, readings, strip, gallery, *shown]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        raw = quiet | {"preprocess": False, "postprocess": False, "concurrency_limit": 4}
        box.upload(look, [box], answered, **raw)
        samples.click(look_at_example, [samples], answered, **raw)
        gallery.select(choose, [readings], shown, postprocess=False, **quiet)
        page.load(describe_model, None, [card, doubts], **quiet)
        model.select(None, js=REACHABLE, **quiet)
    page.state_session_capacity = SESSIONS
    page.has_launched = True  # else Gradio, when it is mounted, copies whatever file of this machine a client names
    page.queue(max_size=cfg.queue_size, default_concurrency_limit=4)
    return page


def _sample(example: Example) -> str:
    return (
        '<span style="display: flex; gap: 8px; align-items: center; width: 10em; text-align: left; white-space: pre">'
        f'<img src="{example.thumb}" alt="" width="32" height="32" style="border-radius: 6px">'
        f"<span><b>{escape(example.title)}</b><br><small>{escape(example.about)}</small></span></span>"
    )
