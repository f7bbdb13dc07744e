"""A cache of what a layer gives for slices: each is computed once, and a killed program loses one shard at most.

A folder belongs to one feature space (`chestct.models.features.space_folder`) and holds shards: safetensors files of
some hundred slices, each named by its own digest and written whole or not at all. Several processes can write at once;
a damaged shard is never believed.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from chestct.data.rows import Rows
from chestct.files import digest, file_digest, write_atomic
from chestct.progress import steps

SHARD = 256
"""Slices a shard: what a killed run has to compute again."""

Layer = Callable[[torch.Tensor], torch.Tensor]
Tensors = dict[str, torch.Tensor]
"""What is kept, by the hash of a slice's content."""


@dataclass(frozen=True)
class Kept:
    """What is kept of N slices: what `layer` gives for them, in `folder`, by `contents`, the hash of each."""

    layer: Layer
    contents: Sequence[str]
    folder: Path

    def read(self) -> Tensors:
        """What is cached of these contents; of shards that hold none, only the header is read.

        A damaged shard is removed: what it held is computed again.
        """
        wanted = set(self.contents)

        def checked(path: Path) -> Tensors:
            with path.open("rb"):  # of one that this user may not read, safetensors says that there is none
                rows = _rows(path, wanted)
            if rows and file_digest(path) != path.stem:
                raise ValueError("its checksum does not match")
            return rows

        with ThreadPoolExecutor() as pool:  # of a large collection, checksums take seconds
            shards = {path: pool.submit(checked, path) for path in sorted(self.folder.glob("*.safetensors"))}
        held: Tensors = {}
        for path, shard in shards.items():
            try:
                held |= shard.result()
            except (SafetensorError, LookupError, FileNotFoundError, TypeError, ValueError) as error:
                print(f"Removing the damaged feature file {path} ({error}); its slices are computed again.")
                path.unlink(missing_ok=True)
        return held

    def write(self, rows: Tensors) -> Tensors:
        """Writes a shard; returns the same rows, mapped into memory."""
        raw = save({"features": torch.stack(list(rows.values()))}, {"contents": json.dumps(list(rows))})
        return _rows(write_atomic(self.folder / f"{digest(raw)}.safetensors", raw))

    def lacking(self, held: Tensors) -> set[int]:
        """Of each content that is not held, the first position."""
        first: dict[str, int] = {}
        for i, content in enumerate(self.contents):
            first.setdefault(content, i)
        return {i for content, i in first.items() if content not in held}


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
    rows = [one.read() for one in kept]
    lacking = [one.lacking(held) for one, held in zip(kept, rows, strict=True)]
    todo = sorted(set().union(*lacking))
    shards: list[Tensors] = [{} for _ in kept]
    batches = [todo[at : at + batch_size] for at in range(0, len(todo), batch_size)]

    def keep(batch: list[int], computed: list[torch.Tensor], last: bool) -> None:
        for one, values, wanted, held, shard in zip(kept, computed, lacking, rows, shards, strict=True):
            at = [position for position in batch if position in wanted]
            shard |= {one.contents[position]: row.clone() for position, row in zip(at, values, strict=True)}
            if shard and (len(shard) >= SHARD or last):
                held |= one.write(shard)
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


def _rows(path: Path, wanted: set[str] | None = None) -> Tensors:
    """The features in a shard by content (all, or those wanted), mapped into memory: read when they are looked at."""
    with safe_open(path, "pt") as shard:
        contents = json.loads(shard.metadata()["contents"])
        if wanted is not None and wanted.isdisjoint(contents):
            return {}
        rows = zip(contents, shard.get_tensor("features"), strict=True)
        return {content: row for content, row in rows if wanted is None or content in wanted}
