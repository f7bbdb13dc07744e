"""The one LightningDataModule: every source, every task, images or frozen features, the same order and views.

What a training step sees depends on the seed, the epoch and the slice alone, so a resumed run, a cached run and a run
with other workers see the same batches. Several processes (DDP) share out each batch, and nothing is padded: they train
and measure on what one process would. Batches are fetched as a whole: augmentation works on the batch at once.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import lightning as L
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from chestct.config.schema import Config, classes_of
from chestct.data.augment import make_views
from chestct.data.prepare import prepare_store, prepared_folder
from chestct.data.splits import load_splits
from chestct.data.store import Store, open_store
from chestct.ranks import place

Batch = dict[str, torch.Tensor]
BatchKey = tuple[int, list[int]]


class SliceDataset(Dataset):
    """The slices of one split. A key is a batch, as `Batches` makes it; the epoch decides the view.

    What it gives is this process's share of the batch, maybe empty: `x`, float32 [B, 1, S, S] in [0, 1] or, with
    features, [B, D]; `y`, int64 [B]; `i`, positions; and `batch_y`, the y of the whole batch.
    """

    def __init__(
        self,
        images: np.ndarray,
        manifest: pd.DataFrame,
        y: np.ndarray,
        cfg: Config,
        view_of: Callable[[int], int],
        features: Sequence[torch.Tensor] = (),
    ) -> None:
        self.images, self.cfg, self.view_of, self.features = images, cfg, view_of, features
        self.share = slice(place().rank, None, place().size)
        self.rows = manifest["row"].to_numpy()
        self.contents: list[str] = manifest["content"].tolist()
        self.y = torch.tensor(y)

    def __len__(self) -> int:
        return len(self.y)

    def slices(self, positions: Sequence[int], view: int) -> torch.Tensor:
        """The given view of the slices at these positions, float32 [B, 1, S, S] in [0, 1]."""
        plain = torch.from_numpy(self.images[self.rows[positions]]).unsqueeze(1).float() / 255
        contents = [self.contents[i] for i in positions]
        return make_views(plain, contents, [view] * len(contents), self.cfg.seed, self.cfg.data.augment)

    def __getitem__(self, key: BatchKey) -> Batch:
        epoch, batch = key
        view, positions = self.view_of(epoch), batch[self.share]
        x = self.features[view][positions] if self.features else self.slices(positions, view)
        return {
            "x": x,
            "y": self.y[positions],
            "i": torch.tensor(positions, dtype=torch.long),
            "batch_y": self.y[batch],
        }


class Batches(Sampler[BatchKey]):
    """The batches of an epoch, as (epoch, positions); the order is a function of seed and epoch.

    Lightning calls `set_epoch` before each epoch, and workers learn the epoch with the batch.
    """

    def __init__(self, slices: int, batch_size: int, seed: int | None = None) -> None:
        """seed: of the order; None: as they come."""
        self.slices, self.batch_size, self.seed, self.epoch = slices, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.slices / self.batch_size)

    def __iter__(self) -> Iterator[BatchKey]:
        order = torch.arange(self.slices)
        if self.seed is not None:
            order = torch.randperm(self.slices, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        for start in range(0, self.slices, self.batch_size):
            yield self.epoch, order[start : start + self.batch_size].tolist()


class SliceModule(L.LightningDataModule):
    """Train, valid and test slices of a run.

    After `setup`: `store`; `manifest`, the slices that take part, with the columns split, target and leaked;
    `class_names`. `features` may then hold, for each split, one tensor [N, D] a view, in the manifest's order; they
    stand in for images while the convolutions are frozen.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.class_names = classes_of(cfg.task)
        self.store: Store | None = None
        self.features: dict[str, list[torch.Tensor]] = {}
        self.prepare_data_per_node = False  # machines see one cache_dir

    def prepare_data(self) -> None:
        """Draws phantoms and decodes slices where that has not been done; safe to call from several processes."""
        if self.store is None:  # Lightning asks again in every stage of a run
            prepare_store(self.cfg, progress=self.cfg.trainer.progress)

    def setup(self, stage: str | None = None) -> None:
        """Opens the store and deals the splits; raises DataError where they do not fit the task."""
        if self.store is not None:
            return
        self.store = open_store(prepared_folder(self.cfg))
        self.manifest = load_splits(self.store.manifest, self.cfg)

    def dataset(self, split: str, view_of: Callable[[int], int] = lambda epoch: 0) -> SliceDataset:
        """The slices of a split; images unless features were given for it (see `features`)."""
        assert self.store is not None, "setup() comes first"
        part = self.manifest[self.manifest["split"] == split]
        y = part["target"].to_numpy(np.int64)
        return SliceDataset(self.store.images, part, y, self.cfg, view_of, self.features.get(split, ()))

    def class_counts(self) -> torch.Tensor:
        """Slices of each class in train, float32 [classes]."""
        y = self.manifest.loc[self.manifest["split"] == "train", "target"]
        return torch.tensor(np.bincount(y, minlength=len(self.class_names)), dtype=torch.float32)

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("valid")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def view_of(self, epoch: int) -> int:
        """The view that training sees: frozen training cycles through its views, fine-tuning never sees one twice."""
        views = self.cfg.data.views
        if self.cfg.frozen_at(epoch):
            return epoch % (views + 1)
        return epoch + 1 if views else 0

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader:
        dataset = self.dataset(split, self.view_of if shuffle else lambda epoch: 0)
        if self.trainer is not None and not self.cfg.frozen_at(self.trainer.current_epoch):
            dataset.features = ()
        return DataLoader(
            dataset,
            batch_size=None,  # a key is a batch
            sampler=Batches(len(dataset), self.cfg.data.batch_size, self.cfg.seed if shuffle else None),
            num_workers=0 if dataset.features else self.cfg.data.workers,
            pin_memory=torch.cuda.is_available(),
        )
