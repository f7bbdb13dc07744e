"""How the charts look: one style for all, drawn once and kept as PNG for MLflow or as SVG for the report.

Colours are those of the page's style sheet, so that an SVG can name its variables instead and follow light and dark.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, LINE, PAPER = "#1c2126", "#59626b", "#ddd9d1", "#fcfbf8"
TEST, VALID, PLAIN, CANCER, NORMAL = "#0b5cad", "#d97c00", "#8a96a3", "#a8201a", "#3a5a78"
VARIABLES = {INK: "currentColor", SOFT: "var(--soft)", LINE: "var(--line)", PAPER: "var(--paper)"}
VARIABLES |= {TEST: "var(--test)", VALID: "var(--valid)", PLAIN: "var(--train)"}
VARIABLES |= {CANCER: "var(--error)", NORMAL: "var(--info)"}
"""Colours of the page's style sheet (light), and what the report's SVG says instead."""

STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.8,
    "lines.solid_joinstyle": "round",
    "figure.dpi": 150,
    "svg.fonttype": "none",
}
SIZE = (4.4, 3.5)


def svg(figure: "Figure", name: str) -> str:
    """A figure as SVG to stand in the report: text as text, the page's colours, ids that no other figure has."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r' (width|height)="[^"]*pt"', "", text)
    text = re.sub(r' (id="|(?:xlink:)?href="#|clip-path="url\(#)', rf" \g<1>{name}-", text)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"', "", text).replace("xlink:href", "href")
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    # Matplotlib leaves out the colour of black text; ours is never black, but the default of SVG is.
    return text.replace("<svg ", f'<svg role="img" aria-label="{name.replace("_", " ")}" fill="currentColor" ', 1)


def png(figure: "Figure") -> bytes:
    """A figure as PNG on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", bbox_inches="tight")
    return buffer.getvalue()


@contextmanager
def canvas(size: tuple[float, float] = SIZE, columns: int = 1) -> "Iterator[tuple[Figure, Any]]":
    """A figure and its axes in the house style, without a display and without pyplot's global state."""
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        yield figure, figure.subplots(1, columns)
