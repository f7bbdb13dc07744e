"""A data set as a Croissant record (MLCommons, 1.0): its slices as a table, and what the audit found wrong with them.

The findings stand in the fields of Croissant's responsible-AI vocabulary, so that whoever finds the record finds them.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from chestct.audit.findings import Audit
from chestct.data.public import SETS
from chestct.files import digest

TABLE = "slices.csv"

COLUMNS = {
    "source": ("Text", "collection that the slice comes from"),
    "path": ("Text", "file below the collection's folder"),
    "folder_split": ("Text", "train, valid or test, where folders say so"),
    "label": ("Text", "normal or cancer"),
    "subtype": ("Text", "normal, a carcinoma, or cancer of unknown subtype"),
    "group": ("Integer", "cluster of copies, near-copies and series: what splits must keep whole"),
    "content": ("Text", "hash of the decoded pixels: equal for copies"),
    "width": ("Integer", "pixels"),
    "height": ("Integer", "pixels"),
}
"""Column of the manifest -> (its schema.org type, its meaning); no identifier of a patient is among them."""

BIASES = ("shortcut", "imbalance")
"""Kinds of findings that go to rai:dataBiases; identifiers have a field of their own, all others are limitations."""

CONTEXT = json.loads(Path(__file__).with_name("templates").joinpath("croissant_context.json").read_text("utf-8"))
"""What every record of Croissant 1.0 begins with, and the responsible-AI vocabulary."""


def croissant(audit: Audit, manifest: pd.DataFrame) -> dict[str, str]:
    """The record of an audited data set and the table that it describes, as {file name: content}."""
    table = manifest[list(COLUMNS)].to_csv(index=False)
    known = SETS.get(audit.name)
    findings = [(finding.kind, f"{finding.text} {finding.action}") for finding in audit.findings]
    about: dict[str, Any] = {"license": known.licence, "url": known.home} if known else {}
    record = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": audit.name,
        "description": f"{known.title if known else audit.name}: {len(manifest)} chest CT slices, "
        f"{manifest['content'].nunique()} different ones in {manifest['group'].nunique()} groups. {audit.verdict.text}",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        **about,
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": TABLE,
                "name": TABLE,
                "contentUrl": TABLE,
                "encodingFormat": "text/csv",
                "sha256": digest(table),
            }
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "slices",
                "name": "slices",
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"slices/{name}",
                        "name": name,
                        "description": meaning,
                        "dataType": f"sc:{kind}",
                        "source": {"fileObject": {"@id": TABLE}, "extract": {"column": name}},
                    }
                    for name, (kind, meaning) in COLUMNS.items()
                ],
            }
        ],
        "rai:dataBiases": [text for kind, text in findings if kind in BIASES],
        "rai:personalSensitiveInformation": [text for kind, text in findings if kind == "identifiers"],
        "rai:dataLimitations": [text for kind, text in findings if kind not in (*BIASES, "identifiers")],
        "rai:dataUseCases": "Research and teaching on transfer learning and data faults; no clinical use.",
    }
    return {"croissant.json": json.dumps(record, indent=1) + "\n", TABLE: table}
