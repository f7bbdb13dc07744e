"""Measures chestct on this machine, and writes the values as JSON and a table of them as a page.

python -m benchmarks                                   phantoms, fifteen minutes on two cores
python -m benchmarks --data FOLDER --keras PYTHON      FOLDER/train|valid|test/CLASS, next to the Keras recipe
"""

import argparse
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from http.client import HTTPConnection
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from timeit import timeit

import numpy as np
import torch
from torchvision.models import vgg16

from chestct.config.schema import ModelConfig, PhantomConfig
from chestct.files import write_atomic
from chestct.models.backends import computes, conv5_by, has_int8
from chestct.models.bundle import PACKAGED_BUNDLE, Bundle, load_bundle
from chestct.models.feature_cache import Kept, extract
from chestct.models.vgg16 import VGG16
from chestct.models.weights import PACKAGED, load_weights
from chestct.phantom.dataset import write
from chestct.serving.predictor import Predictor

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT.parent / "shared" / "tools" / "seed_baseline.py"  # in Keras
PACKAGES = ("torch", "torchvision", "lightning", "openvino", "nncf", "onnxruntime", "mlflow", "gradio")
OPENVINO = ("openvino", "openvino_bf16", "openvino_int8") if find_spec("openvino") else ()
BACKENDS = ("torch", *filter(computes, OPENVINO))
RIVALS = KERAS, EAGER, PRODUCT, LOOP = "Keras", "PyTorch eager", "matrix product", "bare loop"
FLOP = 30.69e9  # of VGG16's convolutions on a slice of 224 pixels, as torch.utils.flop_counter counts them
EPOCHS = 20
RATED = 32  # slices that features are timed on

PAGE = """# Benchmarks

`{command}` (`make bench`) on {date}: {processor}, {cores} cores, {instructions}; load {load} before it began.
Python {python}, {versions}. [Speed](speed.md) says what is compared. Read the ratios, which are of medians in one run.

| what | of | median | least to most | turns | ratio |
| --- | --- | --- | --- | --- | --- |
"""
seconds = partial(timeit, number=1)


def lines(what: str, unit: str, values: Mapping[str, list[float]]) -> str:
    """Of the table: one for each contestant, with the ratio of its median to that of each rival."""
    text, medians = "", {name: statistics.median(of) for name, of in values.items()}
    for name, of in values.items():
        rivals = [rival for rival in RIVALS if rival in medians and name not in RIVALS]
        ratios = "; ".join(f"{medians[name] / medians[rival]:.3g} of {rival}" for rival in rivals)
        spread = f"{min(of):.4g} to {max(of):.4g}"
        text += f"| {what} | {name} | {medians[name]:.4g} {unit} | {spread} | {len(of)} | {ratios} |\n"
    return text


def in_turns(turns: int, contestants: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """The values of each. Contestants take turns, so that a busy moment of the machine meets all of them."""
    every = [{name: measure() for name, measure in contestants.items()} for _ in range(turns)]
    return {name: [turn[name] for turn in every] for name in contestants}


class Program:
    """A Python program in a process of its own, timed from its start."""

    def __init__(self, folder: Path, *words: object) -> None:
        command, nowhere = [sys.executable, *map(str, words)], subprocess.DEVNULL
        self.began = time.perf_counter()
        self.process = subprocess.Popen(command, cwd=folder, stdout=nowhere, stderr=nowhere)

    def until(self, ready: Callable[[], bool] = lambda: False) -> float:
        """Seconds from the start until it is ready, or has ended. Raises CalledProcessError where it failed."""
        while (code := self.process.poll()) is None and not ready():
            time.sleep(0.02)
        if code:
            raise subprocess.CalledProcessError(code, self.process.args)
        return time.perf_counter() - self.began


class Bench:
    """Slices in root/SPLIT/CLASS; each method measures: what, in which unit, and the values of each contestant."""

    def __init__(self, given: argparse.Namespace, scratch: Path) -> None:
        self.scratch, self.turns, self.tensorflow = scratch, given.turns, given.keras
        self.bundle = given.bundle.resolve()
        self.root = (given.data or scratch / "phantoms").resolve()
        self.settings = ("data=chest_ct", "data.split=official", "data.allow_leakage=true") if given.data else ()
        if not given.data:
            write(self.root, PhantomConfig(slices=40 * self.turns))
        train, valid, test = (sorted((self.root / split).glob("*/*")) for split in ("train", "valid", "test"))
        self.learnt, self.slices = len(train + valid), [*test, *train, *valid][: 40 * self.turns]
        verified = ("torch", *load_bundle(self.bundle).facts.get("backends", ()))
        self.backends = [name for name in BACKENDS if name in verified]  # of the bundle, the quickest last

    def keras(self, split: str) -> dict[str, float]:
        """What the recipe prints of an epoch on a split, and of its bare `predict`."""
        command = [self.tensorflow, RECIPE, "--images", self.root / split, "--weights", PACKAGED, "--epochs", "1"]
        return json.loads(subprocess.check_output(command).splitlines()[-1])

    def training(self) -> Iterator[tuple]:
        """Features, and whole runs of the head on them."""
        net, eager = VGG16(ModelConfig(), 1, 224, load_weights("oxford")).eval(), vgg16().features
        noise, matrix = np.random.default_rng(0).integers(0, 256, (RATED, 224, 224), np.uint8), torch.rand(2048, 2048)
        names, slices = [*map(str, range(RATED))], lambda at: [torch.from_numpy(noise[at])[:, None] / 255]

        def rate(layer: Callable[[torch.Tensor], torch.Tensor]) -> float:
            with tempfile.TemporaryDirectory() as cache:
                kept = [Kept(layer, names, Path(cache))]
                return RATED / seconds(lambda: extract(kept, slices, torch.device("cpu"), batch_size=16))

        contestants = {"torch": partial(rate, net.pooled)}
        for name in BACKENDS[1:]:
            conv5, _ = conv5_by(name, net, names, lambda at: noise[at])
            contestants[name] = partial(rate, lambda x, conv5=conv5: net.pooled_map(conv5(x)))
        contestants[EAGER] = partial(rate, lambda x: eager(x.repeat(1, 3, 1, 1)).mean((2, 3)))
        contestants[PRODUCT] = lambda: 20 * 2 * 2048**3 / FLOP / timeit(lambda: matrix @ matrix, number=20)
        in_turns(1, contestants)  # the first pass is slower than the rest
        rates = in_turns(self.turns, contestants)
        yield "matrix product in fp32", "GFLOP/s", {PRODUCT: [rate * FLOP / 1e9 for rate in rates[PRODUCT]]}
        yield "features, VGG16 at 224 pixels", "slices/s", rates

        def train(backend: str, cache: str, report: bool = True) -> float:
            where = [*self.settings, f"data.root={self.root}", f"cache_dir={cache}", "trainer.progress=false"]
            head = ["experiment=head", "data.views=0", f"trainer.max_epochs={EPOCHS}", "trainer.patience=0"]
            how = [f"features.backend={backend}", f"evaluation.report={report}"]
            return Program(self.scratch, ROOT / "train.py", *where, *head, *how).until()

        turn, shown = itertools.count(), self.learnt * EPOCHS
        cold = {f"nothing cached, {name}": lambda name=name: train(name, str(next(turn)), False) for name in BACKENDS}
        if self.tensorflow:
            cold[KERAS] = lambda: (epoch := self.keras("train"))["seconds_per_epoch"] * shown / epoch["images"]
        values = in_turns(self.turns // 2 + 1, cold) | {EAGER: [shown / rate for rate in rates[EAGER]]}
        values["with test and report, nothing cached"] = [train("torch", "kept")]
        values |= in_turns(self.turns, {"with test and report, features cached": partial(train, "torch", "kept")})
        yield f"`train.py`, {EPOCHS} epochs of the head, {self.learnt} slices", "s", values

    def answers(self) -> Iterator[tuple]:
        sent = [path.read_bytes() for path in self.slices]
        files, turns = itertools.cycle(sent), 4 * self.turns
        predictors = {name: Predictor(self.bundle, backend=name, accelerator="cpu") for name in self.backends}
        inside = {name: lambda of=of: seconds(lambda: of.predict(next(files))) for name, of in predictors.items()}
        picture, eager = torch.rand(1, 3, 224, 224), torch.no_grad()(vgg16().features)
        inside[EAGER] = lambda: seconds(lambda: eager(picture))
        yield "one answer with heat map, in process", "s", in_turns(turns, inside)

        def added(bundle: Bundle) -> float:
            bare, explained = (seconds(partial(bundle.predict, noise[:1], explain)) for explain in (False, True))
            return 100 * (explained / bare - 1)

        quickest = predictors[self.backends[-1]].bundle
        noise = np.random.default_rng(0).random((len(sent), *2 * [quickest.preprocess.size]), np.float32)
        explained = {name: partial(added, of.bundle) for name, of in predictors.items()}
        yield "explanation, on top of the pass without", "%", in_turns(turns, explained)

        http = {}
        with ExitStack() as stack, ThreadPoolExecutor(50) as clients:
            for name in self.backends:
                ask = self.server(name, stack)
                first = {"/healthz": None, "/predict?overlay=1": next(files), "/": None}
                started = {path: [ask(path, file)] for path, file in first.items()}
                yield f"`serve.py` by {name}, from its start to an answer", "s", started
                http[name] = lambda ask=ask: timeit(lambda: ask("/predict?overlay=1", next(files)), number=4) / 4
            if self.tensorflow:
                http[KERAS] = lambda: self.keras("valid")["predict_ms"] / 1000
            yield "one answer with heat map, HTTP", "s", in_turns(self.turns, http)
            crowd = {name: lambda: len(sent) / seconds(lambda: [*clients.map(partial(ask, "/predict"), sent)])}
            crowd[LOOP] = lambda: len(sent) / seconds(lambda: quickest.predict(noise))
            yield "50 clients at once", "slices/s", in_turns(self.turns, crowd)

    def server(self, backend: str, stack: ExitStack) -> Callable[..., float]:
        """Starts `serve.py`; returns what asks it for a path, with a file, and gives the seconds since its start."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = free.getsockname()
        settings = [f"bundle={self.bundle}", f"serve.backend={backend}", f"serve.port={address[1]}"]
        settings += ["serve.queue_size=256", "serve.max_requests_per_address=256"]
        program = Program(self.scratch, ROOT / "serve.py", *settings)
        stack.callback(program.process.terminate)

        def ask(path: str, file: bytes | None = None) -> float:
            client = HTTPConnection(*address, timeout=300)
            client.request("POST" if file else "GET", path, file)
            reply = client.getresponse()
            if (text := reply.read()) and reply.status != 200:
                raise RuntimeError(f"{path}: {reply.status} {text.decode()}")
            return time.perf_counter() - program.began

        def listens() -> bool:
            with socket.socket() as tried:
                return not tried.connect_ex(address)

        program.until(listens)
        return ask

    def batch(self) -> Iterator[tuple]:
        first: dict[str, list[float]] = {name: [] for name in self.backends}

        def rate(backend: str) -> float:
            options = ["--bundle", self.bundle, "--backend", backend, "--accelerator", "cpu", "--out", f"{backend}.csv"]
            program = Program(self.scratch, "-m", "chestct", "predict", *self.slices, *options)
            table = self.scratch / f"{backend}.csv.partial"
            first[backend].append(program.until(lambda: table.is_file() and table.read_bytes().count(b"\n") > 1))
            return len(self.slices) / program.until()

        values = in_turns(1, {name: partial(rate, name) for name in self.backends})
        yield f"`chestct predict`, {len(self.slices)} slices", "slices/s", values
        yield "`chestct predict`, first row", "s", first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="of each contestant; of answers four times as many (5)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="real slices, in place of phantoms")
    parser.add_argument("--bundle", type=Path, default=PACKAGED_BUNDLE, metavar="FOLDER", help="what answers")
    parser.add_argument("--keras", metavar="PYTHON", help="one that has TensorFlow")
    parser.add_argument("--json", type=Path, default=Path("benchmarks.json"), help="what is written (benchmarks.json)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also write the page")
    given = parser.parse_args()
    known = [name for name, there in (("bfloat16", "openvino_bf16" in BACKENDS), ("INT8", has_int8())) if there]
    cpuinfo = Path("/proc/cpuinfo").read_text("utf-8") if sys.platform == "linux" else ""
    facts = {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "processor": cpuinfo.partition("model name")[2].partition("\n")[0].strip(" \t:") or platform.processor(),
        "cores": os.cpu_count(),
        "instructions": ", ".join([torch.backends.cpu.get_cpu_capability(), *known]),
        "load": round(os.getloadavg()[0], 1),
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES if find_spec(name)),
        "python": platform.python_version(),
        "measurements": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(given, Path(scratch))
        for what, unit, values in itertools.chain(bench.training(), bench.answers(), bench.batch()):
            facts["measurements"].append({"what": what, "unit": unit, "values": values})
            print(lines(what, unit, values), end="", flush=True)
    write_atomic(given.json, json.dumps(facts, indent=1) + "\n")
    if given.write:
        write_atomic(given.write, PAGE.format(**facts) + "".join(lines(**one) for one in facts["measurements"]))


if __name__ == "__main__":
    main()
