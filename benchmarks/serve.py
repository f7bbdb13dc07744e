"""What the service costs: its start, one client, fifty at once, and thousands one after the other.

    python -m benchmarks.serve [start] [latency] [load] [soak] [--keras PYTHON --baseline seed_baseline.py]

Starts `python serve.py` with the packaged bundle, as a process of its own on 127.0.0.1, for each part. Latency stands
beside Keras' bare `model.predict` on a VGG16, asked in turns, where --keras names a Python that has TensorFlow and
--baseline a file whose `build(weights)` makes the model. Exit status 1 where an answer was wrong.
"""

import argparse
import contextlib
import http.client
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from chestct.config.schema import PhantomConfig
from chestct.models.weights import PACKAGED
from chestct.phantom.thorax import display, draw

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("start", "latency", "load", "soak")

IDLE = 17
"""Seconds without a request before the memory of the service is read."""

Answer = tuple[int, dict[str, object]]


@dataclass
class Service:
    """`python serve.py` as a process. started: seconds until it was healthy; uploads: where its temporary files go."""

    port: int
    process: "subprocess.Popen[bytes]"
    uploads: Path
    started: float = 0.0

    def ask(self, body: bytes, query: str = "", client: http.client.HTTPConnection | None = None) -> Answer:
        client = client or http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        client.request("POST", f"/predict{query}", body)
        answer = client.getresponse()
        return answer.status, json.loads(answer.read())

    def get(self, path: str) -> tuple[int, str]:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        client.request("GET", path)
        answer = client.getresponse()
        return answer.status, answer.read().decode()

    def megabytes(self, which: str = "VmRSS") -> float:
        """Resident memory of the process: now, or with VmHWM the most that it ever was."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(which))


@contextlib.contextmanager
def service(*settings: str) -> Iterator[Service]:
    """A healthy service, ended with SIGTERM; raises RuntimeError unless it ends with 0 and leaves no file."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
        free.close()
        command = [sys.executable, str(ROOT / "serve.py"), f"serve.port={port}", *settings]
        began = time.perf_counter()
        environment = os.environ | {"TMPDIR": folder, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL)
        found = Service(port, process, Path(folder))
        try:
            while True:
                with contextlib.suppress(OSError):
                    if found.get("/healthz")[0] == 200:
                        break
                if process.poll() is not None or time.perf_counter() - began > 60:
                    raise RuntimeError("the service did not start")
                time.sleep(0.02)
            found.started = time.perf_counter() - began
            yield found
            process.send_signal(signal.SIGTERM)
            if process.wait(60) or list(found.uploads.iterdir()):
                raise RuntimeError(f"status {process.returncode}, left: {list(found.uploads.iterdir())}")
        finally:
            process.kill()
            process.wait()


def slices(count: int) -> list[bytes]:
    """Phantoms as PNG, all different."""
    found = []
    for seed in range(count):
        phantom = draw(np.random.default_rng(seed), ("normal", "large_cell")[seed % 2], PhantomConfig())
        file = io.BytesIO()
        Image.fromarray(display(phantom.hu, phantom.window)).save(file, "PNG")
        found.append(file.getvalue())
    return found


def photograph() -> bytes:
    file = io.BytesIO()
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(colours).resize((320, 240)).save(file, "JPEG")
    return file.getvalue()


def start(turns: int) -> None:
    """Seconds from the command to a healthy /healthz, and of the first answer, with its picture, after that."""
    file, times = slices(1)[0], []
    for _ in range(turns):
        with service() as running:
            began = time.perf_counter()
            assert running.ask(file, "?overlay=true")[0] == 200
            times.append((running.started, time.perf_counter() - began))
    for name, values in zip(("healthy after", "first answer"), zip(*times, strict=True), strict=True):
        print(f"  {name:16}{statistics.median(values):7.2f} s    ({', '.join(f'{value:.2f}' for value in values)})")


KERAS = """
import sys, time, runpy, numpy as np
from pathlib import Path
model = runpy.run_path(sys.argv[1])["build"](Path(sys.argv[2]))
image = np.random.rand(1, 224, 224, 3).astype("float32")
model.predict(image, verbose=0)
print("ready", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    model.predict(image, verbose=0)
    print(time.perf_counter() - began, flush=True)
"""


def latency(turns: int, keras: str, baseline: str) -> None:
    """Milliseconds of an answer with its overlay for one client, and of Keras' predict, in turns."""
    files = slices(turns)
    rival = None
    if keras:
        command = [keras, "-c", KERAS, baseline, str(PACKAGED)]
        rival = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True)
        assert rival.stdin
        assert rival.stdout
        assert rival.stdout.readline() == "ready\n"
    ours, theirs = [], []
    with service() as running:
        running.ask(files[0], "?overlay=true")
        for file in files:
            began = time.perf_counter()
            assert running.ask(file, "?overlay=true")[0] == 200
            ours.append(time.perf_counter() - began)
            if rival:
                print("go", file=rival.stdin, flush=True)
                theirs.append(float(rival.stdout.readline()))
    own = statistics.median(ours)
    print(f"  answer, overlay included  {1e3 * own:7.0f} ms   (90th percentile {1e3 * np.quantile(ours, 0.9):.0f})")
    if rival:
        rival.communicate()
        other = statistics.median(theirs)
        print(f"  Keras, predict alone      {1e3 * other:7.0f} ms   ratio {own / other:.2f}")


BARE = """
import sys, time, torch
from chestct.models.bundle import load_bundle
net = load_bundle("packaged").net
x = torch.rand(16, 1, net.size, net.size)
with torch.inference_mode():
    net(x)
    began = time.perf_counter()
    for _ in range(5):
        net(x)
print(5 * 16 / (time.perf_counter() - began))
"""


def bare() -> float:
    """Slices a second of a loop that does nothing but forward passes of 16 with the service's own network."""
    return float(subprocess.run([sys.executable, "-c", BARE], capture_output=True, check=True, cwd=ROOT).stdout)


class Mix:
    """Requests good and bad, in an order that a seed fixes, and what has to come back."""

    def __init__(self, running: Service, files: list[bytes], shares: dict[str, float], seed: int) -> None:
        self.running, self.files, self.shares = running, files, shares
        self.bodies = {"rubbish": b"no image at all", "cut": files[0][:3000], "empty": b"", "photo": photograph()}
        self.status = {"rubbish": 422, "cut": 422, "empty": 400}
        self.expected = [float(str(running.ask(file)[1]["score"])) for file in files]  # one at a time: the truth
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []

    def one(self, client: http.client.HTTPConnection) -> None:
        with self.lock:
            (kind,) = self.random.choices(list(self.shares), list(self.shares.values()))
            i = self.random.randrange(len(self.files))
            self.seen[kind] += 1
        status, told = self.running.ask(self.bodies.get(kind, self.files[i]), client=client)
        if kind == "slice":
            good = status == 200 and abs(float(str(told["score"])) - self.expected[i]) < 1e-4
        elif kind == "photo":
            good = status == 200 and told["decision"] == "refused"
        else:
            good = status == self.status[kind]
        if not good:
            self.wrong.append(f"{kind}: {status} {str(told)[:200]}")

    def run(self, clients: int, requests: int) -> float:
        """Seconds that `clients` at once take for `requests` each."""

        def client(_: int) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self.running.port, timeout=300)
            for _ in range(requests):
                self.one(connection)

        began = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, range(clients)))
        return time.perf_counter() - began

    def tell(self, seconds: float) -> None:
        sent = ", ".join(f"{count} {kind}" for kind, count in self.seen.most_common())
        print(f"  {self.seen.total():,} requests in {seconds:.0f} s: {sent}; {len(self.wrong)} answered wrong")
        for line in self.wrong[:5]:
            print(f"    {line}")


SHARES = {"slice": 0.8, "photo": 0.05, "rubbish": 0.05, "cut": 0.05, "empty": 0.05}
SOAK = {"slice": 0.08, "photo": 0.02, "rubbish": 0.3, "cut": 0.3, "empty": 0.3}


def load(clients: int, requests: int) -> bool:
    """Many clients at once: what came back wrong, memory, and slices a second beside a bare loop of forward passes."""
    before = bare()
    with service("serve.queue_size=256", "serve.max_requests_per_address=256") as running:
        mix = Mix(running, slices(40), SHARES, seed=0)
        mix.run(clients, 2)  # warm
        mix.seen.clear()
        time.sleep(IDLE)
        idle, most = running.megabytes(), running.megabytes("VmHWM")
        seconds = mix.run(clients, requests)
        time.sleep(IDLE)
        grown, higher = running.megabytes() - idle, running.megabytes("VmHWM") - most
    rate = (mix.seen["slice"] + mix.seen["photo"]) / seconds
    loop = (before + bare()) / 2
    mix.tell(seconds)
    print(
        f"  memory after warming up: idle {idle:.0f} MB, at most {most:.0f} MB; then {grown:+.0f} and {higher:+.0f} MB"
    )
    print(f"  slices a second {rate:.2f}, in a bare loop of forward passes {loop:.2f}: ratio {rate / loop:.2f}")
    return not mix.wrong


def soak(requests: int) -> bool:
    """Requests of four clients, mostly bad ones, which cost no forward pass; files left behind are an error."""
    with service() as running:
        mix = Mix(running, slices(40), SOAK, seed=1)
        mix.run(4, 50)
        mix.seen.clear()
        memory, seconds = [running.megabytes()], 0.0
        for _ in range(10):
            seconds += mix.run(4, requests // 40)
            memory.append(running.megabytes())
    mix.tell(seconds)
    print(f"  memory after each tenth: {', '.join(f'{megabytes:.0f}' for megabytes in memory)} MB")
    return not mix.wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all but soak")
    parser.add_argument("--turns", type=int, default=3, help="starts, and tens of answers for the latency")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=20, help="of each client")
    parser.add_argument("--soak", type=int, default=10_000, metavar="REQUESTS")
    parser.add_argument("--keras", default="", metavar="PYTHON", help="a Python that has TensorFlow")
    parser.add_argument("--baseline", default="../shared/tools/seed_baseline.py", help="builds Keras' model")
    asked = parser.parse_args()
    good = True
    for part in asked.parts or PARTS[:-1]:
        print(part, flush=True)
        if part == "start":
            start(asked.turns)
        elif part == "latency":
            latency(10 * asked.turns, asked.keras, asked.baseline)
        elif part == "load":
            good &= load(asked.clients, asked.requests)
        else:
            good &= soak(asked.soak)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
