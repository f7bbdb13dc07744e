"""Small made-up manifests: every statistic is independent of the label until a test ties one to it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from chestct.audit import shortcuts, stage
from chestct.audit.findings import Audit
from chestct.config.schema import Config, DataConfig
from chestct.data.store import Store, record_type
from chestct.errors import DataError


class Data(Store):
    """A store that was never written, with its splits."""

    splits: dict[str, pd.Series]


def make(n: int = 200, seed: int = 0, cancer: float = 0.6) -> Data:
    """n different slices in n groups; 60 % train, 15 % valid, 25 % test under the one policy `grouped`."""
    rng = np.random.default_rng(seed)
    is_cancer = rng.random(n) < cancer
    manifest = pd.DataFrame(
        {
            "path": [f"train/{'cancer' if y else 'normal'}/slice_{i}.png" for i, y in enumerate(is_cancer)],
            "source": "made_up",
            "folder_split": "",
            "subtype": np.where(is_cancer, rng.choice(["adenocarcinoma", "large_cell", "squamous"], n), "normal"),
            "label": np.where(is_cancer, "cancer", "normal"),
            "content": [f"content {i}" for i in range(n)],
            "file_hash": [f"file {i}" for i in range(n)],
            "row": np.arange(n),
            "width": rng.integers(300, 340, n),
            "height": rng.integers(260, 300, n),
            "mode": rng.choice(["L", "RGBA"], n),
            "format": "PNG",
            "bytes": rng.integers(50_000, 60_000, n),
            "group": np.arange(n),
        }
    )
    for name in ("mean", "std", "border_mean", "border_std"):
        manifest[name] = rng.uniform(0.2, 0.4, n)
    slices = np.zeros(n, record_type(40))
    slices["image"] = rng.integers(0, 256, (n, 40, 40), dtype=np.uint8)
    pairs = pd.DataFrame({"a": [], "b": [], "similarity": [], "kind": []}).astype({"a": int, "b": int, "kind": object})
    data = Data(Path("nowhere"), manifest, pairs, slices, {}, "", [], [], [], [])
    data.splits = {"grouped": pd.Series(rng.choice(["train", "valid", "test"], n, p=[0.6, 0.15, 0.25]))}
    return data


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Fewer resamples and trees: what the tests plant is visible without precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shortcuts, "RESAMPLES", 400)
        patch.setattr(shortcuts, "TREES", 10)
        yield


@pytest.fixture(scope="session")
def make_data() -> Callable[..., Data]:
    return make


def run(data: Data, split: str = "grouped") -> Audit:
    """The audit of made-up slices under the splits that come with them."""

    def made_up(manifest: pd.DataFrame, task: str, cfg: DataConfig, *, check: bool = True) -> pd.Series:
        if cfg.split not in data.splits:
            raise DataError("The folders do not admit it.")
        return data.splits[cfg.split]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "make_splits", made_up)
        return stage.audit_store(Config(data=DataConfig(name="made_up", split=split)), data)


@pytest.fixture(scope="session")
def faulty(make_data: Callable[..., Data]) -> Data:
    """Slice 1 is a copy of slice 0 across splits with another label; slice 2 is nearly slice 3; one file is broken."""
    data = make_data(120)
    data.manifest.loc[1, ["content", "row", "group"]] = data.manifest.loc[0, ["content", "row", "group"]]
    data.manifest.loc[3, "group"] = 2
    data.manifest.loc[[0, 1], "label"] = data.manifest.loc[[0, 1], "subtype"] = ["normal", "cancer"]
    data.manifest.loc[2, "path"] = "train/<script>alert('x')</script>.png"
    official = data.splits["grouped"].copy()
    official[:4] = ["train", "test", "train", "test"]
    data.splits["official"] = official
    data.splits["grouped"][:4] = ["train", "train", "test", "test"]
    data.pairs = pd.DataFrame({"a": [0, 2], "b": [1, 3], "similarity": [1.0, 0.996], "kind": ["exact", "near"]})
    data.unreadable = [{"source": "s", "path": "<b>broken</b>.png", "reason": "truncated & short"}]
    return data


@pytest.fixture(scope="module")
def official(faulty: Data) -> Audit:
    return run(faulty, "official")
