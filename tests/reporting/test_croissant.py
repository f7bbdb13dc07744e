import importlib.util
import json
import subprocess
import sys

import pandas as pd
import pytest

from chestct.files import digest
from chestct.reporting.audit_report import write
from tests.audit.conftest import faulty, make_data, official, quick  # noqa: F401 - fixtures

# In a process of its own: the absl that mlcroissant brings closes the stream it found, pytest's, when logging is set up
# anew, as Hydra does in other tests.
VALIDATE = """
import json, sys
import mlcroissant
data = mlcroissant.Dataset(jsonld=sys.argv[1])
paths = [record["slices/path"].decode() for record in data.records("slices")]
responsible = bool(data.metadata.data_biases or data.metadata.data_limitations)
print(json.dumps([sorted(data.metadata.ctx.issues.errors), responsible, paths]))
"""


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

    if not importlib.util.find_spec("mlcroissant"):
        pytest.skip("needs mlcroissant (the extra `croissant`)")
    done = subprocess.run(
        [sys.executable, "-c", VALIDATE, tmp_path / "croissant.json"], capture_output=True, check=True
    )
    errors, responsible, paths = json.loads(done.stdout)
    assert not errors
    assert responsible
    assert paths == table["path"].tolist()
