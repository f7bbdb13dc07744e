"""From the scores of slices to those of scans: slices of one series in the order of their positions, and one score.

The score of a scan is the mean of its BEST highest slices. One slice is noise, and a tumour is seen in more than one;
the mean over all would drown it. docs/scans.md says how BEST was chosen, and on how few patients.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from chestct.imaging.slice import Position
from chestct.serving.prediction import NOT_MEDICAL

BEST = 3
"""Highest scores that make the score of a scan."""

FEWEST = 5
"""Answered slices without which a series is no scan."""

SHOWN = 5
"""Most suspicious slices that are named."""

PRINTED = 10
"""Scans, and series that are none, with a line of their own in what is printed."""

VALIDATION = (
    "Not validated for patients, and no decision: the order of scans was right in 0.86 [0.57, 1.00] (AUROC) of pairs "
    "among 13 scans, of 7 patients with cancer and 4 without, in collections left out of training."
)
"""What is known of scores of scans; docs/scans.md."""

T = TypeVar("T")

Row = dict[str, str]
"""A slice in the table of `chestct predict`, by column."""


@dataclass(frozen=True, repr=False)
class Scan:
    """The slices of one series, in the order of the scan, and what they say together."""

    series: str  # SeriesInstanceUID, or of a NIfTI file a name made from its content
    rows: tuple[Row, ...]

    @property
    def answered(self) -> list[Row]:
        """Its slices with the most suspicious first; refused and unreadable ones are left out."""
        rows = [row for row in self.rows if row["decision"] not in ("refused", "unreadable")]
        return sorted(rows, key=lambda row: -float(row["score"]))

    @property
    def left_out(self) -> str:
        """Why a series is no scan, in a sentence; "" where it is one."""
        if len(self.answered) >= FEWEST:
            return ""
        reasons = Counter(row["reason"] for row in self.rows if row["decision"] == "refused").most_common(1)
        return reasons[0][0] if reasons else f"It has {len(self.rows)} slices; a scan has at least {FEWEST}."

    @property
    def score(self) -> float | None:
        """Mean of the BEST highest scores, in [0, 1]; None for what is left out. It ranks scans and is calibrated for
        none: the slices' calibration does not hold for the highest of many."""
        return None if self.left_out else sum(float(row["score"]) for row in self.answered[:BEST]) / BEST

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON, with the score of each slice in the order of the scan."""
        counts = Counter(row["decision"] for row in self.rows)
        slices = [
            {name: row[name] for name in ("path", "frame", "position", "decision")}
            | {"score": float(row["score"]) if row["score"] else None}
            for row in self.rows
        ]
        return {
            "series": self.series,
            "score": None if self.score is None else round(self.score, 6),
            "left_out": self.left_out,
            "decisions": dict(counts),
            "most_suspicious": [self.rows.index(row) for row in self.answered[:SHOWN]],
            "slices": slices,
            "bundle": self.rows[0]["bundle"],
            "validation": VALIDATION,
            "notice": NOT_MEDICAL,
        }

    def __str__(self) -> str:
        if self.left_out:
            where = f"series {self.series}, {len(self.rows)} images ({self.rows[0]['path']})"
            return f"Left out: {where}. {self.left_out}"
        lines = [f"Scan {self.series}: score {self.score:.3f}, {len(self.rows)} slices. Most suspicious:"]
        lines += [
            f"  {float(row['score']):.3f} {row['decision']:<9} {row['position']:>10}  {row['path']} {row['frame']}"
            for row in self.answered[:BEST]
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"{self}\n{VALIDATION} {NOT_MEDICAL}"


def in_order(slices: Iterable[T], place: Callable[[T], Position | None]) -> list[T]:
    """The slices of each series together, where its first one was, by position and never by name; others stay."""
    listed, first, keys = list(slices), dict[str, int](), []
    for i, one in enumerate(listed):
        where = place(one)
        keys.append((first.setdefault(where[0], i) if where else i, where or (), i))
    return [listed[i] for *_, i in sorted(keys)]


def place_of(row: Row) -> Position | None:
    """Where a slice comes in its series: last, where its row states no position; nowhere without a series."""
    series, position = row.get("series"), re.fullmatch(r"(no\. )?(.+?)( mm)?", row.get("position", ""))
    if not series or not position:
        return (series, "unknown", 0.0) if series else None  # mm, number, unknown: as the alphabet has them
    return series, "number" if position[1] else "mm", float(position[2])


def scans_in(rows: Iterable[Row]) -> list[Scan]:
    """The series among rows of slices; those of the same bytes and frame, as in a copied folder, count once."""
    series: dict[str, dict[tuple[str, str], Row]] = {}
    for row in in_order(rows, place_of):
        if row.get("series"):
            series.setdefault(row["series"], {}).setdefault((row["file_hash"], row["frame"]), row)
    return [Scan(name, tuple(slices.values())) for name, slices in series.items()]


def describe_scans(scans: list[Scan]) -> str:
    """What is to be printed: a line a scan, and a line for each series that was left out."""
    kept = sorted((scan for scan in scans if not scan.left_out), key=lambda scan: -(scan.score or 0.0))
    others = [scan for scan in scans if scan.left_out]
    lines = [str(scan) for scan in (*kept[:PRINTED], *others[:PRINTED])]
    if more := max(0, len(kept) - PRINTED) + max(0, len(others) - PRINTED):
        lines.append(f"... and {more:,} more series, in the JSON file.")
    return "\n".join([*lines, VALIDATION] if kept else lines)
