"""Frozen features: while the convolutions do not change, they run once per view and their outputs are kept on disk.

A cache folder belongs to one feature space (weights, preprocessing, view settings) and holds shards: safetensors files
of some hundred slices, each named by its own digest and written whole or not at all. A killed run loses one shard at
most, and several processes can write at once; a damaged shard is never believed.
"""

import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn import functional

from chestct.config.schema import Config
from chestct.data.datamodule import SliceModule
from chestct.data.dataset import SliceDataset
from chestct.data.rows import Rows
from chestct.data.store import preprocess_of
from chestct.files import digest, file_digest, json_digest, write_atomic
from chestct.models.backends import conv5_by
from chestct.models.vgg16 import VGG16
from chestct.phantom import insertion
from chestct.progress import steps

SHARD = 256
"""Slices a shard: what a killed run has to compute again."""

FORMAT = 3
"""Version of shards and of how views are made; part of the name of a cache folder."""


Layer = Callable[[torch.Tensor], torch.Tensor]


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


@dataclass(frozen=True)
class Kept:
    """What is kept of N slices: what `layer` gives for them, in `folder`, by `contents`, the hash of each."""

    layer: Layer
    contents: Sequence[str]
    folder: Path


@torch.no_grad()
def extract(
    kept: Sequence[Kept],
    slices: Callable[[Sequence[int]], Sequence[torch.Tensor]],
    device: torch.device,
    *,
    batch_size: int,
    label: str = "",
) -> list[Rows]:
    """What is kept of N slices, [N, ...] each, on the CPU: from the cache where it is there, else computed and cached.

    slices: gives for positions what each layer takes, as images float [B, 1, S, S] and masks [B, 1, S, S]; equal hashes
    share what is kept; label: of the progress bar, if there is to be one.
    """
    rows = [_load(one.folder, set(one.contents)) for one in kept]
    lacking = []
    for one, held in zip(kept, rows, strict=True):
        first: dict[str, int] = {}  # content -> its first position
        for i, content in enumerate(one.contents):
            first.setdefault(content, i)
        lacking.append({i for content, i in first.items() if content not in held})
    todo = sorted(set().union(*lacking))
    shards: list[dict[str, torch.Tensor]] = [{} for _ in kept]
    batches = [todo[at : at + batch_size] for at in range(0, len(todo), batch_size)]

    def keep(batch: list[int], computed: list[torch.Tensor], last: bool) -> None:
        for one, values, wanted, held, shard in zip(kept, computed, lacking, rows, shards, strict=True):
            at = [position for position in batch if position in wanted]
            shard |= {one.contents[position]: row.clone() for position, row in zip(at, values, strict=True)}
            if shard and (len(shard) >= SHARD or last):
                raw = save({"features": torch.stack(list(shard.values()))}, {"contents": json.dumps(list(shard))})
                held |= _rows(write_atomic(one.folder / f"{digest(raw)}.safetensors", raw))
                shard.clear()

    # While a batch is computed, the next one is drawn and the one before it is written.
    with ThreadPoolExecutor(2) as pool:
        following = pool.submit(slices, batches[0]) if batches else None
        keeping: Future[None] | None = None
        for i, batch in enumerate(steps(batches, f"{label}, batches", len(batches), bool(label))):
            assert following is not None
            tensors = following.result()
            following = pool.submit(slices, batches[i + 1]) if i + 1 < len(batches) else None
            computed = []
            for one, shown, wanted in zip(kept, tensors, lacking, strict=False):
                at = [k for k, position in enumerate(batch) if position in wanted]
                shown = shown if len(at) == len(batch) else shown[at]
                computed.append(one.layer(shown.to(device)).cpu() if at else torch.empty(0))
            if keeping is not None:
                keeping.result()
            keeping = pool.submit(keep, batch, computed, following is None)
        if keeping is not None:
            keeping.result()
    return [Rows([held[content] for content in one.contents]) for one, held in zip(kept, rows, strict=True)]


def _load(folder: Path, wanted: set[str]) -> dict[str, torch.Tensor]:
    """The features of these contents as far as they are cached; of shards that hold none, only the header is read.

    A damaged shard is removed: what it held is computed again.
    """

    def checked(path: Path) -> dict[str, torch.Tensor]:
        of_shard = _rows(path, wanted)
        if of_shard and file_digest(path) != path.stem:
            raise ValueError("its checksum does not match")
        return of_shard

    with ThreadPoolExecutor() as pool:  # of a large collection, checksums take seconds
        shards = {path: pool.submit(checked, path) for path in sorted(folder.glob("*.safetensors"))}
    rows: dict[str, torch.Tensor] = {}
    for path, shard in shards.items():
        try:
            rows |= shard.result()
        except (SafetensorError, LookupError, OSError, TypeError, ValueError) as error:
            print(f"Removing the damaged feature file {path} ({error}); its slices are computed again.")
            path.unlink(missing_ok=True)
    return rows


def _rows(path: Path, wanted: set[str] | None = None) -> dict[str, torch.Tensor]:
    """The features in a shard by content (all, or those wanted), mapped into memory: read when they are looked at."""
    with safe_open(path, "pt") as shard:
        contents = json.loads(shard.metadata()["contents"])
        if wanted is not None and wanted.isdisjoint(contents):
            return {}
        rows = zip(contents, shard.get_tensor("features"), strict=True)
        return {content: row for content, row in rows if wanted is None or content in wanted}


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
