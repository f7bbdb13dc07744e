"""A bundle made from the small phantoms, with everything that the page shows, and a service that runs on it."""

import contextlib
import csv
import io
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

import chestct
from chestct.config.schema import Config, EvaluationConfig, WindowConfig
from chestct.config.schema_serving import ServeConfig
from chestct.imaging.decode import decode
from chestct.imaging.preprocess import Preprocess
from chestct.models.bundle import Bundle, save_bundle
from chestct.models.novelty import fit_novelty
from chestct.models.operating_point import OperatingPoint
from chestct.models.saliency import normal_cam
from chestct.serving.model import Model
from chestct.serving.predictor import Predictor
from chestct.serving.server import PatientServer, bind, make_server, predictor_for, running, upload_folder
from tests.conftest import command, network
from tests.models.test_bundle import make

SIZE = 64

CARD = """# Model card
- **Few**: of them

## What it is for
Trying things out.

| held out | threshold | sensitivity | specificity | answered | sensitivity of these | specificity of these | ECE |
|---|---|---|---|---|---|---|---|
| here | 0.404 | 0.813 [0.765, 0.853] | 0.939 [0.824, 0.981] | 0.681 | 0.856 [0.801, 0.897] | 1 | 0.2 [0.1, 0.3] |

## Limits
- It has only seen **phantoms**.
- <script>alert(1)</script> is not run.
"""


def make_bundle(folder: Path, phantoms: Path, classes: int = 2) -> None:
    """Fits a head on mean-pooled features of phantoms, by ridge regression. classes: 2 or 4."""
    paths = [path for path in sorted(phantoms.glob("*/*/*.png")) if path.parts[-3] != "masks"]
    preprocess = Preprocess(SIZE, "pad")
    squares = np.stack([preprocess(decode(path, WindowConfig()).gray) for path in paths])
    facts = make(folder, classes=classes).facts | {"preprocess": {"size": SIZE, "fit": "pad"}}
    names, outputs = facts["classes"], 1 if classes == 2 else classes
    targets = np.array([names.index(name) if name in names else 1 for name in (path.parent.name for path in paths)])
    net = network(outputs, SIZE)
    with torch.no_grad():
        conv5 = net.conv5(next(net.batches(squares, len(squares))))
        maps = net.pool(conv5)
        pooled = net.channel_means(maps)
        ridge = Ridge(alpha=0.3 * float(pooled.var(0).sum()))
        ridge.fit(pooled.numpy(), (6 * np.eye(classes)[targets] - 3)[:, -outputs:])
        linear = next(layer for layer in net.head if isinstance(layer, torch.nn.Linear))
        linear.weight.copy_(torch.from_numpy(ridge.coef_.reshape(outputs, -1)))
        linear.bias.copy_(torch.from_numpy(np.atleast_1d(ridge.intercept_)))
        logits, baseline = net.head(maps).numpy(), normal_cam(net, conv5)
    point = OperatingPoint.fit(logits, targets, EvaluationConfig())
    save_bundle(folder, Bundle(net, point, fit_novelty(pooled, pooled), baseline, facts, CARD))


@pytest.fixture(scope="session")
def model(bundle_folder: Path) -> Model:
    """The same in Python."""
    return chestct.load(str(bundle_folder))


@dataclass
class Served:
    """A service that runs in a thread of this process."""

    url: str
    uploads: Path
    predictor: Predictor
    server: PatientServer

    def left(self) -> list[Path]:
        """What lies in the upload folder, but for one that Gradio makes anew for every service of this process."""
        return [path for path in self.uploads.iterdir() if path.name != "vibe_edit_history"]


@contextlib.contextmanager
def serving(bundle: Path, on_answer=None, login=b"", loading=None, **settings) -> Iterator[Served]:
    """settings: of ServeConfig; loading: what gives the server its predictor, by default one that has it."""
    cfg = Config(bundle=str(bundle), serve=ServeConfig(**settings))
    listening = bind("127.0.0.1", 0)
    with mock.patch.dict(os.environ), upload_folder() as uploads:  # Gradio looks there for the folder of uploads
        predictor = predictor_for(cfg, str(bundle))
        if loading is None:
            loading = Future()
            loading.set_result(predictor)
        with running(server := make_server(cfg, loading, uploads, on_answer, login), listening):
            yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", uploads, predictor, server)


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", compression) as made:
        for name, data in files.items():
            made.writestr(name, data)
    return archive.getvalue()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def call(small_bundle):
    """call(*arguments): the exit status of `chestct predict`, with a small bundle unless one is given."""
    return lambda *given: command("predict", *given, *(() if "--bundle" in given else ("--bundle", small_bundle)))
