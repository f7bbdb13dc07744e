"""All slices of a manifest, decoded once: memory-mapped uint8 arrays and the tables that describe their rows.

Each piece of a store is named by its checksum, which is checked on opening; one small file, renamed into place last,
names the pieces. So a run killed at any moment leaves the old state or the new one, and a damaged piece is never
believed.
"""

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from chestct.config.schema import DataConfig
from chestct.errors import DataError
from chestct.files import digest, file_digest, json_digest, write_atomic
from chestct.imaging.preprocess import THUMBNAIL, Preprocess
from chestct.imaging.slice_files import why_skipped

FORMAT = 6
"""Version of the files below, and of how groups are made; another version is made anew."""

STORE = "chestct-store.json"
"""The file that names the pieces, with what no table holds."""

PIECES = {"manifest": "parquet", "pairs": "parquet", "images": "npy", "thumbs": "npy"}

OWN = re.compile(rf"({'|'.join(PIECES)})(-[0-9a-f]{{16}}\.(parquet|npy)|\.\d+\.tmp)")
"""Names of pieces, finished and not; nothing else is ever removed from a store's folder."""


class DamagedStoreError(DataError):
    """A store with a piece that is missing or not what was written."""


@dataclass
class Store:
    """Decoded slices and what is known of them (columns: docs/manifest.md)."""

    folder: Path
    manifest: pd.DataFrame
    images: np.ndarray  # uint8 memmap [rows, size, size]; manifest["row"] points into it
    thumbs: np.ndarray  # uint8 memmap [rows, 56, 56]: what near-copies are compared by
    pairs: pd.DataFrame  # a, b: positions in the manifest; similarity; kind: exact, near or series
    unreadable: pd.DataFrame  # source, path, file_hash, reason
    skipped: pd.DataFrame  # source, path, reason: what lies in the folders and is not used
    notes: list[str]  # sentences about how the folders were read
    disbelieved: list[str]  # sentences about DICOM identifiers that link nothing
    settings: dict[str, Any]  # what decides a stored pixel

    @property
    def data_hash(self) -> str:
        """Identity of what can be learnt from: contents, labels and places of all slices."""
        columns = self.manifest[["source", "path", "content", "subtype", "folder_split"]]
        return digest(columns.to_csv(index=False))


@dataclass
class About:
    """What a store holds that is in none of its pieces; plain values."""

    settings: dict[str, Any]
    unreadable: list[dict[str, str]]
    skipped: list[dict[str, str]]
    notes: list[str]
    disbelieved: list[str]


def preprocess_of(cfg: DataConfig) -> Preprocess:
    """The preprocessing that the data settings name."""
    return Preprocess(cfg.size, cfg.fit, cfg.contrast)


def pixel_settings(cfg: DataConfig) -> dict[str, Any]:
    """The settings that decide a stored pixel."""
    limits = {"max_bytes": cfg.max_bytes, "max_pixels": cfg.max_pixels}  # they decide what is readable
    return {**asdict(preprocess_of(cfg)), "window": asdict(cfg.window), **limits}


def store_folder(cfg: DataConfig, cache_dir: str | Path) -> Path:
    """Where the store of these settings lies: data.store, or a folder under cache_dir named by what decides pixels."""
    if cfg.store:
        return Path(cfg.store)
    roots = {n: str(Path(s.root).resolve()) for n, s in cfg.sources.items()} or str(Path(cfg.root or "").resolve())
    return Path(cache_dir) / "store" / f"{cfg.name}-{digest(json.dumps([roots, pixel_settings(cfg)]))[:12]}"


def claim(folder: Path) -> None:
    """Makes the folder of a store. Raises DataError where it holds what is no store's, which would be in danger."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in sorted(folder.iterdir()) if not why_skipped(path.name)]
    foreign = [name for name in names if not OWN.fullmatch(name)]
    if foreign == ["manifest.parquet"] and b"chestct" in (pq.read_schema(folder / foreign[0]).metadata or {}):
        (folder / foreign[0]).unlink()  # how stores were kept before they had checksums
    elif foreign and STORE not in names:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise DataError(
            f"{folder} is to hold the decoded slices, but holds other files ({shown}). Give an empty or a new folder "
            "with data.store=FOLDER."
        )


def open_store(folder: Path) -> Store:
    """Opens a store after checking every piece; a piece is checked once a process.

    Raises DataError where there is none or one of another version, DamagedStoreError where a piece is not whole.
    """
    if not (folder / STORE).is_file():
        raise DataError(f"No store in {folder}. Make it with `chestct ingest`.")
    pieces, about = _read_contents(folder)
    paths = {kind: _piece(folder, kind, checksum) for kind, checksum in pieces.items()}
    for kind, path in paths.items():
        if _checksum(path) != pieces[kind]:
            raise _damaged(path)
    return Store(
        folder,
        _read_table(paths["manifest"]),
        np.load(paths["images"], mmap_mode="r"),
        np.load(paths["thumbs"], mmap_mode="r"),
        _read_table(paths["pairs"]),
        pd.DataFrame(about.unreadable, columns=["source", "path", "file_hash", "reason"]),
        pd.DataFrame(about.skipped, columns=["source", "path", "reason"]),
        about.notes,
        about.disbelieved,
        about.settings,
    )


def write_about(folder: Path, about: About) -> None:
    """Replaces what is in none of a store's pieces."""
    _write_contents(folder, _read_contents(folder)[0], about)


def _write_contents(folder: Path, pieces: dict[str, str], about: About) -> None:
    contents = {"format": FORMAT, "pieces": pieces, "about": asdict(about)}
    write_atomic(folder / STORE, json.dumps(contents | {"digest": json_digest(contents)}))


def _read_contents(folder: Path) -> tuple[dict[str, str], About]:
    """The checksums of the pieces, and what is in none of them."""
    path = folder / STORE
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        if contents.pop("digest") != json_digest(contents):
            raise _damaged(path)
    except (ValueError, AttributeError, LookupError, RecursionError):
        raise _damaged(path) from None
    if contents["format"] != FORMAT:
        raise DataError(f"The store in {folder} was written by another version. Delete the folder and ingest again.")
    return contents["pieces"], About(**contents["about"])


def _damaged(path: Path) -> DamagedStoreError:
    what = "does not match its checksum" if path.exists() else "is missing"
    return DamagedStoreError(f"{path} {what}. Make the store anew with `chestct ingest`.")


def _piece(folder: Path, kind: str, checksum: str) -> Path:
    return folder / f"{kind}-{checksum[:16]}.{PIECES[kind]}"


def _checksum(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        raise _damaged(path) from None
    return _file_digest(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _file_digest(path: Path, *identity: int) -> str:
    return file_digest(path)


def _read_table(path: Path) -> pd.DataFrame:
    # read_table would first import pyarrow.dataset: a tenth of the time of a run that finds nothing new.
    with pq.ParquetFile(path) as file:
        return file.read().to_pandas()


class StoreWriter:
    """The pieces of a new store, invisible until `commit`; as a context manager it leaves nothing half-written."""

    def __init__(self, folder: Path, side: int) -> None:
        self.folder = folder
        self.row_of: dict[str, int] = {}
        self.temporary = {kind: folder / f"{kind}.{os.getpid()}.tmp" for kind in PIECES}
        self.arrays: dict[str, _Squares] = {}
        try:
            for kind, pixels in {"images": side, "thumbs": THUMBNAIL}.items():
                self.arrays[kind] = _Squares(self.temporary[kind], pixels)
        except OSError:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for array in self.arrays.values():
            with suppress(OSError):  # the disk may be full of what is still to be written
                array.file.close()
        for path in self.temporary.values():
            path.unlink(missing_ok=True)

    def add(self, content: str, pixels: dict[str, np.ndarray] | None) -> int:
        """The row of a content, which is written once: only its first call needs the pixels."""
        if content not in self.row_of:
            assert pixels is not None, "the pixels of a content that is new"
            self.row_of[content] = len(self.row_of)
            for kind, square in pixels.items():
                self.arrays[kind].append(square)
        return self.row_of[content]

    def finish_arrays(self) -> np.ndarray:
        """Ends the arrays; returns the thumbs, uint8 [rows, 56, 56], memory-mapped."""
        for array in self.arrays.values():
            array.finish()
        return np.load(self.temporary["thumbs"], mmap_mode="r")

    def commit(self, manifest: pd.DataFrame, pairs: pd.DataFrame, about: About) -> None:
        """Writes the tables, puts every piece into place, and removes those of the store before it."""
        manifest.to_parquet(self.temporary["manifest"], index=False)
        pairs.to_parquet(self.temporary["pairs"], index=False)
        pieces = {kind: file_digest(path) for kind, path in self.temporary.items()}
        current = {kind: _piece(self.folder, kind, checksum) for kind, checksum in pieces.items()}
        for kind, path in current.items():
            self.temporary[kind].replace(path)
        _write_contents(self.folder, pieces, about)
        for path in self.folder.iterdir():
            if OWN.fullmatch(path.name) and path not in current.values():
                path.unlink()


class _Squares:
    """A .npy file that grows by one square at a time; plain writes, so that a full disk is an error and no signal."""

    def __init__(self, path: Path, side: int) -> None:
        self.file = path.open("wb")
        self.shape = [0, side, side]
        self._header()

    def append(self, square: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(square, np.uint8).data)
        self.shape[0] += 1

    def finish(self) -> None:
        self._header()
        self.file.close()

    def _header(self) -> None:
        """numpy leaves room in a header for the first side to grow, so that the last one fits where the first stood."""
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(
            self.file, {"descr": "|u1", "fortran_order": False, "shape": tuple(self.shape)}
        )
