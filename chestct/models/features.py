"""Frozen features: while the convolutions do not change, they run once per view and their outputs are kept on disk.

What is kept belongs to one feature space: weights, preprocessing, settings of the view, and what computes.
"""

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from chestct.config.schema import Config
from chestct.data.datamodule import SliceModule
from chestct.data.dataset import SliceDataset
from chestct.data.rows import Rows
from chestct.data.store import preprocess_of
from chestct.files import json_digest
from chestct.models.backends import conv5_by
from chestct.models.feature_cache import Kept, Layer, extract
from chestct.models.vgg16 import VGG16
from chestct.phantom import insertion

FORMAT = 3
"""Version of shards and of how views are made; part of the name of a cache folder."""


def attach(data: SliceModule, net: VGG16, cfg: Config, splits: Sequence[str], views: int) -> None:
    """Gives the data module the frozen features of these splits: of train so many views, of others the plain slices.

    What it holds already, of another seed on the same slices, stays.
    """
    cfg = settled(cfg, net.mean.device)
    layer: Layer = net.pooled
    conv5, device, quantised = convolutions(data, net, cfg)
    if cfg.features.backend != "torch":
        layer = lambda x: net.pooled_map(conv5(x))  # noqa: E731
    elif device.type == "cuda" and cfg.trainer.precision == "bf16-mixed":
        layer, quantised = torch.autocast("cuda", torch.bfloat16)(layer), "bf16"
    if cfg.trainer.compile and cfg.features.backend == "torch":
        layer = torch.compile(layer)
    for split in splits:
        dataset = data.dataset(split, train=split == "train")
        spaces = []
        for view in range(views if split == "train" else 1):
            folder = space_folder(cfg, net.digest, view, quantised)
            spaces.append((folder, dataset.drawn_contents(view), dataset.places_contents(view)))
        if data.features.get(split) and data.spaces.get(split) == spaces:
            continue
        dataset.features, data.features[split], data.places[split] = (), [], []
        for view, (folder, contents, places) in enumerate(spaces):
            # What no view changes is taken from the first.
            at = np.flatnonzero(dataset.changes) if view else np.arange(len(dataset))
            kept = [Kept(layer, [contents[i] for i in at], folder)]
            if dataset.has_places:
                grid = net.grid if cfg.model.pool == "topk" else (1, 1)
                kept.append(Kept(partial(_covered, grid=grid), [places[i] for i in at], folder / "places"))
            label = f"Features, {split}, view {view}" if cfg.trainer.progress else ""
            shown = partial(_shown, dataset, at, view, device)
            every = extract(kept, shown, device, batch_size=cfg.features.batch_size, label=label)
            for by_view, values in zip((data.features[split], data.places[split]), every, strict=False):
                rows = [*(by_view[0] if view else values).rows]
                for position, row in zip(at.tolist(), values.rows, strict=True):
                    rows[position] = row
                by_view.append(Rows(rows))
        data.spaces[split] = spaces


def convolutions(data: SliceModule, net: VGG16, cfg: Config) -> tuple[Layer, torch.device, str]:
    """`VGG16.conv5` by the backend of the (`settled`) settings, what it computes on, and a digest of what INT8 was
    calibrated on, else ""; the program of another backend is made when it is first asked, once for `data`."""
    backend = cfg.features.backend
    if backend == "torch":
        return net.conv5, net.mean.device, ""
    key = f"{backend} {net.digest} {net.blocks}"
    if key not in data.programs:
        plain = data.dataset("train")
        data.programs[key] = conv5_by(backend, net, plain.contents, lambda at: plain.images[plain.rows[at]])
    conv5, quantised = data.programs[key]
    return conv5, torch.device("cpu"), quantised


def settled(cfg: Config, device: torch.device) -> Config:
    """The settings with the backend that features.backend=auto is on a device: the quickest exact one."""
    backend = cfg.features.backend
    if backend == "auto":
        backend = "openvino" if device.type == "cpu" and importlib.util.find_spec("openvino") else "torch"
    return replace(cfg, features=replace(cfg.features, backend=backend))


def _shown(
    dataset: SliceDataset, at: np.ndarray, view: int, device: torch.device, part: Sequence[int]
) -> Sequence[torch.Tensor]:
    """A view of some of the slices at these positions, int [N]: those that `part` counts."""
    return dataset.shown(at[part].tolist(), view, device)


def _covered(masks: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """How much of each place of a grid bool masks [B, 1, S, S] cover, float32 [B, 1, h, w]."""
    return functional.adaptive_avg_pool2d(masks.float(), grid)


def in_fp32(cfg: Config) -> Config:
    """The settings of features that evaluation measures: bfloat16 is for training, INT8 for both."""
    return replace(cfg, trainer=replace(cfg.trainer, precision="32-true"))


def space_folder(cfg: Config, weights_digest: str, view: int, quantised: str = "") -> Path:
    """The cache folder of a feature space: named by everything, besides a slice's content, that decides features.

    quantised: digest of what INT8 was calibrated on, or `bf16` where bfloat16 computed them.
    """
    settings = {"format": FORMAT, "weights": weights_digest, "pool": cfg.model.pool, **asdict(preprocess_of(cfg.data))}
    settings |= {"block": cfg.model.block} if cfg.model.block != "5" else {}
    backend = cfg.features.backend + quantised
    settings |= {"backend": backend} if backend != "torch" else {}
    if view:
        settings |= {"view": view, "seed": cfg.data.view_seed, "augment": asdict(cfg.data.augment)}
        settings |= {"lesions": cfg.data.lesions, "drawing": insertion.VERSION} if cfg.data.lesions else {}
    return cfg.cache / "features" / json_digest(settings)[:24]


def plain_maps(net: VGG16, dataset: SliceDataset, batch_size: int) -> Iterable[torch.Tensor]:
    """What the head gets for the plain slices of a split, some at a time: as the dataset holds it, else computed."""
    if dataset.features:
        return (dataset.features[0][at : at + 256] for at in range(0, len(dataset), 256))
    return (net.maps(x) for x in net.batches(dataset.images, batch_size, dataset.rows))


@torch.no_grad()
def outputs(net: VGG16, dataset: SliceDataset, batch_size: int) -> tuple[np.ndarray, torch.Tensor]:
    """Logits [N, K] and mean-pooled features [N, 512] of the plain slices of a split, both float32, on the CPU.

    From the features that the dataset holds, else by the convolutions; `net` is put into eval mode.
    """
    net.eval()
    logits, pooled = [], []
    for maps in plain_maps(net, dataset, batch_size):
        logits.append(net.head(maps.to(net.mean.device)).float().cpu())
        pooled.append(net.channel_means(maps).float().cpu())
    return torch.cat(logits).numpy(), torch.cat(pooled)
