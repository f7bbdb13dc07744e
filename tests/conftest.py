"""What several test folders share: small phantoms on disk, and settings that make a run take a second."""

import contextlib
import copy
import functools
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chestct.cli import main
from chestct.config.compose import compose
from chestct.config.schema import Config, ModelConfig, PhantomConfig
from chestct.data.datamodule import SliceDataset, SliceModule
from chestct.models.vgg16 import VGG16
from chestct.models.weights import load_weights

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


def network(outputs: int = 1, size: int = 64, **model: Any) -> VGG16:
    """A frozen network with a head that has learned nothing, the same each time, in eval mode."""
    torch.manual_seed(0)
    net = VGG16(ModelConfig(**model), outputs, size, load_weights("oxford")).eval()
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


def in_view(dataset: SliceDataset, view: int, positions: list[int]) -> dict[str, torch.Tensor]:
    """A batch of slices as training sees them in one view; its own batches mix them."""
    views = dataset.cfg.data.views + 1
    parts = [dataset[(view - at) % views, [at]] for at in positions]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def command(*arguments: object) -> int:
    """The exit status of `chestct ARGUMENTS`, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["chestct", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    return int(stop.value.code or 0)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process logs to that test's streams, which are closed when others log."""
    root, ours = logging.getLogger(), logging.getLogger("chestct")
    handlers, level = root.handlers[:], ours.level
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    ours.setLevel(level)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of 60 small phantoms in train/valid/test folders, easy to tell apart. Read only."""
    from chestct.phantom.dataset import write

    root = tmp_path_factory.mktemp("phantoms") / "set"
    write(root, PhantomConfig(slices=60, size=96, difficulty=0.0))
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache folder of the session: features and stores of the small phantoms are computed once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a head that has learned nothing, for slices of 32 pixels. Read only."""
    from tests.models.test_bundle import make

    folder = tmp_path_factory.mktemp("bundles") / "small"
    make(folder)
    return folder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to make a store, and none to open a copy of one."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "empty.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


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
