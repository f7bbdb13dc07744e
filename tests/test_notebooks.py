import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs_and_name_no_place_of_one_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in json.loads(text)["cells"])
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_on_phantoms(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHESTCT_DATA", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    client = NotebookClient(nbformat.read(path, as_version=4), timeout=500, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
