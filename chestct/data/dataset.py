"""Slices of one split, batch by batch: which view each is shown in, what is drawn into it, or its frozen features.

What a training step sees depends on the seeds, the epoch and the slice alone, so a resumed run, a cached run and a run
with other workers see the same batches.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from chestct.config.schema import Config
from chestct.data.augment import Batch, defers, draw_changes, finish, make_views, number_of
from chestct.data.lesions import unpack
from chestct.data.rows import Rows
from chestct.data.splits import balanced_weights
from chestct.files import digest
from chestct.imaging.lungs import find_lungs
from chestct.phantom.insertion import Kind, insert

BatchKey = tuple[int, list[int]]
"""An epoch, and positions in the split: what `Batches` gives and `SliceDataset` takes."""

CPU = torch.device("cpu")


class SliceDataset(Dataset):
    """The slices of one split: a key is a batch of them, as `Batches` makes it, an item as `SliceModule` says."""

    def __init__(
        self,
        images: np.ndarray,
        manifest: pd.DataFrame,
        y: np.ndarray,
        cfg: Config,
        train: bool = False,
        features: Sequence[Rows] = (),
        places: Sequence[Rows] = (),
    ) -> None:
        self.images, self.cfg, self.train, self.features, self.places = images, cfg, train, features, places
        self.rows = manifest["row"].to_numpy()
        self.contents: list[str] = manifest["content"].tolist()
        self.y = torch.tensor(y)
        # Known lesions only tell the places of training slices, and next to drawn ones they are not used at all: boxes
        # of two patients made the model worse on other patients (RESULTS.md).
        known = train and cfg.model.pool == "topk" and cfg.task == "binary" and not cfg.data.lesions
        self.lesions: list[bytes] = manifest["lesion"].tolist() if known else [b""] * len(manifest)
        self.lungs: dict[int, bytes] = {}  # row of the store -> mask, packed; b"" where there are none
        self.has_places = train and (bool(cfg.data.lesions) or any(self.lesions))
        # Next to drawn lesions, slices with cancer are shown as they are: changed ones taught nothing more, and
        # their features are a third of all (RESULTS.md).
        self.changes = ~(self.y.numpy() > 0) if train and cfg.data.lesions else np.ones(len(y), bool)
        # Whether a batch has all that `finish` makes `x` of on the device, and whether that has the slices already.
        self.deferred = self.resident = False
        drawn = cfg.data.lesions * (1 - 1 / cfg.data.looks) if train and cfg.task == "binary" else 0.0
        weights = {name: source.weight for name, source in cfg.data.sources.items()}
        self.w = torch.from_numpy(balanced_weights(manifest, y, drawn, weights)) if cfg.data.balance else None

    def __len__(self) -> int:
        return len(self.y)

    def shown(
        self, positions: Sequence[int], view: int, device: torch.device = CPU
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A view of the slices at these positions, float32 [B, 1, S, S] in [0, 1], and the lesions in it, bool.

        Lesions that are known, where they count, and those that are drawn: each drawing is made here, once for both.
        Where there are none, an accelerator `device` makes the views itself, and no masks are given.
        """
        if defers(device) and not self.has_places:
            batch = self.unfinished(positions, [view] * len(positions))
            for name in {"x", "changes"} & batch.keys():
                pinned = batch[name].pin_memory() if device.type == "cuda" else batch[name]
                batch[name] = pinned.to(device, non_blocking=True)
            return finish(batch, self.cfg.data.augment)["x"], torch.empty(0)
        plain = torch.from_numpy(self.images[self.rows[positions]]).unsqueeze(1).float() / 255
        masks = torch.zeros_like(plain, dtype=torch.bool)
        contents = [self.contents[i] for i in positions]
        for i, position in enumerate(positions):
            if self.lesions[position]:
                masks[i, 0] = torch.from_numpy(unpack(self.lesions[position], plain.shape[-1]))
            kind = self._kind(position, view)
            if kind and (lungs := self._lungs(self.rows[position])) is not None:
                rng = np.random.default_rng(number_of(f"{self.cfg.data.view_seed}/{view}/{contents[i]}/lesion"))
                square, mask = insert(plain[i, 0].numpy(), lungs, kind, rng)
                plain[i, 0], masks[i, 0] = torch.from_numpy(square), torch.from_numpy(mask)
        moved = masks if masks.any() else None  # turning empty ones would cost as much as turning the slices
        return make_views(plain, contents, view, self.cfg.data.view_seed, self.cfg.data.augment, moved), masks

    def _lungs(self, row: int) -> np.ndarray | None:
        """The lungs of a slice, bool [S, S], found once for all of its views."""
        if row not in self.lungs:
            lungs = find_lungs(self.images[row])
            self.lungs[row] = b"" if lungs is None else np.packbits(lungs.mask).tobytes()
        return unpack(self.lungs[row], self.images.shape[-1]) if self.lungs[row] else None

    def _kind(self, position: int, view: int) -> Kind | None:
        """What is drawn into a normal slice of train: a lesion, a control or nothing, by its content, view and seed."""
        share = self.cfg.data.lesions if self.train and view else 0
        if not share or self.y[position]:
            return None
        drawn = number_of(f"{self.cfg.data.view_seed}/{view}/{self.contents[position]}/kind") / 2**64
        return "lesion" if drawn < share else "control" if drawn < 2 * share else None

    def drawn_contents(self, view: int) -> list[str]:
        """The contents, and what is drawn into each in this view: what decides a slice's features in one space."""
        return [f"{content} {self._kind(i, view) or ''}".strip() for i, content in enumerate(self.contents)]

    def places_contents(self, view: int) -> list[str]:
        """What decides the places of each slice in one space: what decides its features, and its lesion."""
        both = zip(self.drawn_contents(view), self.lesions, strict=True)
        return [f"{shown} {digest(lesion)}" if lesion else shown for shown, lesion in both]

    def __getitem__(self, key: BatchKey) -> Batch:
        epoch, positions = key
        at = np.array(positions)
        views = views_of(self.cfg, epoch, at) if self.train else np.zeros_like(at)
        views = np.where(self.changes[at], views, 0)
        order = np.argsort(views, kind="stable")  # one view after the other
        at, views = at[order], views[order]
        positions = at.tolist()
        batch = {"y": self.y[positions], "i": torch.tensor(positions, dtype=torch.long)}
        batch |= {} if self.w is None else {"w": self.w[positions]}
        if self.deferred:
            return batch | self.unfinished(positions, views.tolist())
        parts = [self._seen(at[views == view].tolist(), view) for view in np.unique(views).tolist()]
        batch["x"], places = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if self.has_places and places.ndim == 4:
            shown = places.flatten(1).amax(1) > 0
            # Of other slices with cancer it is not known where; normal ones are clear, and cancer if drawn into.
            unknown = batch["y"].bool() & ~shown
            batch["places"] = torch.where(unknown[:, None, None, None], -1.0, places.float())
            batch["y"] = torch.where(shown, 1, batch["y"])
        return batch

    def unfinished(self, positions: Sequence[int], views: Sequence[int]) -> Batch:
        """What `finish` makes these views of these slices of: their squares, or rows, and what is drawn for each."""
        rows = self.rows[positions]
        batch: Batch = {"row": torch.from_numpy(rows)} if self.resident else {"x": torch.from_numpy(self.images[rows])}
        if any(views):
            contents, data = [self.contents[i] for i in positions], self.cfg.data
            changes = draw_changes(contents, views, data.view_seed, data.augment, self.images.shape[-1])
            batch["changes"], batch["noise"] = changes
        return batch

    def _seen(self, positions: list[int], view: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A view of slices, or its features, and where they show lesions (empty where that is not asked)."""
        if self.features:
            known = self.places[view][positions] if self.places else torch.zeros(len(positions), 0)
            return self.features[view][positions], known
        return self.shown(positions, view)


def views_of(cfg: Config, epoch: int, positions: np.ndarray) -> np.ndarray:
    """The view that training sees of each slice, int [B], by its position in the split.

    Frozen training cycles through its views, each slice at another one: those with drawn lesions show cancer more
    often, and a head would swing with them. Fine-tuning sees no view twice, and next to drawn lesions plain slices too.
    """
    cycle, turn = divmod(epoch + positions, cfg.data.looks)
    if cfg.frozen_at(epoch):
        return np.where(turn > 0, 1 + (cycle * (cfg.data.looks - 1) + turn - 1) % max(1, cfg.data.views), 0)
    return np.where((turn > 0) | (not cfg.data.lesions), epoch + 1 if cfg.data.views else 0, 0)
