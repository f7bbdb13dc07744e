"""Brings a store up to date with the files of its sources.

Ingest is incremental and content-addressed: a file whose bytes are known is never decoded again.
"""

import os
import stat
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
from filelock import FileLock
from rich.progress import track
from rich.status import Status

from chestct.config.schema import DataConfig
from chestct.data.identifiers import believable
from chestct.data.sources import Listing, SliceFile, list_slices
from chestct.data.store import (
    STORE,
    About,
    DamagedStoreError,
    Store,
    StoreWriter,
    claim,
    open_store,
    pixel_settings,
    preprocess_of,
    write_about,
)
from chestct.errors import DataError, DecodeError
from chestct.files import file_digest
from chestct.imaging.decode import decode, read
from chestct.imaging.preprocess import thumbnail
from chestct.imaging.slice import Limits, pixel_hash
from chestct.imaging.slice_files import describe_skipped
from chestct.imaging.statistics import image_statistics

T = TypeVar("T")
R = TypeVar("R")

Facts = dict[str, Any]
"""What is known of a file's bytes: columns of the manifest, or the reason why they cannot be read."""

BATCH = 8
"""Files that a thread takes at a time: to hand over one by one costs as much as to hash them."""


def ingest(cfg: DataConfig, folder: Path, progress: bool = False) -> Store:
    """Brings the store in `folder` up to date with the sources and opens it.

    Raises DataError where sources are missing or unmapped, where the folder holds something else, where nothing is
    readable, or where more than data.max_unreadable files cannot be read.
    """
    listing = list_slices(cfg)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            claim(folder)
            store = _update(cfg, listing, folder, progress)
    except OSError as error:
        raise DataError(
            f"Cannot write the decoded slices to {folder}: {error.strerror or error}. Free space there, or choose "
            "another folder with cache_dir=FOLDER."
        ) from error
    if len(store.unreadable) > cfg.max_unreadable:
        shown = "\n".join(f"  {r.path}: {r.reason}" for r in store.unreadable.head(5).itertuples())
        raise DataError(
            f"{len(store.unreadable)} of {len(listing.slices)} files cannot be read, and data.max_unreadable is "
            f"{cfg.max_unreadable}:\n{shown}\nMend or remove them, or raise data.max_unreadable to go on without them."
        )
    return store


def describe(store: Store) -> str:
    """What was ingested, for a terminal: counts, what was skipped, and how folders and identifiers were read."""
    manifest = store.manifest
    lines = [
        f"{len(manifest)} slices, {len(manifest) - manifest['content'].nunique()} of them copies, "
        f"{manifest['group'].nunique()} groups, {len(store.unreadable)} unreadable: {store.folder}",
        *store.notes,
        *store.disbelieved,
    ]
    if len(store.skipped):
        shown = describe_skipped(list(zip(store.skipped["path"], store.skipped["reason"], strict=True)))
        lines.append(f"{shown}. All of them are listed in {store.folder / STORE}.")
    return "\n".join(lines)


def _update(cfg: DataConfig, listing: Listing, folder: Path, progress: bool) -> Store:
    old = _current(cfg, folder)
    facts = {} if old is None else _facts(old)
    files, limits = listing.slices, Limits(cfg.max_bytes, cfg.max_pixels)
    # Threads, not processes: reading, hashing and Pillow release the interpreter lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = list(_each(pool, lambda file: _hash(file, limits), files))
        if old is not None and _unchanged(old, files, hashes, facts):
            return _refreshed(old, listing)
        measured = _each(pool, lambda todo: _measure(*todo, cfg, limits), _unknown(files, hashes, facts))
        rows: list[dict[str, Any]] = []
        unreadable: list[dict[str, str]] = []
        with StoreWriter(folder, cfg.size) as new:
            for file, key in track(list(zip(files, hashes, strict=True)), "Reading slices", disable=not progress):
                fact, pixels = (facts[key], None) if key in facts else next(measured)
                if key:
                    facts[key] = fact
                if "reason" in fact:
                    unreadable.append({"source": file.source, "path": file.path, **fact})
                    continue
                if pixels is None and old is not None and fact["content"] not in new.row_of:
                    pixels = {"images": old.images[fact["row"]], "thumbs": old.thumbs[fact["row"]]}
                rows.append({**_described(file), **fact, "row": new.add(fact["content"], pixels)})
            if not rows:
                first = unreadable[0]
                raise DataError(
                    f"None of the {len(files)} files can be read; the first, {first['path']}: {first['reason']}"
                )
            manifest = pd.DataFrame(rows)
            with Status("Looking for copies") if progress else nullcontext():
                identifiers, disbelieved = believable(manifest)
                pairs = _find_pairs(manifest, identifiers, new.finish_arrays())
            about = About(pixel_settings(cfg), unreadable, listing.skipped, listing.notes, disbelieved)
            new.commit(_grouped(manifest, pairs), pairs, about)
    return open_store(folder)


def _current(cfg: DataConfig, folder: Path) -> Store | None:
    """The store as it stands, if its pixels were made with these settings; anything else is made anew."""
    try:
        store = open_store(folder)
    except DamagedStoreError as error:
        print(f"{str(error).split('. ')[0]}: all slices are decoded again.", file=sys.stderr)
        return None
    except DataError:  # none, or another version's
        return None
    return store if store.settings == pixel_settings(cfg) else None


def _refreshed(store: Store, listing: Listing) -> Store:
    """The store, whose slices are as they were, with what is skipped now."""
    if listing.skipped == store.skipped.to_dict("records") and listing.notes == store.notes:
        return store
    unreadable = cast(list[dict[str, str]], store.unreadable.to_dict("records"))
    write_about(store.folder, About(store.settings, unreadable, listing.skipped, listing.notes, store.disbelieved))
    return open_store(store.folder)


def _each(pool: ThreadPoolExecutor, function: Callable[[T], R], items: list[T]) -> Iterator[R]:
    """Results in order, computed BATCH at a time."""
    parts = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
    return chain.from_iterable(pool.map(lambda part: [function(item) for item in part], parts))


def _unknown(files: list[SliceFile], hashes: list[str], facts: dict[str, Facts]) -> list[tuple[SliceFile, str]]:
    """The files to decode and their hashes: of files with the same bytes the first, and all that were not hashed."""
    todo = {key or str(i): i for i, key in reversed(list(enumerate(hashes))) if key not in facts}
    return [(files[i], hashes[i]) for i in sorted(todo.values())]


def _facts(store: Store) -> dict[str, Facts]:
    """What is known of each file content, by the hash of its bytes."""
    columns = [
        c for c in store.manifest if c not in ("path", "source", "root", "folder_split", "subtype", "label", "group")
    ]
    readable = store.manifest[columns].drop_duplicates("file_hash").to_dict("records")
    unreadable = store.unreadable[["file_hash", "reason"]].to_dict("records")
    facts = cast(list[Facts], [*readable, *unreadable])
    return {fact["file_hash"]: fact for fact in facts if fact["file_hash"]}


def _unchanged(old: Store, files: list[SliceFile], hashes: list[str], facts: dict[str, Facts]) -> bool:
    if not all(key in facts for key in hashes):
        return False
    now = [
        (*_described(file).values(), key) for file, key in zip(files, hashes, strict=True) if "reason" not in facts[key]
    ]
    before = old.manifest[[*_described(files[0]), "file_hash"]].itertuples(index=False, name=None)
    return now == list(before) and len(now) + len(old.unreadable) == len(files)


def _hash(file: SliceFile, limits: Limits) -> str:
    """SHA-256 of the file's bytes; "" for what is not read at all: no plain file, too large, not permitted."""
    path = file.root / file.path
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > limits.max_bytes:
            return ""
        return file_digest(path)
    except OSError:
        return ""


def _measure(
    file: SliceFile, file_hash: str, cfg: DataConfig, limits: Limits
) -> tuple[Facts, dict[str, np.ndarray] | None]:
    """What one file is: its facts and its rows of the store's arrays, or the reason why it cannot be read."""
    try:
        data = read(file.root / file.path, limits)
        slice_ = decode(data, cfg.window, limits, name=file.path)
    except DecodeError as error:
        # Without its hash a file is tried again: a decoder may have been installed, a disk may answer again.
        return {"file_hash": file_hash if error.lasting else "", "reason": error.reason}, None
    # Bytes stay bytes: passes over floats would cost as much again as decoding.
    gray = slice_.levels if slice_.levels.dtype == np.uint8 else slice_.gray
    facts = {
        "file_hash": file_hash,
        "content": pixel_hash(slice_.levels),
        "mode": slice_.mode,
        "format": slice_.format,
        "bytes": len(data),
        **image_statistics(gray),
        "patient": slice_.patient,
        "study": slice_.study,
        "series": slice_.series,
    }
    return facts, {"images": preprocess_of(cfg)(gray), "thumbs": thumbnail(gray)}


def _described(file: SliceFile) -> dict[str, str]:
    return {
        "path": file.path,
        "source": file.source,
        "root": str(file.root),
        "folder_split": file.folder_split,
        "subtype": file.subtype,
        "label": "normal" if file.subtype == "normal" else "cancer",
    }


def _find_pairs(manifest: pd.DataFrame, identifiers: pd.DataFrame, thumbs: np.ndarray) -> pd.DataFrame:
    """Copies, near-copies and series mates; only one slice of each content is compared with others."""
    # SciPy takes longer to import than a run that finds nothing new needs in all.
    from chestct.data.duplicates import find_pairs, link

    first = manifest.drop_duplicates("content").sort_values("row")
    near = find_pairs(thumbs, list(first["content"]))
    near[["a", "b"]] = first.index.to_numpy()[near[["a", "b"]].to_numpy(int)]
    exact = link(list(manifest["content"]), "exact")
    mates = pd.concat([link(list(identifiers[column]), "series") for column in identifiers]).drop_duplicates()
    return pd.concat([exact, near, mates], ignore_index=True)


def _grouped(manifest: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    from chestct.data.duplicates import group

    return manifest.assign(group=group(len(manifest), pairs))
