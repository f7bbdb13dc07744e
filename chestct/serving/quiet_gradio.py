"""Gradio without what a service has no use for: telemetry, stub files, and file components that fetch and keep files.

While Gradio is imported it rewrites a .pyi file for each component, which takes a second and serves nobody here. It
skips classes without a source file, so component classes have none.
"""

import inspect
import os
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nor does it then look for a newer version
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# It makes a table of the last 10,000 events after every single one, for a page that is shut here.
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "100"

File = tuple[str, Path]
"""What the owner calls an upload, and where it lies."""

getfile = inspect.getfile


def _no_source_of_components(thing: Any) -> str:
    if type(thing).__name__ == "ComponentMeta":
        raise OSError("not looked for")
    return getfile(thing)


inspect.getfile = _no_source_of_components  # type: ignore[assignment]
try:
    import gradio as gr
    from gradio.utils import get_upload_folder

    class UploadBox(gr.File):
        """A file component that takes uploads alone: no URL to fetch, no path elsewhere, and no copies of its own.

        A class and not a changed instance, because Gradio makes new instances of its class for each session.
        """

        is_template = True  # its looks are gr.File's

        def move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str:
            return str(_uploaded(url_or_file_path))

        async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str:
            return str(_uploaded(url_or_file_path))

        def preprocess(self, payload: Any) -> list[File]:  # type: ignore[override]
            parts = getattr(payload, "root", payload) or []
            parts = parts if isinstance(parts, list) else [parts]
            return [(part.orig_name or "unnamed", _uploaded(part.path)) for part in parts]

finally:
    inspect.getfile = getfile


def _uploaded(path: str | Path | None) -> Path:
    """The path, if it is FOLDER/RANDOM/RANDOM with Gradio's upload folder (see `web`), links resolved.

    Exactly so deep, because what it lies in is removed with it.
    """
    if path is None or Path(path).resolve().parent.parent != Path(get_upload_folder()).resolve():
        raise gr.Error("This is no file that was uploaded.", print_exception=False)
    return Path(path)


__all__ = ["File", "UploadBox", "gr"]
