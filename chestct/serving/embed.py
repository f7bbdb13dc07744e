"""Features of any folder of slices as a Parquet file: `chestct embed`. The convolutions that answer also describe."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import torch
from pyarrow import parquet

from chestct.config.schema import ModelConfig
from chestct.errors import ConfigError, DataError, DecodeError
from chestct.files import digest, whole
from chestct.imaging.decode import decode, read
from chestct.imaging.slice import pixel_hash
from chestct.imaging.slice_files import File
from chestct.models.bundle import Bundle, load_bundle
from chestct.models.vgg16 import VGG16
from chestct.models.weights import load_weights
from chestct.serving.batch import THREADS

BATCH = 64
"""Slices in memory at once, and rows of a row group."""

SHOWN = 10
"""Unreadable files that are told of by name."""


@torch.no_grad()
def embed(files: Sequence[File], out: Path, source: str, block: str, pool: str, accelerator: str) -> list[str]:
    """Writes the features of `files`, one row each, whole or not at all; returns a sentence for each unreadable file.

    source: the bundle whose preprocessing and convolutions are used; block: of VGG16, 3 to 5 or several joined as in
    model.block, for a bundle on the packaged convolutions; "" is the bundle's own; pool: over the places of the map.
    accelerator: where it computes, as `load_bundle` takes it.

    Columns: path, file_hash (SHA-256 of the bytes), content (`pixel_hash`, the same for lossless copies), features
    (float32 [C], or [2 C] for mean+max). The metadata of the schema say how they were made. Raises ConfigError,
    BundleError and OSError, and DataError where no file can be read.
    """
    bundle = load_bundle(source, "torch", accelerator)
    net = _network(bundle, block).to(bundle.net.mean.device)
    about = {"bundle": bundle.id, "weights": net.digest, "block": "+".join(map(str, net.blocks)), "pool": pool}
    about |= {"preprocess": bundle.facts["preprocess"], "window": bundle.facts["window"]}
    width = net.channels * len(pool.split("+"))
    fields = [(name, pyarrow.string()) for name in ("path", "file_hash", "content")]
    schema = pyarrow.schema([*fields, ("features", pyarrow.list_(pyarrow.float32(), width))])
    schema = schema.with_metadata({"chestct": json.dumps(about)})
    unread: list[str] = []

    def prepare(file: File) -> tuple[str, str, str, np.ndarray] | None:
        try:
            data = read(file)
            decoded = decode(data, bundle.window, name=str(file))
            name = str(file).encode("utf-8", "backslashreplace").decode()  # Parquet takes UTF-8 alone
            return name, digest(data), pixel_hash(decoded.levels), bundle.preprocess(decoded.gray)
        except DecodeError as error:
            unread.append(str(error))
            return None

    with whole(Path(os.path.realpath(out))) as part:  # a link stays one
        with parquet.ParquetWriter(part, schema) as writer, ThreadPoolExecutor(THREADS) as threads:
            for at in range(0, len(files), BATCH):
                rows = [row for row in threads.map(prepare, files[at : at + BATCH]) if row]
                if rows:
                    maps = [net.maps(x) for x in net.batches(np.stack([row[3] for row in rows]))]
                    pooled = torch.cat([_pooled(one, pool) for one in maps]).float().cpu().numpy()
                    columns = [*([row[i] for row in rows] for i in range(3)), list(pooled)]
                    writer.write_table(pyarrow.table(dict(zip(schema.names, columns, strict=True)), schema))
        if len(unread) == len(files):
            raise DataError("\n".join([f"No file can be read, so {out} is not written.", *unread[:SHOWN]]))
    return unread


def _network(bundle: Bundle, block: str) -> VGG16:
    if not block:
        return bundle.net
    if not bundle.facts["weights"]["packaged"]:
        raise ConfigError("This bundle has convolutions of its own, up to the block that it uses. Leave out --block.")
    return VGG16(ModelConfig(block=block), 1, bundle.preprocess.size, load_weights("oxford")).eval()


def _pooled(maps: torch.Tensor, pool: str) -> torch.Tensor:
    """[B, C, h, w] -> [B, C] for each part of `pool`, one after another."""
    parts = {"mean": lambda: maps.mean((2, 3)), "max": lambda: maps.amax((2, 3))}
    return torch.cat([parts[name]() for name in pool.split("+")], 1)
