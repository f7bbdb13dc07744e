"""Programs that run a bundle's network in torch's place: OpenVINO, in fp32, bfloat16 or INT8, and ONNX Runtime.

A backend's files hold one graph, from a slice to its logits and to the map that head, heat and novelty are made of
(`VGG16.conv5`); so every backend explains itself and refuses by itself. The files are data: a graph of known operations
with its numbers, handed over as the bytes whose hash was checked. Graphs take one slice at a time, the size that they
are fastest at on a processor. Each program is imported when a graph is for it.
"""

import copy
import importlib.util
import logging
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from chestct.config.schema_serving import FILES
from chestct.errors import ConfigError
from chestct.files import json_digest
from chestct.models.vgg16 import VGG16, pick_device

logger = logging.getLogger("chestct")

PACKAGES = dict.fromkeys(("openvino", "openvino_bf16", "openvino_int8"), "openvino") | {"onnx": "onnxruntime"}
"""What runs each."""

CALIBRATION = 100
"""Training slices that INT8 is calibrated on, at most."""

STREAMS = 4
"""Slices that OpenVINO computes at once, at most, each on its part of the cores."""

Graph = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Slices float32 [B, 1, S, S] in [0, 1] -> logits [B, K] and the map `conv5` [B, C, h, w], as torch gives them."""


class Exported(nn.Module):
    """What is exported of a network, see `Graph`."""

    def __init__(self, net: VGG16) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).cpu()
        self.eval()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.net.answer(x)


def choose(wanted: str, verified: Collection[str], accelerator: str = "auto") -> tuple[str, torch.device]:
    """The backend that answers, and the device that torch computes on next to it; logs both in one line.

    wanted: `auto` (an accelerator where there is one, else the first of FILES that is verified, installed, and known to
    the processor, else torch) or the name of one; verified: the backends that the bundle was verified for.
    Raises ConfigError where a backend that was named cannot be had.
    """
    device = pick_device(accelerator if wanted in ("auto", "torch") else "cpu")
    name = wanted
    if wanted == "auto":
        usable = (b for b in FILES if b in verified and importlib.util.find_spec(PACKAGES[b]) and computes(b))
        name = next(usable, "torch") if device.type == "cpu" else "torch"
    elif wanted != "torch" and wanted not in verified:
        raise ConfigError(
            f"serve.backend={wanted}: the bundle was verified for {', '.join(['torch', *verified])} alone. Add it "
            f"with: chestct export bundle=FOLDER format={wanted} data=..., with the data that the bundle was made with."
        )
    elif wanted != "torch":
        _program(wanted)
    if (wanted, accelerator) != ("torch", "cpu"):  # of whoever left the choice to this machine
        logger.info("answers by %s on %s", name, device)
    if name == "openvino_int8" and not has_int8():
        logger.info("this processor has no instructions for INT8 (VNNI): it gains little over serve.backend=openvino")
    return name, device


def has_int8(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies 8-bit numbers faster than others; true where that cannot be known."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return any(flag in text for flag in ("vnni", "amx_int8", "asimddp", "i8mm"))


@cache
def computes(name: str) -> bool:
    """Whether the processor knows the arithmetic of a backend; OpenVINO would put fp32 in place of bfloat16."""
    if name != "openvino_bf16":
        return True
    return "BF16" in _program("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _program(name: str, package: str = "", extra: str = "") -> Any:
    """A package that not every installation has.

    Raises ConfigError with the extra that brings it, and where the processor cannot compute as `name` says.
    """
    package, extra = package or PACKAGES[name], extra or name.partition("_")[0]
    if package in ("openvino", "nncf"):
        # Both report their use to a server unless this package is missing, for which they have a stand-in.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        program = importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{name} needs {package}, which is not installed here ({error}). Install it: pip install 'chestct[{extra}]'"
        ) from None
    if not computes(name):
        raise ConfigError(
            f"{name}: this processor has no instructions for bfloat16 (AMX or AVX512_BF16). Take openvino or torch."
        )
    return program


def load_graph(name: str, files: Sequence[bytes]) -> Graph:
    """The graph in the files of a backend, FILES[name], which uses `threads`. Any thread may call it.

    Raises ConfigError where its program is not installed; of damaged files, RuntimeError or ValueError.
    """
    program = _program(name)
    if name == "onnx":
        options = program.SessionOptions()
        options.intra_op_num_threads = threads()
        options.log_severity_level = 4
        try:
            session = program.InferenceSession(files[0], options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no public base
            raise ValueError(error) from None
        entry = session.get_inputs()[0].name
        return lambda x: _joined([session.run(None, {entry: one}) for one in x.cpu().numpy()[:, None]])
    # In fp32 but for what was made INT8, unless bfloat16 is asked for.
    precision = "bf16" if name == "openvino_bf16" else "f32"
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads()}
    model = program.Core().read_model(files[0], files[1])
    passes = Passes(lambda streams: program.compile_model(model, "CPU", settings | {"NUM_STREAMS": streams}))
    passes.compiled(1)  # whatever is wrong with the files shows here
    return passes


@cache
def threads() -> int:
    """As many as torch had when this was first asked, also where `Predictor` has left it one."""
    return torch.get_num_threads()


class Passes:
    """Passes through an OpenVINO model: a slice that is alone has all cores, of several each has a part of them.

    Shared by two cores, a pass takes a sixth more of their time than on one. Answers are the same to the bit.
    compile: gives the model for a number of streams.
    """

    def __init__(self, compile: Callable[[int], Any]) -> None:
        self.compiled = cache(compile)
        self.idle: dict[int, list[Any]] = defaultdict(list)  # requests, which keep their memory
        self.running, self.lock = 0, threading.Lock()
        self.at_once = min(STREAMS, threads())  # more passes would fight for the same cores

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slices = x.cpu().numpy()[:, None]
        if len(slices) == 1:
            return _joined([self.infer(slices[0])])
        with ThreadPoolExecutor(self.at_once) as pool:
            return _joined(list(pool.map(partial(self.infer, several=True), slices)))

    def infer(self, x: np.ndarray, several: bool = False) -> list[np.ndarray]:
        """The answer for one slice, float32 [1, 1, S, S]; several: others are about to be asked for, too."""
        with self.lock:
            streams = self.at_once if several or self.running else 1
            self.running += 1
            idle = self.idle[streams]
            request = idle.pop() if idle else self.compiled(streams).create_infer_request()
        try:
            return list(request.infer({0: x}).to_tuple())
        finally:
            with self.lock:
                self.running -= 1
                idle.append(request)


def _joined(answers: Sequence[Sequence[np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    logits, conv5 = (torch.from_numpy(np.concatenate(part)) for part in zip(*answers, strict=True))
    return logits, conv5


def conv5_by(
    name: str, net: VGG16, contents: Sequence[str], squares: Callable[[np.ndarray], np.ndarray]
) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    """`VGG16.conv5` through a backend, on the processor, and a digest of what INT8 was calibrated on, else "".

    contents: hashes of the training slices; squares: gives uint8 [N, S, S] for positions among them.
    """
    chosen = calibration_slices(len(contents))
    # Made when it is first asked, which a warm cache never does.
    graph = cache(lambda: load_graph(name, convert(net, name, squares(chosen))))
    quantised = json_digest([contents[i] for i in chosen]) if name == "openvino_int8" else ""
    return lambda x: graph()(x)[1], quantised


def calibration_slices(count: int) -> np.ndarray:
    """Which of so many training slices INT8 is calibrated on: positions, at most CALIBRATION, always the same."""
    return np.random.default_rng(0).permutation(count)[:CALIBRATION]


def convert(net: VGG16, name: str, squares: np.ndarray) -> list[bytes]:
    """The files FILES[name] of a backend for a network.

    squares: uint8 [N, S, S], training slices on which the ranges of INT8 are measured. Raises ConfigError where a
    package for it is not installed.
    """
    x = torch.zeros(1, 1, net.size, net.size)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, file) for file in FILES[name]]
        if name == "onnx":
            for package in ("onnx", "onnxscript"):
                _program(name, package, "export")
            torch.onnx.export(Exported(net), (x,), paths[0], dynamo=True, external_data=False, verbose=False)
        else:
            model = _program(name).convert_model(torch.export.export(Exported(net), (x,)), input=[tuple(x.shape)])
            model = quantise(model, net.batches(squares[:CALIBRATION], 1)) if name == "openvino_int8" else model
            _program(name).save_model(model, paths[0], compress_to_fp16=False)
        return [path.read_bytes() for path in paths]


def quantise(model: Any, slices: Any) -> Any:
    """An OpenVINO model whose convolutions compute in INT8 (NNCF, post-training); the first and the head stay fp32.

    The first is a hundredth of the work, and was two thirds of the logits' error (packaged bundle, 200 valid slices).

    slices: float32 [1, 1, S, S] each, of train, on which the ranges of activations are measured.
    """
    nncf = _program("openvino_int8", "nncf", "export")
    nncf.set_log_level(logging.ERROR)
    data = [one.cpu().numpy() for one in slices]
    head: set[str] = set()
    todo = [model.output(1).get_node().input_value(0).get_node()]
    while todo:  # all that is computed from the map
        following = [target.get_node() for out in todo.pop().outputs() for target in out.get_target_inputs()]
        todo += [node for node in following if node.get_friendly_name() not in head]
        head |= {node.get_friendly_name() for node in following}
    first = next(node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution")
    left_out = nncf.IgnoredScope(names=[first.get_friendly_name(), *sorted(head)], validate=False)
    return nncf.quantize(model, nncf.Dataset(data), subset_size=len(data), ignored_scope=left_out)
