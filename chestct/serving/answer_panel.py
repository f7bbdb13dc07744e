"""The part of the page that shows an answer: decision first, then the pictures, then why, and when not to trust it."""

from collections import Counter
from typing import Any

import gradio as gr
from PIL import Image

from chestct.models.bundle import Bundle
from chestct.serving import sentences
from chestct.serving.pictures import MODEL_WINDOW, WINDOWS, Pictures, data_uri, encoded
from chestct.serving.predictor import Prediction, Predictor
from chestct.serving.reading import Reading, most_suspicious

TONES = {"cancer": "#dc2626", "normal": "#059669", "uncertain": "#d97706"}
"""Behind the headline, thinned so that its text stays readable on light and on dark ground."""

STRENGTH = 60
"""Opacity of the hottest place in percent, until a visitor chooses another."""

COLUMNS = 6

NO_PICTURE = data_uri(encoded(Image.new("L", (1, 1), 128), "PNG"), "png")

Updates = dict[Any, Any]


class AnswerPanel:
    """Components for the readings of one visitor, laid out where this is made; its values are raw payloads.

    seconds: how long readings are kept after an answer.
    """

    def __init__(self, predictor: Predictor, seconds: int) -> None:
        self.predictor = predictor
        self.readings = gr.State([], time_to_live=seconds)
        self.index = gr.State(0)
        self.tally = gr.Markdown(visible=False)
        self.gallery = gr.Gallery(
            elem_id="slices",
            show_label=False,
            visible=False,
            columns=COLUMNS,
            allow_preview=False,
            interactive=False,
            buttons=[],
        )
        with gr.Column(visible=False) as self.answer:
            with gr.Group():
                self.headline = gr.Label(show_label=False, elem_id="headline")
                self.verdict = gr.Markdown(container=True, elem_id="verdict")
                self.score = gr.Label(show_label=False, show_heading=False, elem_id="score")
            with gr.Row():
                with gr.Column(min_width=280):
                    self.slice = gr.AnnotatedImage(show_label=False, show_legend=False, elem_id="slice")
                    gr.Markdown("The slice")
                with gr.Column(min_width=280):
                    self.heat = gr.AnnotatedImage(show_label=False, show_legend=False, elem_id="heat")
                    self.heat_caption = gr.Markdown()
            with gr.Row():
                self.strength = gr.Slider(
                    0, 100, STRENGTH, step=10, label="Strength of the colours, in percent", elem_id="strength"
                )
                self.window = gr.Radio(
                    [MODEL_WINDOW, *WINDOWS],
                    value=MODEL_WINDOW,
                    label="Display window",
                    elem_id="window",
                    info="For the eye only: the model always sees its own.",
                )
            self.kinds = gr.Label(label="Which kind", show_heading=False, elem_id="kinds")
            with gr.Accordion("Why this answer") as self.why_box:
                self.why = gr.Markdown(elem_id="why")
            with gr.Accordion("Show the score anyway", open=False) as self.refused_box:
                self.refused = gr.Markdown(elem_id="refused-score")
            with gr.Accordion("When not to trust it"):
                self.caveats = gr.Markdown(elem_id="caveats")
        self.parts: list[Any] = [
            *(self.answer, self.headline, self.verdict, self.score, self.slice, self.heat, self.heat_caption),
            *(self.strength, self.window),
            *(self.kinds, self.why_box, self.why, self.refused_box, self.refused, self.caveats, self.index),
        ]
        self.outputs: list[Any] = [self.readings, self.tally, self.gallery, *self.parts]

    def listen(self, **options: Any) -> None:
        """Follows the choice of a slice, of a strength, of a window. options: of each event."""
        self.gallery.select(self.choose, [self.readings], self.parts, postprocess=False, **options)
        gr.on(
            [self.strength.input, self.window.input],
            self.redraw,
            [self.readings, self.index, self.window, self.strength],
            [self.slice, self.heat],
            postprocess=False,
            trigger_mode="always_last",
            **options,
        )

    def show_all(self, readings: list[Reading]) -> Updates:
        """The readings of a request, at least one, in the order of the scan; the most suspicious one is shown."""
        first, several = most_suspicious(readings), len(readings) > 1
        thumbnails = [
            {
                "image": {"url": reading.pictures.thumbnail_uri() if reading.pictures else NO_PICTURE},
                "caption": f"{i}: {reading.decision}",
            }
            for i, reading in enumerate(readings, start=1)
        ]
        height = 170 if len(readings) <= COLUMNS else 320
        return {
            self.readings: readings,
            self.tally: gr.update(value=_tally(readings), visible=several),
            self.gallery: gr.update(value=thumbnails, visible=several, selected_index=first, height=height),
            **self.show(readings, first),
        }

    def choose(self, readings: list[Reading], event: gr.SelectData) -> Updates:
        """Nothing changes where the readings are no longer kept."""
        return self.show(readings, event.index) if event.index in range(len(readings)) else {}

    def show(self, readings: list[Reading], index: int) -> Updates:
        """One reading, seen as the model sees it."""
        reading, bundle = readings[index], self.predictor.bundle
        prediction, pictures = reading.prediction, reading.pictures
        answered = prediction is not None and prediction.decision != "refused"
        tone = TONES.get(reading.decision, "#64748b")
        heat_shown = pictures is not None and pictures.heat is not None
        updates = {
            self.index: index,
            self.answer: gr.update(visible=True),
            self.headline: gr.update(
                value={"label": sentences.HEADLINES[reading.decision]},
                color=f"color-mix(in srgb, {tone} 18%, transparent)",
            ),
            self.verdict: _verdict(reading, bundle),
            self.score: gr.update(visible=answered),
            self.slice: gr.update(visible=pictures is not None),
            self.heat: gr.update(visible=heat_shown),
            self.heat_caption: "",
            self.strength: gr.update(value=STRENGTH, visible=heat_shown),
            self.window: gr.update(value=MODEL_WINDOW, visible=pictures is not None and len(pictures.windows) > 1),
            self.kinds: gr.update(visible=False),
            self.why_box: gr.update(visible=answered),
            self.refused_box: gr.update(visible=False),
            self.caveats: sentences.caveats(bundle),
        }
        if pictures:
            updates[self.slice] = gr.update(value=_image(pictures, MODEL_WINDOW), visible=True)
        if pictures and heat_shown:
            updates[self.heat] = gr.update(value=_image(pictures, MODEL_WINDOW, STRENGTH), visible=True)
        if prediction and answered:
            updates[self.score] = gr.update(value=_score(prediction, bundle), visible=True)
            updates[self.why] = sentences.explanation(prediction, bundle)
            updates[self.heat_caption] = sentences.heat_meaning(prediction, heat_shown)
            if len(bundle.classes) > 2:
                updates[self.kinds] = gr.update(value=_kinds(prediction), visible=True)
        elif prediction:
            updates[self.refused_box] = gr.update(visible=True, open=False)
            updates[self.refused] = sentences.refused_score(prediction)
        return updates

    def redraw(self, readings: list[Reading], index: int, window: str, strength: float) -> Updates:
        """The pictures of the reading that is shown, through another window or in another strength."""
        pictures = readings[index].pictures if index < len(readings) else None
        if pictures is None:
            return {}
        return {self.slice: _image(pictures, window), self.heat: _image(pictures, window, strength)}


def _image(pictures: Pictures, window: str, strength: float = 0) -> dict[str, Any]:
    """A gr.AnnotatedImage: the slice, with its heat above it. strength: in percent."""
    layers = [{"image": {"url": pictures.heat_uri(strength / 100)}, "label": "evidence for cancer"}] if strength else []
    return {"image": {"url": pictures.slice_uri(window)}, "annotations": layers}


def _tally(readings: list[Reading]) -> str:
    counts = Counter(reading.decision for reading in readings)
    tally = ", ".join(f"{count} {decision}" for decision, count in counts.most_common())
    return f"**{len(readings)} slices**: {tally}. The most suspicious one is shown first; choose another to look at it."


def _verdict(reading: Reading, bundle: Bundle) -> str:
    prediction = reading.prediction
    if prediction is None:
        return f"{sentences.plain(reading.error)}\n\nFile: {sentences.plain(reading.name)}"
    lines = [
        sentences.verdict(prediction, bundle.point),
        sentences.threshold_meaning(bundle.point) if prediction.decision != "refused" else "",
        sentences.KNOWN_WARNING if prediction.known else "",
        f"File: {sentences.plain(reading.name)}",
    ]
    return "\n\n".join(line for line in lines if line)


def _score(prediction: Prediction, bundle: Bundle) -> dict[str, Any]:
    """Score and threshold as two bars of a gr.Label, which rounds to whole percents: never to 0 or 100."""
    bars = {"Probability of cancer": prediction.score, "Threshold": bundle.point.threshold}
    return _bars(bars)


def _kinds(prediction: Prediction) -> dict[str, Any]:
    ordered = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
    return _bars({sentences.display_name(name): share for name, share in ordered})


def _bars(shares: dict[str, float]) -> dict[str, Any]:
    bars = [{"label": name, "confidence": min(0.99, max(0.01, share))} for name, share in shares.items()]
    return {"label": next(iter(shares)), "confidences": bars}
