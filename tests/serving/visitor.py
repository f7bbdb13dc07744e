"""A visitor of the page without a browser: speaks to Gradio's queue as the page's own script does."""

import json
import uuid
from typing import Any

import httpx
from gradio_client.utils import apply_diff

Files = list[tuple[str, bytes]]


class Visitor:
    """One session. `values` and `visible`: what each component that has a name (elem_id) shows by now."""

    def __init__(self, url: str, http: httpx.Client | None = None) -> None:
        self.http = http or httpx.Client(base_url=url, timeout=120)
        self.session = uuid.uuid4().hex
        config = self.http.get("/config").json()
        self.names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
        self.events = {
            (self.names.get(target[0]), target[1]): event
            for event in config["dependencies"]
            for target in event["targets"]
        }
        self.values: dict[str | None, Any] = {}
        self.visible: dict[str | None, bool] = {}

    @property
    def headline(self) -> str:
        return str(self.values["headline"]["label"])

    def upload(self, files: Files) -> list[dict[str, Any]]:
        answer = self.http.post("/gradio_api/upload", files=[("files", (name, data)) for name, data in files])
        answer.raise_for_status()
        return [
            {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
            for path, (name, _) in zip(answer.json(), files, strict=True)
        ]

    def look(self, files: Files) -> None:
        self.send(("upload", "upload"), [self.upload(files)])

    def example(self, index: int) -> None:
        self.send(("examples", "click"), [index])

    def choose(self, index: int) -> None:
        self.send(("slices", "select"), [None], {"index": index, "value": None})

    def send(self, name: tuple[str, str], data: list[Any], event_data: Any = None) -> str:
        """Sends an event and takes in what it changes. Returns Gradio's error message, or ""."""
        event = self.events[name]
        body = {"data": data, "fn_index": event["id"], "session_hash": self.session, "event_data": event_data}
        answer = self.http.post("/gradio_api/queue/join", json=body)
        if answer.status_code != 200:
            return answer.text
        last: list[Any] = []
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if message.get("msg") == "process_generating":  # what follows the first part comes as differences
                    parts = message["output"]["data"]
                    last = [apply_diff(old, diff) for old, diff in zip(last, parts, strict=True)] if last else parts
                    self._take(event["outputs"], last)
                elif message.get("msg") == "process_completed":
                    if not message["success"]:
                        return str(message["output"].get("error"))
                    if not last:
                        self._take(event["outputs"], message["output"]["data"])
                elif message.get("msg") == "close_stream":
                    break
        return ""

    def _take(self, outputs: list[int], values: list[Any]) -> None:
        for name, value in zip(map(self.names.get, outputs), values, strict=True):
            if isinstance(value, dict) and value.get("__type__") == "update":
                if "value" in value:
                    self.values[name] = value["value"]
                if "visible" in value:
                    self.visible[name] = value["visible"]
            else:
                self.values[name] = value
