"""Hook of mkdocs: every notebook is run on phantoms, and shown on the site with what it printed and drew; and RESULTS.md.

The sources stay without outputs. Plain Markdown, because themes for notebooks fetch scripts from elsewhere.
CHESTCT_DOCS_RUN=0 shows them without running them.
"""

import os
import re
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs with the site's files."""
    from mkdocs.structure.files import File

    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        if os.environ.get("CHESTCT_DOCS_RUN") != "0":
            NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(FOLDER.parent)}}).execute()
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=as_markdown(notebook)))
    results = (FOLDER.parent / "RESULTS.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "results.md", content=results))
    return files


def as_markdown(notebook: Any) -> str:
    """A notebook with its outputs as one page: text, code, what it printed, tables and pictures."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", cell.source))
        elif cell.cell_type == "code":
            parts.append(f"```python\n{cell.source}\n```")
            parts += [text for output in cell.outputs if (text := _output(output))]
    return "\n\n".join(parts) + "\n"


def _output(output: Any) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![Output of the cell above](data:image/png;base64,{data['image/png'].strip()})"
    if "text/html" in data:
        return re.sub(r"\n\s*\n", "\n", data["text/html"])  # an empty line would end the block of HTML
    text = output.get("text") or data.get("text/plain") or ""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).rstrip().replace("```", "'''")
    return f"```text\n{plain}\n```" if plain else ""
