"""All slices of a manifest, decoded once: one memory-mapped uint8 array and the table that tells about its rows.

Ingest is incremental and content-addressed: a file whose bytes are known is never decoded again. The table is written
last, by a rename, and names the other files of its generation, so that a run killed at any moment leaves the old state
or the new one.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from rich.progress import track
from rich.status import Status

from chestct.config.schema import DataConfig
from chestct.data.sources import SliceFile, list_slices
from chestct.errors import DataError, DecodeError
from chestct.imaging.decode import decode, read
from chestct.imaging.preprocess import THUMBNAIL, Preprocess, thumbnail
from chestct.imaging.slice import Limits, pixel_hash
from chestct.imaging.statistics import image_statistics

FORMAT = 5
"""Version of the files below, and of how groups are found; another version is made anew."""

Pixels = dict[str, np.ndarray]
"""One slice's row of each of the store's arrays."""

T = TypeVar("T")
R = TypeVar("R")

BATCH = 8
"""Files that a thread takes at a time."""

UNREADABLE = ["source", "path", "file_hash", "reason"]


@dataclass
class Store:
    """Decoded slices and what is known of them (columns: docs/manifest.md)."""

    folder: Path
    manifest: pd.DataFrame
    images: np.ndarray  # uint8 memmap [rows, size, size]; manifest["row"] points into it
    pairs: pd.DataFrame  # a, b: positions in the manifest; similarity; kind: exact, near or series
    unreadable: pd.DataFrame  # source, path, file_hash, reason
    settings: dict[str, Any]  # what decides a stored pixel
    thumbs: np.ndarray  # uint8 memmap [rows, 56, 56]: what groups are found by

    def arrays(self) -> dict[str, np.ndarray]:
        """The mapped arrays, by the names of their files."""
        return {"images": self.images, "thumbs": self.thumbs}

    @property
    def data_hash(self) -> str:
        """Identity of what can be learnt from: contents, labels and places of all slices."""
        columns = self.manifest[["source", "path", "content", "subtype", "folder_split"]]
        return _digest(columns.to_csv(index=False))


def preprocess_of(cfg: DataConfig) -> Preprocess:
    """The preprocessing that the data settings name."""
    return Preprocess(cfg.size, cfg.fit, cfg.contrast)


def store_folder(cfg: DataConfig, cache_dir: str | Path) -> Path:
    """Where the store of these settings lies: data.store, or a folder under cache_dir named by what decides pixels."""
    if cfg.store:
        return Path(cfg.store)
    roots = {n: str(Path(s.root).resolve()) for n, s in cfg.sources.items()} or str(Path(cfg.root or "").resolve())
    return Path(cache_dir) / "store" / f"{cfg.name}-{_digest(json.dumps([roots, _pixel_settings(cfg)]))[:12]}"


def ingest(cfg: DataConfig, folder: Path, progress: bool = False) -> Store:
    """Brings the store in `folder` up to date with the sources and opens it.

    Raises DataError where sources are missing or unmapped, where nothing is readable, or where more than
    data.max_unreadable files cannot be read.
    """
    files = list_slices(cfg)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            store = _update(cfg, files, folder, progress)
    except OSError as error:
        raise DataError(
            f"Cannot write the decoded slices to {folder}: {error.strerror or error}. Free space there, or choose "
            "another folder with cache_dir=FOLDER."
        ) from error
    if len(store.unreadable) > cfg.max_unreadable:
        shown = "\n".join(f"  {r.path}: {r.reason}" for r in store.unreadable.head(5).itertuples())
        raise DataError(
            f"{len(store.unreadable)} of {len(files)} files cannot be read, and data.max_unreadable is "
            f"{cfg.max_unreadable}:\n{shown}\nMend or remove them, or raise data.max_unreadable to go on without them."
        )
    return store


def open_store(folder: Path) -> Store:
    """Opens what `ingest` wrote. Raises DataError where there is none, or one of another version."""
    path = folder / "manifest.parquet"
    if not path.is_file():
        raise DataError(f"No store in {folder}. Make it with `chestct ingest`.")
    table = _read_table(path)
    meta = json.loads((table.schema.metadata or {}).get(b"chestct", b"{}"))
    if meta.get("format") != FORMAT:
        raise DataError(f"The store in {folder} was written by another version. Delete the folder and ingest again.")
    return Store(
        folder,
        table.to_pandas(),
        np.load(folder / meta["images"], mmap_mode="r"),
        _read_table(folder / meta["pairs"]).to_pandas(),
        pd.DataFrame(meta["unreadable"], columns=UNREADABLE),
        meta["settings"],
        np.load(folder / meta["thumbs"], mmap_mode="r"),
    )


def _read_table(path: Path) -> pa.Table:
    # read_table would first import pyarrow.dataset: a tenth of the time of a run that finds nothing new.
    with pq.ParquetFile(path) as file:
        return file.read()


def _update(cfg: DataConfig, files: list[SliceFile], folder: Path, progress: bool) -> Store:
    old = _known(cfg, folder)
    facts = {} if old is None else _facts(old)
    limits = Limits(cfg.max_bytes, cfg.max_pixels)
    # Threads, not processes: reading, hashing and Pillow release the interpreter lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = list(_each(pool, lambda file: _hash(file, limits), files))
        if old is not None and _unchanged(old, files, hashes, facts):
            return old
        measured = _each(pool, lambda todo: _measure(*todo, cfg, limits), _unknown(files, hashes, facts))
        rows: list[dict[str, Any]] = []
        unreadable: list[dict[str, str]] = []
        with _Generation(cfg, folder, len(files)) as new:
            for file, key in track(list(zip(files, hashes, strict=True)), "Reading slices", disable=not progress):
                fact, pixels = (facts[key], None) if key in facts else next(measured)
                if key:
                    facts[key] = fact
                if "reason" in fact:
                    unreadable.append({"source": file.source, "path": file.path, **fact})
                    continue
                if pixels is None and fact["content"] not in new.row_of:
                    pixels = {name: array[fact["row"]] for name, array in cast(Store, old).arrays().items()}
                rows.append({**_described(file), **fact, "row": new.add(fact["content"], pixels)})
            if not rows:
                first = unreadable[0]
                raise DataError(
                    f"None of the {len(files)} files can be read; the first, {first['path']}: {first['reason']}"
                )
            with Status("Looking for copies") if progress else nullcontext():
                new.commit(pd.DataFrame(rows), pd.DataFrame(unreadable, columns=UNREADABLE))
    return open_store(folder)


def _each(pool: ThreadPoolExecutor, function: Callable[[T], R], items: list[T]) -> Iterator[R]:
    """Results in order, some files at a time: to hand over one by one costs as much as to hash them."""
    parts = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
    return chain.from_iterable(pool.map(lambda part: [function(item) for item in part], parts))


def _unknown(
    files: list[SliceFile], hashes: list[str], facts: dict[str, dict[str, Any]]
) -> list[tuple[SliceFile, str]]:
    """The files to decode and their hashes: of files with the same bytes the first, and all that were not hashed."""
    todo = {key or str(i): i for i, key in reversed(list(enumerate(hashes))) if key not in facts}
    return [(files[i], hashes[i]) for i in sorted(todo.values())]


def _facts(store: Store) -> dict[str, dict[str, Any]]:
    """What is known of each file content, by the hash of its bytes."""
    columns = [
        c for c in store.manifest if c not in ("path", "source", "root", "folder_split", "subtype", "label", "group")
    ]
    readable = store.manifest[columns].drop_duplicates("file_hash").to_dict("records")
    unreadable = store.unreadable[["file_hash", "reason"]].to_dict("records")
    facts = cast(list[dict[str, Any]], [*readable, *unreadable])
    return {fact["file_hash"]: fact for fact in facts if fact["file_hash"]}


def _unchanged(old: Store, files: list[SliceFile], hashes: list[str], facts: dict[str, dict[str, Any]]) -> bool:
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
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return ""


class _Generation:
    """One consistent set of files of a store, invisible until `commit` renames the table into place."""

    def __init__(self, cfg: DataConfig, folder: Path, rows: int) -> None:
        self.cfg, self.folder = cfg, folder
        self.row_of: dict[str, int] = {}
        self.temporary = {
            name: folder / f"{name}.{os.getpid()}.tmp" for name in ("images", "thumbs", "pairs", "manifest")
        }
        self.arrays: dict[str, np.ndarray] = {}
        try:
            for name, side in {"images": cfg.size, "thumbs": THUMBNAIL}.items():
                shape = (rows, side, side)
                self.arrays[name] = np.lib.format.open_memmap(self.temporary[name], "w+", np.uint8, shape)
                # A mapped page that finds no room on the disk kills the process; room asked for first is an error.
                with self.temporary[name].open("r+b") as opened:
                    os.posix_fallocate(opened.fileno(), 0, self.temporary[name].stat().st_size)
        except OSError:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves nothing half-written, whatever went wrong: the disk may be full of it."""
        self.arrays.clear()
        for path in self.temporary.values():
            path.unlink(missing_ok=True)

    def add(self, content: str, pixels: Pixels | None) -> int:
        """Row of the content, which is written once; only the first time its pixels are needed."""
        if content not in self.row_of:
            self.row_of[content] = len(self.row_of)
            for name, square in cast(Pixels, pixels).items():
                self.arrays[name][self.row_of[content]] = square
        return self.row_of[content]

    def commit(self, manifest: pd.DataFrame, unreadable: pd.DataFrame) -> None:
        # SciPy takes longer to import than a run that finds nothing new needs in all.
        from chestct.data.duplicates import group

        # The disk is not waited for: it writes while near-copies are looked for.
        with ThreadPoolExecutor() as pool:
            written = [pool.submit(_sync, self.temporary[name]) for name in self.arrays]
            pairs = _find_pairs(manifest, self.arrays["thumbs"])
            for one in written:
                one.result()
        manifest["group"] = group(len(manifest), pairs)
        name = _digest(manifest.to_csv(index=False) + json.dumps(_pixel_settings(self.cfg)))[:16]
        names = {"images": f"images-{name}.npy", "thumbs": f"thumbs-{name}.npy", "pairs": f"pairs-{name}.parquet"}
        meta = names | {
            "format": FORMAT,
            "settings": _pixel_settings(self.cfg),
            "unreadable": unreadable.to_dict("records"),
        }
        table = pa.Table.from_pandas(manifest)
        table = table.replace_schema_metadata((table.schema.metadata or {}) | {b"chestct": json.dumps(meta).encode()})
        pairs.to_parquet(self.temporary["pairs"])
        pq.write_table(table, self.temporary["manifest"])
        # All is written, and renaming takes no room; the table comes last.
        current = {kind: self.folder / file for kind, file in (names | {"manifest": "manifest.parquet"}).items()}
        for kind, path in current.items():
            self.temporary[kind].replace(path)
        for stale in {path for kind in current for path in self.folder.glob(f"{kind}*")} - set(current.values()):
            stale.unlink()


def _sync(path: Path) -> None:
    """Returns once the file is on the disk, so that no table ever names what a power failure took."""
    with path.open("rb") as opened:
        os.fdatasync(opened.fileno())


def _find_pairs(manifest: pd.DataFrame, thumbs: np.ndarray) -> pd.DataFrame:
    """Copies, near-copies and series mates; only one slice of each content is compared with others."""
    from chestct.data.duplicates import find_pairs

    first = manifest.drop_duplicates("content").sort_values("row")
    ids = first[["patient", "study", "series"]].to_numpy()
    series = [next(filter(None, row), "") for row in ids]
    near = find_pairs(thumbs[: len(first)], list(first["content"]), series=series)
    near[["a", "b"]] = first.index.to_numpy()[near[["a", "b"]].to_numpy(int)]
    origin = manifest["content"].map(dict(zip(first["content"], first.index, strict=True)))
    copy = manifest.index != origin
    exact = pd.DataFrame({"a": origin[copy], "b": manifest.index[copy], "similarity": 1.0, "kind": "exact"})
    return pd.concat([exact, near], ignore_index=True)


def _known(cfg: DataConfig, folder: Path) -> Store | None:
    """The store as it stands, if its pixels were made with these settings; anything else is made anew."""
    with suppress(DataError, OSError, ValueError, KeyError, pa.ArrowException):
        store = open_store(folder)
        if store.settings == _pixel_settings(cfg):
            return store
    return None


def _measure(file: SliceFile, file_hash: str, cfg: DataConfig, limits: Limits) -> tuple[dict[str, Any], Pixels | None]:
    """What one file is: its facts and its rows of the store's arrays, or the reason why it cannot be read."""
    path = file.root / file.path
    try:
        data = read(path, limits)
        slice_ = decode(data, cfg.window, limits, name=file.path)
    except DecodeError as error:
        return {"file_hash": file_hash, "reason": error.reason}, None
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


def _pixel_settings(cfg: DataConfig) -> dict[str, Any]:
    """The settings that decide a stored pixel."""
    limits = {"max_bytes": cfg.max_bytes, "max_pixels": cfg.max_pixels}  # they decide what is readable
    return {**asdict(preprocess_of(cfg)), "window": asdict(cfg.window), **limits}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
