import json

import pandas as pd
import pytest

from chestct.files import digest
from chestct.reporting.audit_report import write
from tests.audit.conftest import faulty, make_data, official, quick  # noqa: F401 - fixtures


@pytest.fixture
def folder(official, faulty, tmp_path):  # noqa: F811
    write(official, faulty.manifest, tmp_path)
    return tmp_path


def test_the_record_describes_the_table_beside_it_and_says_every_finding(folder, official, faulty):  # noqa: F811
    record = json.loads((folder / "croissant.json").read_text(encoding="utf-8"))
    (file,) = record["distribution"]
    assert file["sha256"] == digest((folder / file["contentUrl"]).read_bytes())
    table = pd.read_csv(folder / "slices.csv")
    assert len(table) == len(faulty.manifest)
    assert list(table) == [field["name"] for field in record["recordSet"][0]["field"]]
    assert "patient" not in table
    told = " ".join(text for name in record if name.startswith("rai:") for text in record[name])
    assert official.findings
    assert all(finding.text in told for finding in official.findings)
    assert any("leak" in finding.kind for finding in official.findings)


def test_mlcroissant_accepts_the_record_and_reads_its_slices(folder, official, faulty):  # noqa: F811
    croissant = pytest.importorskip("mlcroissant", reason="needs mlcroissant (the extra `croissant`)")
    data = croissant.Dataset(jsonld=str(folder / "croissant.json"))
    assert not data.metadata.ctx.issues.errors
    assert data.metadata.data_biases or data.metadata.data_limitations
    records = list(data.records("slices"))
    assert [record["slices/path"].decode() for record in records] == faulty.manifest["path"].tolist()
