import json

import numpy as np
import pandas as pd
import pytest

from chestct.audit.findings import without_examples
from chestct.data.public import SETS, PublicSet
from chestct.files import digest, json_digest
from chestct.reporting.audit_report import write
from chestct.reporting.croissant import croissant
from tests.audit.conftest import faulty, make_data, official, quick  # noqa: F401 - fixtures


def test_only_the_slices_that_were_published_have_a_collections_licence(official, faulty, monkeypatch):  # noqa: F811
    def told(manifest):
        return json.loads(croissant(official, manifest)["croissant.json"])

    rows = faulty.manifest.assign(path=np.where(faulty.manifest["label"] == "normal", "Normal cases/a", "cancer/a"))
    folders = {label: (len(part), json_digest(sorted(part["content"]))[:16]) for label, part in rows.groupby("label")}
    known = PublicSet("Made up", "https://example.org", "CC0", "", "", folders, also={"normal": "normal cases"})
    monkeypatch.setitem(SETS, official.name, known)
    record = told(rows)
    assert (record["license"], record["url"]) == ("CC0", "https://example.org")
    assert record["description"].startswith("Made up: ")
    for other in (rows[1:], rows.assign(content="own " + rows["content"]), rows.assign(path="cancer/a")):
        record = told(other)
        assert not {"license", "url"} & set(record)
        assert record["description"].startswith("made_up: ")


def test_the_record_describes_the_table_beside_it_and_says_every_finding(official, faulty, tmp_path):  # noqa: F811
    write(official, faulty.manifest, tmp_path)
    record = json.loads((tmp_path / "croissant.json").read_text(encoding="utf-8"))
    (file,) = record["distribution"]
    assert file["sha256"] == digest((tmp_path / file["contentUrl"]).read_bytes())
    table = pd.read_csv(tmp_path / "slices.csv")
    assert table["path"].tolist() == faulty.manifest["path"].tolist()
    assert "patient" not in table
    told = " ".join(text for name in record if name.startswith("rai:") for text in record[name])
    assert any("leak" in finding.kind for finding in official.findings)
    assert all(without_examples(finding.text) in told for finding in official.findings)
    assert not any(path in told for path in [*table["path"], "broken"])

    mlcroissant = pytest.importorskip("mlcroissant", reason="needs mlcroissant (the extra `croissant`)")
    data = mlcroissant.Dataset(jsonld=str(tmp_path / "croissant.json"))
    assert not data.metadata.ctx.issues.errors
    assert data.metadata.data_biases or data.metadata.data_limitations
    records = list(data.records("slices"))
    assert [record["slices/path"].decode() for record in records] == table["path"].tolist()
