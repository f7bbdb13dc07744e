"""Frozen features: while the convolutions do not change, they run once per view and their outputs are kept on disk.

A cache folder belongs to one feature space (weights, preprocessing, view settings) and holds shards: safetensors files
of some hundred slices, written to a temporary name and then renamed. A killed run loses one shard at most, several
processes can write at once, and whatever is found there is complete. The processes of one training (DDP) compute a
share each and read the rest.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from chestct.config.schema import Config
from chestct.data.datamodule import SliceModule
from chestct.data.store import preprocess_of
from chestct.models.vgg16 import VGG16
from chestct.ranks import place, together

ALL = slice(None)

SHARD = 256
"""Slices a shard: what a killed run has to compute again."""


def attach(data: SliceModule, net: VGG16, cfg: Config, splits: Sequence[str]) -> None:
    """Gives the data module the frozen features of these splits: every view that training will see, else the plain one.

    Images are then not touched any more while the convolutions are frozen. All processes of a training call it.
    """
    with Progress(disable=not cfg.trainer.progress, transient=True) as progress:

        def of(split: str, view: int, share: slice = ALL) -> torch.Tensor:
            dataset = data.dataset(split)
            return extract(
                net,
                partial(dataset.slices, view=view),
                dataset.contents,
                space_folder(cfg, net.digest, view),
                batch_size=cfg.features.batch_size,
                share=share,
                progress=progress,
                label=f"Features, {split}, view {view}",
            )

        trained = min(cfg.data.views + 1, cfg.trainer.max_epochs)
        views = {split: range(trained if split == "train" else 1) for split in splits}
        if place().size > 1:
            ours = slice(place().rank, None, place().size)
            together(lambda: [of(split, view, ours) for split in splits for view in views[split]])
        data.features |= {split: [of(split, view) for view in views[split]] for split in splits}


def space_folder(cfg: Config, weights_digest: str, view: int) -> Path:
    """The cache folder of a feature space: named by everything, besides a slice's content, that decides features."""
    settings = {"weights": weights_digest, "pool": cfg.model.pool, **asdict(preprocess_of(cfg.data))}
    if view:
        settings |= {"view": view, "seed": cfg.seed, "augment": asdict(cfg.data.augment)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return cfg.cache / "features" / digest[:24]


def extract(
    net: VGG16,
    slices: Callable[[Sequence[int]], torch.Tensor],
    contents: Sequence[str],
    folder: Path,
    *,
    batch_size: int,
    share: slice = ALL,
    progress: Progress | None = None,
    label: str = "Features",
) -> torch.Tensor:
    """Pooled features float32 [N, D] of N slices, from the cache where they are there, else computed and cached.

    slices: gives float [B, 1, S, S] for positions; contents: hash of each slice, equal hashes share their features;
    share: of the different contents, those that this call computes. The result lies on the CPU; what is not known of
    it is left out.
    """
    known = _load(folder)
    first = dict(zip(reversed(contents), reversed(range(len(contents))), strict=True))
    # A share of all, not of what is missing: that changes while other processes write.
    todo = [i for i in sorted(first.values())[share] if contents[i] not in known]
    if todo:
        folder.mkdir(parents=True, exist_ok=True)
        known |= _compute(net, slices, contents, todo, folder, batch_size, progress, label)
    found = [known[content] for content in contents if content in known]
    return torch.stack(found) if found else torch.empty(0)


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
) -> dict[str, torch.Tensor]:
    device = next(net.features.parameters()).device
    pool = net.head[0]
    task = progress.add_task(label, total=len(todo)) if progress else None
    found: dict[str, torch.Tensor] = {}
    for start in range(0, len(todo), SHARD):
        shard: dict[str, torch.Tensor] = {}
        part = todo[start : start + SHARD]
        for at in range(0, len(part), batch_size):
            batch = part[at : at + batch_size]
            features = pool(net.maps(slices(batch).to(device))).float().cpu()
            shard |= {contents[i]: row.clone() for i, row in zip(batch, features, strict=True)}
            if progress and task is not None:
                progress.advance(task, len(batch))
        _save(shard, folder)
        found |= shard
    return found


def _save(shard: dict[str, torch.Tensor], folder: Path) -> None:
    name = uuid.uuid4().hex
    temporary = folder / f"{name}.{os.getpid()}.tmp"
    save_file({"features": torch.stack(list(shard.values()))}, temporary, {"contents": json.dumps(list(shard))})
    temporary.replace(folder / f"{name}.safetensors")


def _load(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the cache folder, by content. A damaged shard is removed: what it held is computed again."""
    known: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as shard:
                contents = json.loads(shard.metadata()["contents"])
                known.update(zip(contents, shard.get_tensor("features").unbind(), strict=True))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            print(f"Removing the damaged feature file {path} ({error}); its slices are computed again.")
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            continue  # another process removed it first
    return known
