"""A data set as a Croissant record (MLCommons, 1.0): its slices as a table, and what the audit found wrong with them.

The findings stand in the fields of Croissant's responsible-AI vocabulary, so that whoever finds the record finds them.
"""

import json
from pathlib import Path

import pandas as pd

from chestct.audit.findings import Audit, without_examples
from chestct.data.public import published
from chestct.files import digest

RECORD = Path(__file__).with_name("templates") / "croissant.json"
"""A record as far as it is the same for all: its columns are those of the table. None is an identifier from a DICOM
header; but `path` stands as it is, whatever the file is called."""

BIASES = ("shortcut", "imbalance")
"""Kinds of findings that go to rai:dataBiases; identifiers have a field of their own, all others are limitations."""


def croissant(audit: Audit, manifest: pd.DataFrame) -> dict[str, str]:
    """The record of an audited data set and the table that it describes, as {file name: content}."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    (file,), (rows,) = record["distribution"], record["recordSet"]
    table = manifest[[field["name"] for field in rows["field"]]].to_csv(index=False)
    file["sha256"] = digest(table)
    known = published(audit.name, manifest)  # the settings of a public collection read folders of one's own, too
    findings = [(finding.kind, f"{without_examples(finding.text)} {finding.action}") for finding in audit.findings]
    record |= {
        "name": audit.name,
        "description": f"{known.title if known else audit.name}: {len(manifest)} chest CT slices, "
        f"{manifest['content'].nunique()} different ones in {manifest['group'].nunique()} groups. {audit.verdict.text}",
        **({"license": known.licence, "url": known.home} if known else {}),
        "rai:dataBiases": [text for kind, text in findings if kind in BIASES],
        "rai:personalSensitiveInformation": [text for kind, text in findings if kind == "identifiers"],
        "rai:dataLimitations": [text for kind, text in findings if kind not in (*BIASES, "identifiers")],
    }
    return {"croissant.json": json.dumps(record, indent=1) + "\n", file["name"]: table}
