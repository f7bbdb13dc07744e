"""What must stand before slices can be loaded: phantoms drawn where they are the source, files decoded into a store."""

import dataclasses
from pathlib import Path

from chestct.config.schema import Config, DataConfig
from chestct.data.ingest import ingest
from chestct.data.store import Store, store_folder
from chestct.files import json_digest


def prepare_store(cfg: Config, progress: bool = False) -> Store:
    """Brings everything up to date and opens the store; cheap where nothing changed. Raises DataError."""
    data = located(cfg)
    if draws_phantoms(cfg.data):
        from chestct.phantom.dataset import write

        write(Path(data.root or ""), cfg.data.phantom, progress)
    return ingest(data, store_folder(data, cfg.cache), progress)


def prepared_folder(cfg: Config) -> Path:
    """Where `prepare_store` put the store."""
    return store_folder(located(cfg), cfg.cache)


def draws_phantoms(data: DataConfig) -> bool:
    """Whether the source is phantoms that nobody has placed anywhere yet."""
    return data.name == "phantom" and not data.root and not data.sources


def is_synthetic(data: DataConfig) -> bool:
    """Whether any slice is a phantom: what a model reaches on them says nothing about patients."""
    return "phantom" in (data.sources or [data.name])


def located(cfg: Config) -> DataConfig:
    """The data settings with the root of drawn phantoms filled in: a folder named by their settings."""
    if not draws_phantoms(cfg.data):
        return cfg.data
    drawn = cfg.cache / "phantom" / json_digest(dataclasses.asdict(cfg.data.phantom))[:12]
    return dataclasses.replace(cfg.data, root=str(drawn))
