"""The table of this visit: one row a slice, kept in the visitor's own session and nowhere else."""

import csv
import io

from chestct.serving.batch import cell
from chestct.serving.reading import Reading

COLUMNS = ("Time", "File", "Decision", "Probability", "Distance", "Reason", "Bundle")

MOST_ROWS = 1000
"""Rows that are kept; older ones go first."""

Row = tuple[str, ...]


def visit_rows(readings: list[Reading], time: str) -> list[Row]:
    """A row of COLUMNS for each reading. time: as it is shown."""
    return [(time, reading.name, reading.decision, *_numbers(reading)) for reading in readings]


def _numbers(reading: Reading) -> Row:
    prediction = reading.prediction
    if prediction is None:
        return "", "", reading.error, ""
    score = "" if prediction.decision == "refused" else f"{prediction.score:.4f}"  # there, it means nothing
    return score, f"{prediction.novelty:.3f}", prediction.reason, prediction.bundle


def as_csv(rows: list[Row]) -> str:
    """The rows as CSV, in which no cell can start a formula."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    writer.writerows([cell(value) for value in row] for row in rows)
    return file.getvalue()
