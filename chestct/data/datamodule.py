"""The one LightningDataModule: every source, every task, images or frozen features, the same order and views.

Several processes (DDP) share out the slices of train as torch's DistributedSampler does; those of valid and test
without its padding, so that none is counted twice.
"""

import math
import sys
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from chestct.config.schema import Config, classes_of
from chestct.data.augment import Batch, defers, finish
from chestct.data.dataset import CPU, BatchKey, SliceDataset
from chestct.data.prepare import prepare_store, prepared_folder
from chestct.data.rows import Rows
from chestct.data.splits import load_splits
from chestct.data.store import Store, open_store


class Batches(Sampler[BatchKey]):
    """One process's batches of an epoch, as (epoch, positions); the order is a function of seed and epoch.

    Lightning calls `set_epoch` before each epoch, and workers learn the epoch with the batch.
    """

    def __init__(
        self, slices: int, batch_size: int, seed: int | None = None, rank: int = 0, processes: int = 1
    ) -> None:
        """batch_size: of all processes together; seed: of the order; None: as they come, and no slice twice."""
        self.batch_size, self.epoch = max(1, batch_size // processes), 0
        every = range(slices)
        self.order: DistributedSampler | range = every[rank::processes]
        if seed is not None:
            self.order = DistributedSampler(every, processes, rank, seed=seed)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if isinstance(self.order, DistributedSampler):
            self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)

    def __iter__(self) -> Iterator[BatchKey]:
        order = list(self.order)
        for start in range(0, len(order), self.batch_size):
            yield self.epoch, order[start : start + self.batch_size]


class SliceModule(L.LightningDataModule):
    """Train, valid and test slices of a run.

    A batch of its loaders is a dict of tensors: `x`, grey slices float32 [B, 1, S, S] in [0, 1] with S = data.size, or
    frozen features float32 [B, D]; `y`, int64 [B], positions in `class_names`; `i`, int64 [B], positions in the split.
    With data.balance, `w`, float32 [B], is what each counts in the loss (`balanced_weights`), whatever is drawn in it.
    Train is shuffled and shows its views in turn (`views_of`), valid and test come in order, as they are. With
    data.lesions, normal slices of train may show a lesion and are cancer then. With them, or where the head judges
    places and lesions of train are known, all batches of train have `places`, float32 [B, 1, h, w] on the grid of `x`:
    how much of each place a lesion covers, -1 where that is not known.

    After `setup`: `store`; `manifest`, the slices that take part, one row each, with the columns split, target and
    leaked (docs/manifest.md has the others); `class_names`. `features` may then hold, for each split, the rows
    of [N, D] a view, in the manifest's order; they stand in for images while the convolutions are frozen.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.class_names = classes_of(cfg.task)
        self.store: Store | None = None
        self.features: dict[str, list[Rows]] = {}
        self.places: dict[str, list[Rows]] = {}
        self.spaces: dict[str, list[Any]] = {}  # of each split, what decides the features that are there
        self.programs: dict[str, Any] = {}  # that compute features in torch's place, by backend and network
        self.resident: torch.Tensor | None = None  # all slices of the store on a GPU, while it trains
        self.begins = 0  # the epoch with which a training begins or goes on
        self.prepare_data_per_node = False  # machines see one cache_dir

    def prepare_data(self) -> None:
        """Draws phantoms and decodes slices where that has not been done; safe to call from several processes."""
        if self.store is None:  # Lightning asks again in every stage of a run
            prepare_store(self.cfg, progress=self.cfg.trainer.progress)

    def setup(self, stage: str | None = None) -> None:
        """Opens the store and divides it into splits; raises DataError where they do not fit the task."""
        if self.store is not None:
            return
        self.store = open_store(prepared_folder(self.cfg))
        self.manifest = load_splits(self.store.manifest, self.cfg)

    def dataset(self, split: str, train: bool = False) -> SliceDataset:
        """The slices of a split; images unless features were given for it (see `features`)."""
        assert self.store is not None, "setup() comes first"
        part = self.manifest[self.manifest["split"] == split]
        y = part["target"].to_numpy(np.int64)
        return SliceDataset(
            self.store.images, part, y, self.cfg, train, self.features.get(split, ()), self.places.get(split, ())
        )

    def class_counts(self) -> torch.Tensor:
        """Slices of each class in train, float32 [classes]."""
        y = self.manifest.loc[self.manifest["split"] == "train", "target"]
        return torch.tensor(np.bincount(y, minlength=len(self.class_names)), dtype=torch.float32)

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", train=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("valid")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def _loader(self, split: str, train: bool = False) -> DataLoader:
        dataset, trainer = self.dataset(split, train), self.trainer
        if trainer is not None and not self.cfg.frozen_at(trainer.current_epoch):
            dataset.features = ()
        place = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        device = trainer.strategy.root_device if trainer is not None else CPU
        dataset.deferred = defers(device) and not dataset.features and not dataset.has_places
        dataset.resident = dataset.deferred and self._resides(device)
        workers = 0 if dataset.features else self.cfg.data.workers
        sampler = Batches(len(dataset), self.cfg.data.batch_size, self.cfg.seed if train else None, *place)
        if trainer is not None:  # workers of a run that goes on are given keys before Lightning says the epoch
            sampler.set_epoch(max(self.begins, trainer.current_epoch))
        return DataLoader(
            dataset,
            batch_size=None,  # a key is a batch
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,  # a key says which epoch: they need not start anew, seconds on macOS
            pin_memory=device.type == "cuda",
        )

    def _resides(self, device: torch.device) -> bool:
        """Whether the slices lie on this GPU, where they are put if half of its free memory holds them all."""
        assert self.store is not None
        if self.resident is None and device.type == "cuda":
            images, free = self.store.images, torch.cuda.mem_get_info(device)[0]
            if images.nbytes > free / 2:
                size = f"{images.nbytes / 1e9:,.1f} GB of slices are more than half of the {free / 1e9:,.1f} GB free"
                print(f"{size} on {device}: each batch is copied there when its turn comes.", file=sys.stderr)
                return False
            self.resident = torch.empty(images.shape, dtype=torch.uint8, device=device)
            for at in range(0, len(images), 4096):
                self.resident[at : at + 4096] = torch.from_numpy(images[at : at + 4096].copy())
        return self.resident is not None

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return finish(batch, self.cfg.data.augment, self.resident)

    def teardown(self, stage: str) -> None:
        self.resident = None  # the GPU's memory is wanted for other things
