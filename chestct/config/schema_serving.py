"""The part of the schema that the service reads: bundles, the web page, its API, and the record of what they saw."""

from dataclasses import dataclass

from chestct.config.fields import setting

FACTS, TENSORS, CARD = "bundle.json", "model.safetensors", "MODEL_CARD.md"
"""What every bundle consists of."""

FILES = {
    "openvino_int8": ("openvino_int8.xml", "openvino_int8.bin"),
    "openvino_bf16": ("openvino_bf16.xml", "openvino_bf16.bin"),
    "openvino": ("openvino.xml", "openvino.bin"),
    "onnx": ("network.onnx",),
}
"""Backends that a bundle may have next to torch, the quickest first, and the files of each."""

ROUNDED = {"openvino_bf16": "bfloat16", "openvino_int8": "INT8"}
"""Those that compute with fewer bits than fp32, and with what."""

BACKENDS = ("auto", "torch", *FILES)


@dataclass
class ServeConfig:
    """The web page and its API: where they listen, and what one person may ask of them."""

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: other machines reach it, by name with serve.hosts")
    port: int = setting(7860, "port to listen on", low=1, high=65535)
    hosts: list[str] = setting(
        [],
        "names of the service beside localhost and addresses: [ct.example.org], ['*.example.org']; ['*']: any",
        form=r"\*|(\*\.)?[^*:/]+|\[[^*/]+\]",  # as requests name it: no port
    )
    proxies: list[str] = setting([], "addresses or networks of reverse proxies, whose X-Forwarded-* is believed")
    backend: str = setting("auto", "what computes: auto is the quickest that the bundle has here", choices=BACKENDS)
    max_upload_bytes: int = setting(300_000_000, "bytes that one request may send", low=1_000)
    max_slices: int = setting(512, "slices that one request may hold", low=1, high=2000)
    max_pixels: int = setting(20_000_000, "largest image that is decoded, in pixels", low=1)
    max_pixels_in_flight: int = setting(40_000_000, "pixels that are worked on at once; each takes 20 bytes", low=1)
    max_requests_per_address: int = setting(64, "requests at once from one address, open pages included", low=1)
    queue_size: int = setting(64, "requests for an answer that may wait or run at once; more are turned away", low=1)
    request_timeout_s: float = setting(60.0, "longest time that one answer may take, in seconds", low=1, high=3600)


@dataclass
class MonitorConfig:
    """The record of what the service saw: numbers only, never pixels, names or DICOM tags."""

    enabled: bool = setting(False, "append one record a slice")
    path: str = setting("monitor.sqlite", "file for the records")
    keep_days: int = setting(90, "days after which a record is deleted", low=1)
