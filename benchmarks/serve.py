"""What the service costs: its start, one client, and fifty at once: `python -m benchmarks.serve [--keras PYTHON]`.

Starts `python serve.py` with the packaged bundle as a process of its own. Latency stands beside Keras' bare
`model.predict` on a VGG16, asked in turns, where --keras names a Python that has TensorFlow and --baseline a file whose
`build(weights)` makes the model. Exit status 1 where an answer was wrong.
"""

import argparse
import contextlib
import http.client
import io
import json
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
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


@dataclass
class Service:
    """`python serve.py` as a process. started: seconds until it was healthy."""

    port: int
    process: "subprocess.Popen[bytes]"
    started: float = 0.0

    def ask(self, body: bytes, query: str = "") -> tuple[int, dict[str, object]]:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        client.request("POST", f"/predict{query}", body)
        answer = client.getresponse()
        return answer.status, json.loads(answer.read())


@contextlib.contextmanager
def service(*settings: str) -> Iterator[Service]:
    """A healthy service, ended with SIGTERM; it has to end with 0 and leave no file."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
        free.close()
        environment = os.environ | {"TMPDIR": folder, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "serve.py"), f"serve.port={port}", *settings]
        began = time.perf_counter()
        running = Service(port, subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL))
        try:
            while running.process.poll() is None:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz"):
                    break
                time.sleep(0.02)
            running.started = time.perf_counter() - began
            yield running
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(60) == 0
            assert not list(Path(folder).iterdir())
        finally:
            running.process.kill()
            running.process.wait()


def slices(count: int) -> list[bytes]:
    """Phantoms as PNG, all different."""
    files = []
    for seed in range(count):
        phantom = draw(np.random.default_rng(seed), ("normal", "large_cell")[seed % 2], PhantomConfig())
        file = io.BytesIO()
        Image.fromarray(display(phantom.hu, phantom.window)).save(file, "PNG")
        files.append(file.getvalue())
    return files


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
    """Seconds of the start and of an answer with its overlay for one client; Keras' predict in turns with it."""
    command = [keras, "-c", KERAS, baseline, str(PACKAGED)]
    rival = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True) if keras else None
    if rival and rival.stdout:
        rival.stdout.readline()
    ours, theirs = [], []
    with service() as running:
        for file in slices(turns + 1):
            began = time.perf_counter()
            assert running.ask(file, "?overlay=true")[0] == 200
            ours.append(time.perf_counter() - began)
            if rival and rival.stdout:
                print("go", file=rival.stdin, flush=True)
                theirs.append(float(rival.stdout.readline()))
    own = statistics.median(ours[1:])
    print(f"healthy after {running.started:.2f} s, first answer {ours[0]:.2f} s, later ones {1e3 * own:.0f} ms")
    if rival:
        rival.communicate()
        print(f"Keras, predict alone {1e3 * statistics.median(theirs):.0f} ms: {own / statistics.median(theirs):.2f}")


def load(clients: int, requests: int) -> int:
    """Many clients at once, a fifth of their files bad: slices a second, memory, and how many answers were wrong."""
    files = slices(20)
    bad = {b"no image at all": 422, files[0][:3000]: 422, b"": 400}
    with service("serve.queue_size=256", "serve.max_requests_per_address=256") as running:
        expected = {file: float(str(running.ask(file)[1]["score"])) for file in files}  # one at a time: the truth

        def client(seed: int) -> int:
            drawn, wrong = random.Random(seed), 0
            for _ in range(requests):
                file = drawn.choice(files if drawn.random() < 0.8 else list(bad))
                status, answer = running.ask(file)
                if status != bad.get(file, 200):
                    wrong += 1
                elif status == 200:
                    wrong += abs(float(str(answer["score"])) - expected[file]) > 1e-4
            return wrong

        began = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            wrong = sum(pool.map(client, range(clients)))
        rate = clients * requests / (time.perf_counter() - began)
    megabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{clients} clients: {rate:.1f} answers a second, {wrong} wrong; at most {megabytes:.0f} MB")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=30, help="answers for the latency")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=20, help="of each client")
    parser.add_argument("--keras", default="", metavar="PYTHON", help="a Python that has TensorFlow")
    parser.add_argument("--baseline", default="../shared/tools/seed_baseline.py", help="builds Keras' model")
    given = parser.parse_args()
    latency(given.turns, given.keras, given.baseline)
    return min(1, load(given.clients, given.requests))


if __name__ == "__main__":
    sys.exit(main())
