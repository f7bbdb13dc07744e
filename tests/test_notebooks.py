import json
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs_and_name_no_place_of_one_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in json.loads(text)["cells"])
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_promise_what_their_commands_do(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    for text in texts:
        assert ("robustness," in text) == ("evaluation.robustness=" in text), text
    assert "DICOM" not in "".join(texts) or any(".dcm" in cell.source for cell in cells)


def test_a_page_shows_what_a_notebook_printed_and_drew():
    from notebooks.pages import as_markdown

    code = nbformat.v4.new_code_cell("df; print(1)")
    code.outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="\x1b[1m1\x1b[0m\n"),
        nbformat.v4.new_output("display_data", {"image/png": "QUJD\n", "text/plain": "<Figure>"}),
        nbformat.v4.new_output("execute_result", {"text/html": "<table>\n\n</table>", "text/plain": "   a"}),
    ]
    page = as_markdown(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("see [1](01_a.ipynb)"), code]))
    assert page == (
        "see [1](01_a.md)\n\n```python\ndf; print(1)\n```\n\n```text\n1\n```\n\n"
        "![Output of the cell above](data:image/png;base64,QUJD)\n\n<table>\n</table>\n"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_on_phantoms(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.delenv("CHESTCT_DATA", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    client = NotebookClient(nbformat.read(path, as_version=4), timeout=500, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
