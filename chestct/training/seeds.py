"""The same training with several seeds: how far a result depends on the draw of weights, order and views."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from chestct.config.schema import Config
from chestct.errors import ConfigError
from chestct.files import write_atomic


def train_seeds(cfg: Config, out: Path, train: Callable[[Config, Path], dict[str, float]]) -> pd.DataFrame:
    """Trains with cfg.seeds seeds from cfg.seed on, each in a folder of its own below `out`; writes seeds.csv there.

    train: (settings, folder) -> metrics. Returns one row a metric with `mean` and `sd` (n - 1 in the denominator); all
    seeds share one split, see data.split_seed. Raises ConfigError for a checkpoint to go on from.
    """
    if cfg.ckpt:
        raise ConfigError("seeds=N starts N trainings anew; leave out ckpt, or go on with one of them.")
    rows = {}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        rows[seed] = train(dataclasses.replace(cfg, seed=seed, seeds=1), out / f"seed-{seed}")
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("seed")
        write_atomic(out / "seeds.csv", table.to_csv())
    return pd.DataFrame({"mean": table.mean(), "sd": table.std(ddof=1)})
