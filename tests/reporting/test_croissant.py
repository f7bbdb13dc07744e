import json

import pandas as pd
import pytest

from chestct.files import digest
from chestct.reporting.audit_report import write
from tests.audit.conftest import faulty, make_data, official, quick  # noqa: F401 - fixtures


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
    assert all(finding.text in told for finding in official.findings)

    croissant = pytest.importorskip("mlcroissant", reason="needs mlcroissant (the extra `croissant`)")
    data = croissant.Dataset(jsonld=str(tmp_path / "croissant.json"))
    assert not data.metadata.ctx.issues.errors
    assert data.metadata.data_biases or data.metadata.data_limitations
    records = list(data.records("slices"))
    assert [record["slices/path"].decode() for record in records] == table["path"].tolist()
