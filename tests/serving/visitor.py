"""A visitor of the page without a browser: speaks to Gradio's queue as the page's own script does."""

import json
import uuid
from typing import Any

import httpx

Files = list[tuple[str, bytes]]


class Visitor:
    """One session. `look` gives what the result's HTML is in the end; `history` the table's HTML after it."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=120)
        self.session = uuid.uuid4().hex
        config = self.http.get("/config").json()
        self.ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
        self.events = {
            (self._name(target[0]), target[1]): event["id"]
            for event in config["dependencies"]
            for target in event["targets"]
        }
        self.history = ""

    def _name(self, identity: int | None) -> str:
        return next((str(name) for name, known in self.ids.items() if known == identity), "")

    def upload(self, files: Files) -> list[dict[str, Any]]:
        form = [("files", (name, data)) for name, data in files]
        found = self.http.post("/gradio_api/upload", files=form)
        found.raise_for_status()
        return [
            {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
            for path, (name, _) in zip(found.json(), files, strict=True)
        ]

    def look(self, files: Files) -> str:
        return self.ask(("drop", "upload"), [self.upload(files), None])

    def example(self, index: int) -> str:
        return self.ask(("examples", "select"), [None], {"index": index})

    def ask(self, event: tuple[str, str], data: list[Any], event_data: Any = None) -> str:
        """The result's HTML, or Gradio's error message."""
        body = {"data": data, "fn_index": self.events[event], "session_hash": self.session, "event_data": event_data}
        self.http.post("/gradio_api/queue/join", json=body).raise_for_status()
        shown = ""
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed":
                    output = message["output"]
                    if not message["success"]:
                        return str(output.get("error"))
                    values = output.get("data") or []
                    if isinstance(values[0], str):
                        shown = values[0]
                    if isinstance(values[2], str):
                        self.history = values[2]
                elif message.get("msg") == "process_generating":
                    values = message["output"]["data"]
                    shown = values[0] if isinstance(values[0], str) else _patched(shown, values[0])
                    if isinstance(values[2], str):
                        self.history = values[2]
                    elif isinstance(values[2], list) and values[2]:
                        self.history = _patched(self.history, values[2])
                elif message.get("msg") == "close_stream":
                    break
        return shown


def _patched(old: str, changes: Any) -> str:
    """Gradio sends what follows the first part of a stream as differences; ours replace the whole string."""
    for action, path, value in changes if isinstance(changes, list) else []:
        if action == "replace" and not path:
            old = value
        elif action == "append" and not path:
            old += value
    return old
