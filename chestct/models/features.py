"""Frozen features: while the convolutions do not change, they run once per view and their outputs are kept on disk.

A cache folder belongs to one feature space (weights, preprocessing, view settings) and holds shards: safetensors files
of some hundred slices with a checksum, each written whole or not at all. A killed run loses one shard at most, and
several processes can write at once; a damaged shard is never believed.
"""

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from chestct.config.schema import Config
from chestct.data.datamodule import SliceModule
from chestct.data.store import preprocess_of
from chestct.files import digest, json_digest, write_atomic
from chestct.models.vgg16 import VGG16

SHARD = 256
"""Slices a shard: what a killed run has to compute again."""

FORMAT = 2
"""Version of shards and of how views are made; part of the name of a cache folder."""


def attach(data: SliceModule, net: VGG16, cfg: Config, splits: Sequence[str]) -> None:
    """Gives the data module the frozen features of these splits: every view that training will see, else the plain one.

    Images are then not touched any more while the convolutions are frozen.
    """
    with Progress(disable=not cfg.trainer.progress, transient=True) as progress:

        def of(split: str, view: int) -> torch.Tensor:
            dataset = data.dataset(split)
            return extract(
                net,
                partial(dataset.slices, view=view),
                dataset.contents,
                space_folder(cfg, net.digest, view),
                batch_size=cfg.features.batch_size,
                progress=progress,
                label=f"Features, {split}, view {view}",
            )

        trained = min(cfg.data.views + 1, cfg.trainer.max_epochs)
        views = {split: range(trained if split == "train" else 1) for split in splits}
        data.features |= {split: [of(split, view) for view in views[split]] for split in splits}


def space_folder(cfg: Config, weights_digest: str, view: int) -> Path:
    """The cache folder of a feature space: named by everything, besides a slice's content, that decides features."""
    settings = {"format": FORMAT, "weights": weights_digest, "pool": cfg.model.pool, **asdict(preprocess_of(cfg.data))}
    if view:
        settings |= {"view": view, "seed": cfg.seed, "augment": asdict(cfg.data.augment)}
    return cfg.cache / "features" / json_digest(settings)[:24]


def pooled(net: VGG16, x: torch.Tensor) -> torch.Tensor:
    """What the head gets after its pooling, float32 [B, D], of slices float [B, 1, S, S]."""
    return net.head[0](net.maps(x)).float()


def extract(
    net: VGG16,
    slices: Callable[[Sequence[int]], torch.Tensor],
    contents: Sequence[str],
    folder: Path,
    *,
    batch_size: int,
    progress: Progress | None = None,
    label: str = "Features",
    layer: Callable[[VGG16, torch.Tensor], torch.Tensor] = pooled,
) -> torch.Tensor:
    """What `layer` gives for N slices, [N, ...], from the cache where it is there, else computed and cached.

    slices: gives float [B, 1, S, S] for positions; contents: hash of each slice, equal hashes share their features. The
    result lies on the CPU.
    """
    rows = _load(folder, set(contents))
    first = dict(zip(reversed(contents), reversed(range(len(contents))), strict=True))
    todo = [i for i in sorted(first.values()) if contents[i] not in rows]
    if todo:
        rows |= _compute(net, slices, contents, todo, folder, batch_size, progress, label, layer)
    return torch.stack([rows[content] for content in contents])


@torch.no_grad()
def _compute(
    net: VGG16,
    slices: Callable[[Sequence[int]], torch.Tensor],
    contents: Sequence[str],
    todo: Sequence[int],
    folder: Path,
    batch_size: int,
    progress: Progress | None,
    label: str,
    layer: Callable[[VGG16, torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    device = next(net.features.parameters()).device
    task = progress.add_task(label, total=len(todo)) if progress else None
    rows: dict[str, torch.Tensor] = {}
    for start in range(0, len(todo), SHARD):
        shard: dict[str, torch.Tensor] = {}
        part = todo[start : start + SHARD]
        for at in range(0, len(part), batch_size):
            batch = part[at : at + batch_size]
            features = layer(net, slices(batch).to(device)).cpu()
            shard |= {contents[i]: row.clone() for i, row in zip(batch, features, strict=True)}
            if progress and task is not None:
                progress.advance(task, len(batch))
        _save(shard, folder)
        rows |= shard
    return rows


def _save(shard: dict[str, torch.Tensor], folder: Path) -> None:
    contents, features = json.dumps(list(shard)), torch.stack(list(shard.values()))
    about = {"contents": contents, "checksum": _checksum(contents, features)}
    write_atomic(folder / f"{uuid.uuid4().hex}.safetensors", save({"features": features}, about))


def _load(folder: Path, wanted: set[str]) -> dict[str, torch.Tensor]:
    """The features of these contents as far as they are cached; of shards that hold none, only the header is read.

    A damaged shard is removed: what it held is computed again.
    """
    rows: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as shard:
                about = shard.metadata()
                contents = json.loads(about["contents"])
                if wanted.isdisjoint(contents):
                    continue
                features = shard.get_tensor("features")
            if _checksum(about["contents"], features) != about["checksum"]:
                raise ValueError("its checksum does not match")
            rows |= {content: row for content, row in zip(contents, features, strict=True) if content in wanted}
        except FileNotFoundError:
            continue  # another process removed it first
        except (SafetensorError, LookupError, OSError, TypeError, ValueError) as error:
            print(f"Removing the damaged feature file {path} ({error}); its slices are computed again.")
            path.unlink(missing_ok=True)
    return rows


def _checksum(contents: str, features: torch.Tensor) -> str:
    return digest(f"{contents} {list(features.shape)} {features.dtype} ".encode() + features.numpy().tobytes())
