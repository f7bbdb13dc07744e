"""What `python -m benchmarks` times, as rows: what, in which unit, the values, and those of rivals in turn with it.

Contestants take turns, so that a busy moment of the machine meets all of them.
"""

import contextlib
import copy
import http.client
import itertools
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from chestct.config.schema import ModelConfig, WindowConfig
from chestct.imaging.decode import decode
from chestct.imaging.preprocess import Preprocess
from chestct.models.backends import convert, load_graph
from chestct.models.features import Kept, extract
from chestct.models.vgg16 import VGG16
from chestct.models.weights import PACKAGED, load_weights
from chestct.serving.predictor import Predictor

ROOT = Path(__file__).resolve().parent.parent
KERAS, EAGER, PRODUCT, LOOP = RIVALS = ("Keras", "PyTorch eager", "matrix product", "bare loop")
Row = dict[str, Any]
Work = Callable[[], Any]

EPOCHS = 20

PREDICT = """
import runpy, sys, time, numpy
from pathlib import Path
model = runpy.run_path(sys.argv[1])["build"](Path(sys.argv[2]))
image = numpy.random.rand(1, 224, 224, 3).astype("float32")
for line in sys.stdin:
    began = time.perf_counter()
    model.predict(image, verbose=0)
    print(time.perf_counter() - began, flush=True)
"""


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often: files under root/SPLIT/CLASS, with the settings that read them."""

    root: Path
    settings: tuple[str, ...]
    scratch: Path
    backends: tuple[str, ...]
    training: tuple[str, ...]  # backends that heads are trained with
    bundle: str
    answering: tuple[str, ...]  # backends of the bundle
    keras: str  # a Python that has TensorFlow
    baseline: str  # the recipe in Keras
    turns: int
    passes: int  # turns of what takes minutes
    slices: int  # of the batch command and the many clients

    def files(self, *splits: str) -> list[Path]:
        return sorted(file for split in splits for file in (self.root / split).rglob("*") if file.is_file())

    def run(self, *words: str) -> float:
        return timed(subprocess.run, [sys.executable, *words], cwd=self.scratch, stdout=-3, stderr=-3, check=True)


def timed(work: Callable[..., Any], *args: Any, **more: Any) -> float:
    began = time.perf_counter()
    work(*args, **more)
    return time.perf_counter() - began


def compared(what: str, unit: str, turns: int, contestants: Mapping[str, Work], rivals: tuple[str, ...]) -> list[Row]:
    """A row for each contestant that is no rival; each gives one value a turn. A rival that is not there has none."""
    every = [{name: run() for name, run in contestants.items()} for _ in range(turns)]
    values = {name: [turn[name] for turn in every] for name in contestants}
    against = {name: values.pop(name, []) for name in rivals}
    return [row(f"{what}{name}", unit, of, **against) for name, of in values.items()]


def row(what: str, unit: str, values: list[float], **against: list[float]) -> Row:
    return {"what": what, "unit": unit, "values": values, "against": against}


def features(plan: Plan) -> Iterator[Row]:
    net, rival = network()
    files = plan.files("train")[:32]
    squares = np.stack([Preprocess(224)(decode(file, WindowConfig()).gray) for file in files])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.conv5(torch.zeros(1, 1, 224, 224))
    flops, square = counter.get_total_flops(), torch.rand(2048, 2048)
    shown = lambda at: [torch.from_numpy(squares[at])[:, None] / 255]  # noqa: E731

    def rate(layer: Callable[[torch.Tensor], torch.Tensor]) -> float:
        cache = plan.scratch / "features"
        shutil.rmtree(cache, ignore_errors=True)
        kept = [Kept(layer, [*map(str, files)], cache)]
        return len(files) / timed(extract, kept, shown, torch.device("cpu"), batch_size=16)

    contestants: dict[str, Work] = {"torch": lambda: rate(net.pooled)}
    for name in plan.backends[1:]:
        graph = load_graph(name, convert(net, name, squares))
        contestants[name] = lambda graph=graph: rate(lambda x: net.pooled_map(graph(x)[1]))
    contestants[EAGER] = lambda: rate(lambda x: rival(x.expand(-1, 3, -1, -1).contiguous()).mean((2, 3)))
    contestants[PRODUCT] = lambda: 20 * 2 * 2048**3 / flops / timed(lambda: [square @ square for _ in range(20)])
    for run in contestants.values():
        run()  # the first pass is slower than the rest
    rows = compared("features, VGG16 at 224 pixels, ", "slices/s", plan.turns, contestants, (EAGER, PRODUCT))
    yield row("matrix product in fp32", "GFLOP/s", [v * flops / 1e9 for v in rows[0]["against"][PRODUCT]])
    yield from rows


def network() -> tuple[VGG16, torch.nn.Module]:
    """The network, and its convolutions as PyTorch would have them: NCHW."""
    net = VGG16(ModelConfig(), 1, 224, load_weights("oxford")).eval().requires_grad_(False)
    return net, copy.deepcopy(net.features).to(memory_format=torch.contiguous_format)


def training(plan: Plan) -> Iterator[Row]:
    slices, train = len(plan.files("train", "valid")), plan.files("train")
    more = ("data.views=0", f"trainer.max_epochs={EPOCHS}", "trainer.patience=0", "trainer.progress=false")

    def run(backend: str) -> float:
        shutil.rmtree(plan.scratch / "run", ignore_errors=True)
        settings = (*plan.settings, *more, f"features.backend={backend}", f"cache_dir=cache-{backend}")
        return plan.run(str(ROOT / "train.py"), "experiment=head", *settings, "hydra.run.dir=run")

    def cold(backend: str) -> float:
        shutil.rmtree(plan.scratch / f"cache-{backend}", ignore_errors=True)
        return run(backend)

    def eager() -> float:
        """Of all epochs, from 32 slices: each goes through the convolutions in each epoch."""
        head, x = torch.nn.Linear(512 * 49, 2), torch.rand(16, 3, 224, 224)
        optimiser, (_, convolutions) = torch.optim.SGD(head.parameters(), 0.01), network()

        def step() -> None:
            torch.nn.functional.cross_entropy(head(convolutions(x).flatten(1)), torch.zeros(16).long()).backward()
            optimiser.step()

        step()
        return (timed(step) + timed(step)) / 32 * slices * EPOCHS

    def keras() -> float:
        """Of all epochs, from one epoch of the recipe on at most 160 of the slices."""
        part = plan.scratch / "part"
        shutil.rmtree(part, ignore_errors=True)
        for i, file in enumerate(train[:: -(-len(train) // 160)]):
            (part / file.parent.name).mkdir(parents=True, exist_ok=True)
            (part / file.parent.name / f"{i}{file.suffix}").symlink_to(file)
        options = ["--images", str(part), "--weights", str(PACKAGED), "--epochs", "1"]
        found = json.loads(subprocess.check_output([plan.keras, plan.baseline, *options]).splitlines()[-1])
        return float(found["seconds_per_epoch"]) / found["images"] * slices * EPOCHS

    what, rivals = f"`train.py`, {EPOCHS} epochs of the head, {slices} slices, ", (KERAS, EAGER)
    others: dict[str, Work] = {EAGER: eager} | ({KERAS: keras} if plan.keras else {})
    contestants = {f"nothing cached, {name}": partial(cold, name) for name in plan.training}
    rows = compared(what, "s", plan.passes, contestants | others, rivals)
    warm = [run("torch") for _ in range(plan.turns)]
    yield from (*rows, row(f"{what}features cached", "s", warm, **rows[0]["against"]))


@dataclass
class Service:
    """`python serve.py` as a process."""

    port: int
    process: "subprocess.Popen[bytes]"
    began: float

    def ask(self, path: str, body: bytes | None = None) -> None:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        client.request("POST" if body else "GET", path, body)
        if (reply := client.getresponse()).status != 200:
            raise RuntimeError(f"{path}: {reply.status} {reply.read().decode()}")
        reply.read()

    def since_start(self, path: str, body: bytes | None = None) -> float:
        """Seconds from the command to the first answer."""
        while self.process.poll() is None:
            with contextlib.suppress(ConnectionError):
                self.ask(path, body)
                return time.perf_counter() - self.began
            time.sleep(0.02)
        raise RuntimeError("serve.py ended")


@contextlib.contextmanager
def service(plan: Plan, *settings: str) -> Iterator[Service]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    words = [sys.executable, str(ROOT / "serve.py"), f"bundle={plan.bundle}", f"serve.port={port}", *settings]
    began = time.perf_counter()
    with subprocess.Popen(words, cwd=plan.scratch, stdout=-3, stderr=-3) as process:
        try:
            yield Service(port, process, began)
        finally:
            process.terminate()


def answers(plan: Plan) -> Iterator[Row]:
    paths = plan.files("test", "train")[: 4 * plan.turns]
    files = itertools.cycle([path.read_bytes() for path in paths])
    predictors = {name: Predictor(plan.bundle, backend=name, accelerator="cpu") for name in plan.answering}
    (_, convolutions), picture = network(), torch.rand(1, 3, 224, 224)
    forward = {EAGER: lambda: timed(torch.no_grad()(convolutions), picture)}
    contestants = {name: lambda one=one: timed(one.predict, next(files)) for name, one in predictors.items()}
    yield from compared("one answer with heat map, in process, ", "s", len(paths), contestants | forward, (EAGER,))
    for name, one in predictors.items():
        square = one.bundle.preprocess(decode(paths[0], one.bundle.window).gray)[None]
        bare, whole = (partial(timed, one.bundle.predict, square, explain=explain) for explain in (False, True))
        added: Work = lambda bare=bare, whole=whole: 100 * (whole() / bare() - 1)  # noqa: E731
        yield from compared("explanation, on top of the pass without, ", "%", len(paths), {name: added}, ())

    with contextlib.ExitStack() as stack:
        contestants, rows = {}, []
        for name in plan.answering:
            one = stack.enter_context(service(plan, f"serve.backend={name}"))
            rows += [row(f"`serve.py`, /healthz answers, {name}", "s", [one.since_start("/healthz")])]
            asked = {"first answer, /predict?overlay=1": next(files), "the page, /": None}
            for what, body in asked.items():
                rows += [row(f"`serve.py`, {what}, {name}", "s", [one.since_start(what.split()[-1], body)])]
            contestants[name] = lambda one=one: timed(one.ask, "/predict?overlay=1", next(files))
        if plan.keras:
            words = [plan.keras, "-c", PREDICT, plan.baseline, str(PACKAGED)]
            keras: Any = stack.enter_context(
                subprocess.Popen(words, stdin=-1, stdout=-1, stderr=-3, text=True, bufsize=1)
            )
            contestants[KERAS] = lambda: (keras.stdin.write("go\n"), float(keras.stdout.readline()))[1]
            contestants[KERAS]()
        rows += compared("one answer with heat map, HTTP, ", "s", len(paths), contestants, (KERAS,))
    yield from rows

    quickest, requests = predictors[plan.answering[-1]], [next(files) for _ in range(plan.slices)]
    squares = np.stack([quickest.bundle.preprocess(decode(file, quickest.bundle.window).gray) for file in requests])
    limits = ("serve.queue_size=256", "serve.max_requests_per_address=256")
    with service(plan, f"serve.backend={quickest.backend}", *limits) as one, ThreadPoolExecutor(50) as clients:
        one.since_start("/predict", requests[0])
        at_once: Work = lambda: [*clients.map(lambda file: one.ask("/predict", file), requests)]  # noqa: E731
        pair: dict[str, Work] = {
            quickest.backend: lambda: plan.slices / timed(at_once),
            LOOP: lambda: plan.slices / timed(quickest.bundle.predict, squares),
        }
        yield from compared("50 clients at once, ", "slices/s", plan.passes, pair, (LOOP,))


def batch(plan: Plan) -> Iterator[Row]:
    table, folder = plan.scratch / "scores.csv", plan.scratch / "batch"
    folder.mkdir()
    for i, file in zip(range(plan.slices), itertools.cycle(plan.files("train", "valid")), strict=False):
        (folder / f"{i}{file.suffix}").symlink_to(file)
    first: dict[str, list[float]] = {name: [] for name in plan.answering}

    def run(name: str) -> float:
        table.unlink(missing_ok=True)
        words = ("-m", "chestct", "predict", str(folder), "--bundle", plan.bundle, "--out", table.name)
        with ThreadPoolExecutor(1) as pool:
            began, partial_table = time.perf_counter(), table.with_name(f"{table.name}.partial")
            whole = pool.submit(plan.run, *words, "--backend", name, "--accelerator", "cpu")
            while not whole.done() and not (partial_table.is_file() and partial_table.read_bytes().count(b"\n") > 1):
                time.sleep(0.02)
            first[name].append(time.perf_counter() - began)
            return plan.slices / whole.result()

    contestants = {name: partial(run, name) for name in plan.answering}
    yield from compared(f"`chestct predict`, {plan.slices} slices, ", "slices/s", plan.passes, contestants, ())
    for name, values in first.items():
        yield row(f"`chestct predict`, first row, {name}", "s", values)
