"""What several test folders share: small phantoms on disk, and settings that make a run take a second."""

import contextlib
import copy
import functools
import io
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from filelock import FileLock

from chestct.cli import main
from chestct.config.compose import compose
from chestct.config.schema import Config, ModelConfig, PhantomConfig
from chestct.data import duplicates
from chestct.data.datamodule import SliceModule
from chestct.models import bundle, lightning_module
from chestct.models.vgg16 import VGG16
from chestct.models.weights import Weights, load_weights

Met = TypeVar("Met")
Slices = Callable[..., dict[str, bytes]]

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# Whoever imports absl (mlcroissant; OpenVINO's converter, where absl is installed) gives logging a handler that closes
# the stream it found, pytest's own, as soon as Hydra sets up logging anew in the same process.
with contextlib.suppress(ImportError):
    import absl.logging

    absl.logging.get_absl_handler().python_handler.setStream(sys.__stderr__)

REAL = Path(__file__).parents[2] / "shared" / "data"
"""Real slices, where the machine has them (see README, "Data")."""

SMALL = ("experiment=head", "data.size=64", "trainer.max_epochs=3", "trainer.progress=false", "tracking=off")
SMALL += ("data.batch_size=8",)
"""Overrides for quick runs of the plain head, which takes part in whatever is not about another: at 64 pixels VGG16's
last map is 2 x 2, and a slice takes a hundredth of the time."""


CHANGES = duplicates.CHANGES


@functools.cache
def oxford() -> Weights:
    """The packaged weights, laid out in memory as networks want them, which would do that once in each test."""
    weights = load_weights("oxford")
    layout = torch.channels_last
    tensors = {name: x.contiguous(memory_format=layout) if x.ndim == 4 else x for name, x in weights.tensors.items()}
    return replace(weights, tensors=tensors)


def read_once(name: str, backbone: str = "vgg16") -> Weights:
    """`load_weights`, which hashes and converts 29 MB; a copy, for networks keep the tensors and train them."""
    return copy.deepcopy(oxford()) if (name, backbone) == ("oxford", "vgg16") else load_weights(name, backbone)


def network(outputs: int = 1, size: int = 64, **model: Any) -> VGG16:
    """A frozen network with a head that has learned nothing, the same each time, in eval mode."""
    torch.manual_seed(0)
    net = VGG16(ModelConfig(**model), outputs, size, read_once("oxford")).eval()
    net.set_frozen(True)
    return net


def opened(cfg: Config) -> SliceModule:
    """The data of these settings, set up."""
    data = SliceModule(cfg)
    data.prepare_data()
    data.setup()
    return data


class Trap:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code ran')",)


def command(*arguments: object) -> int:
    """The exit status of `chestct ARGUMENTS`, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["chestct", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    return int(stop.value.code or 0)


def until(
    condition: Callable[[], Met],
    seconds: float = 20.0,
    process: subprocess.Popen | None = None,
    log: Path | None = None,
    every: float = 0.02,
) -> Met:
    """What `condition` gives as soon as that is true, which another thread or process brings about.

    The test fails after so many seconds, or when the process has ended, with what that printed, or wrote to `log`.
    """
    deadline = time.monotonic() + seconds
    while not (met := condition()):
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline:
            said = log.read_text()[-3000:] if log else process.communicate() if ended else ""
            pytest.fail(f"{'the process has ended' if ended else f'not within {seconds} s'}: {said}")
        time.sleep(every)
    return met


@contextlib.contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    """This process with another limit, one of resource.RLIMIT_*."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process logs to that test's streams, which are closed when others log."""
    root, ours = logging.getLogger(), logging.getLogger("chestct")
    handlers, level = root.handlers[:], ours.level
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    ours.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def _quick() -> Iterator[None]:
    """What most tests need and few are about takes a fraction of its time: weights, and descriptors of slices, which
    are learned from few changed copies, however few the slices are.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "CHANGES", 64)
        patch.setattr(bundle, "load_weights", read_once)
        patch.setattr(lightning_module, "load_weights", read_once)
        yield


@pytest.fixture(scope="module")
def thorough_ingest() -> Iterator[None]:
    """Descriptors as users get them, for tests of near-copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "CHANGES", CHANGES)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what all processes of the tests use, each piece made by the first that needs it."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def phantoms(shared: Path) -> Path:
    """Root of 60 small phantoms in train/valid/test folders, easy to tell apart. Read only."""
    from chestct.phantom.dataset import write

    write(shared / "phantoms", PhantomConfig(slices=60, size=96, difficulty=0.0))
    return shared / "phantoms"


@pytest.fixture(scope="session")
def cache(shared: Path) -> Path:
    """Cache folder of the session: features and stores of the small phantoms are computed once."""
    return shared / "cache"


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a head that has learned nothing, for slices of 32 pixels. Read only."""
    from tests.models.test_bundle import make

    folder = tmp_path_factory.mktemp("bundles") / "small"
    make(folder)
    return folder


@pytest.fixture(scope="session")
def bundle_folder(shared: Path, phantoms: Path) -> Path:
    """A bundle for cancer or normal, whose head was fitted to the phantoms. Read only."""
    from tests.serving.conftest import make_bundle

    with FileLock(shared / "served.lock"):
        if not (shared / "served").exists():
            make_bundle(shared / "served", phantoms)
    return shared / "served"


@pytest.fixture(scope="session")
def served(bundle_folder: Path) -> Iterator[Any]:
    """The service with that bundle, for all tests that change nothing in it."""
    from tests.serving.conftest import serving

    limits = {"max_upload_bytes": 3_000_000, "max_slices": 20}
    with serving(bundle_folder, host="2001:db8::1", **limits) as running:  # which is what it is told, and listens here
        yield running


@pytest.fixture(scope="session")
def files(phantoms: Path) -> list[bytes]:
    """Six slices as PNG, all different."""
    return [path.read_bytes() for path in sorted(phantoms.glob("test/*/*.png"))[::2][:6]]


@pytest.fixture(scope="session")
def examples() -> dict[str, bytes]:
    """The page's own examples by file name; the phantoms as DICOM."""
    from pydicom.uid import generate_uid

    from chestct.phantom.thorax import draw
    from chestct.serving.examples import PHANTOMS, make_examples
    from tests.imaging.files import dicom

    files = {example.name: example.data for example in make_examples()}
    for name, (_, kind, difficulty, seed) in PHANTOMS.items():
        phantom = draw(np.random.default_rng(seed), kind, PhantomConfig(difficulty=difficulty, size=384))
        elements = {
            "PatientID": f"PHANTOM-{seed}",
            "PatientName": "PHANTOM",
            "SOPInstanceUID": generate_uid(entropy_srcs=[name]),
            "ImagePositionPatient": [0, 0, 0],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [round(phantom.spacing, 5)] * 2,
            "InstanceNumber": 1,
        }
        stored = (np.round(phantom.hu) + 1024).astype(np.int16)
        files[name.replace(".png", ".dcm")] = dicom(stored, **elements)
    return files


@pytest.fixture
def scan(examples: dict[str, bytes]) -> Slices:
    """scan(n, uid, **elements): n slices as DICOM; names run against the positions, and numbers mislead."""
    import pydicom
    from pydicom.uid import generate_uid

    from chestct.serving.examples import PHANTOMS

    def make(count: int = 8, uid: str = "1.2.3", **elements: object) -> dict[str, bytes]:
        files = {}
        for i in range(count):
            dataset = pydicom.dcmread(io.BytesIO(examples[list(PHANTOMS)[i % len(PHANTOMS)].replace(".png", ".dcm")]))
            dataset.SeriesInstanceUID, dataset.SOPInstanceUID = uid, generate_uid(entropy_srcs=[uid, str(i)])
            dataset.ImagePositionPatient, dataset.InstanceNumber = [0, 0, 5.0 * i - 20], (7 * i) % count + 1
            for name, value in elements.items():
                setattr(dataset, name, value)
            file = io.BytesIO()
            dataset.save_as(file)
            files[f"{uid}/IM{count - i:03}"] = file.getvalue()
        return files

    return make


@pytest.fixture(scope="session")
def empty_store(shared: Path) -> Path:
    """MLflow takes seconds to make a store, and none to open a copy of one."""
    from chestct.tracking.stores import prepare

    prepare(f"sqlite:///{shared}/empty.db")
    return shared / "empty.db"


@pytest.fixture(scope="session")
def small(phantoms: Path, cache: Path):
    """small(*overrides) -> Config of a quick run on the small phantoms."""
    composed = functools.cache(compose)  # Hydra takes a tenth of a second

    def make(*overrides: str) -> Config:
        return copy.deepcopy(composed(*SMALL, f"data.root={phantoms}", f"cache_dir={cache}", *overrides))

    return make


def real(name: str) -> Path:
    """Folder of real data; skips the test where it is not there."""
    if not (REAL / name).is_dir():
        pytest.skip(f"needs the real data in {Path('..') / 'shared' / 'data' / name}, which is never committed")
    return REAL / name
