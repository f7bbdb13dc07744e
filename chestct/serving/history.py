"""The table of this visit: one row a slice, kept in the visitor's own session and nowhere else."""

import base64
import csv
import io
from html import escape

from chestct.serving.answer import decision
from chestct.serving.reading import Reading
from chestct.serving.table import cell

COLUMNS = ("time", "file", "decision", "probability of cancer", "distance", "reason", "bundle")

MOST = 1000
"""Rows that are kept; older ones go first."""

Row = dict[str, str]


def rows(readings: list[Reading], time: str) -> list[Row]:
    """A row for each reading; time: as it is shown."""
    found = []
    for reading in readings:
        told = reading.prediction
        values = ("", "", reading.error, "")
        if told:
            values = (f"{told.score:.4f}", f"{told.novelty:.3f}", told.reason, told.bundle)
        found.append(dict(zip(COLUMNS, (time, reading.name, decision(reading), *values), strict=True)))
    return found


def render(history: list[Row]) -> str:
    """The table as HTML, newest first, with a link that holds the CSV file itself."""
    if not history:
        return '<p class="empty">Nothing yet. Every slice that you look at during this visit is listed here.</p>'
    head = "".join(f'<th scope="col">{name.capitalize()}</th>' for name in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(name, row[name])}</td>" for name in COLUMNS) + "</tr>"
        for row in reversed(history)
    )
    link = base64.b64encode(as_csv(history).encode("utf-8-sig")).decode()  # with a mark, or Excel takes it for Latin-1
    many = "1 slice" if len(history) == 1 else f"{len(history)} slices"
    return f"""<p class="bar-above"><span>{many} in this visit. The list is forgotten when you
leave.</span>
<a class="button" download="chestct-history.csv" href="data:text/csv;charset=utf-8;base64,{link}">Download CSV</a></p>
<div class="scroll" role="region" aria-label="Slices of this visit" tabindex="0"><table class="history">
<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"""


def _cell(name: str, value: str) -> str:
    return f'<span class="tag {escape(value)}">{escape(value)}</span>' if name == "decision" else escape(value)


def as_csv(history: list[Row]) -> str:
    """The rows as CSV, in which no cell can start a formula."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    writer.writerows({name: cell(value) for name, value in row.items()} for row in history)
    return file.getvalue()
