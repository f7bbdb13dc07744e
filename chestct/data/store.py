"""All slices of a manifest, decoded once: a memory-mapped array of uint8 squares and the tables that describe it.

Each piece of a store is named by its checksum, which is checked on opening; one small file, renamed into place last,
names the pieces. So a run killed at any moment leaves the old state or the new one, and a damaged piece is never
believed.
"""

import json
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from chestct.config.schema import DataConfig
from chestct.errors import DataError
from chestct.files import digest, file_digest, json_digest, write_atomic
from chestct.imaging.preprocess import THUMBNAIL, Preprocess
from chestct.imaging.slice_files import why_skipped

FORMAT = 11  # of the files below, of its sentences, and of how groups are made; another version is made anew
STORE = "chestct-store.json"  # the file that names the pieces, with what no table holds
PIECES = {"slices": "u8", "manifest": "parquet", "pairs": "parquet"}
# Names of pieces, finished and not, earlier versions' too; nothing else is ever removed from a store's folder
OWN = re.compile(r"\.?(slices|images|thumbs|manifest|pairs)-[0-9a-f]{16}\.\w+(\..*partial)?|slices\.partial")


@dataclass
class Store:
    """Decoded slices and what is known of them (columns: docs/manifest.md)."""

    folder: Path
    manifest: pd.DataFrame
    pairs: pd.DataFrame  # a, b: positions in the manifest; similarity; kind: exact, near, series or order
    slices: np.ndarray  # memory-mapped records of `record_type`; manifest["row"] points into it
    settings: dict[str, Any]  # what decides a stored pixel
    files: str  # digest of all names and contents that the store was made of
    unreadable: list[dict[str, str]]  # source, path, reason
    skipped: list[dict[str, str]]  # source, path, reason: what lies in the folders and is not used
    disbelieved: list[str]  # sentences about DICOM identifiers that link nothing
    notes: list[str]  # sentences about what stands for the patient, where it is not sure

    @property
    def images(self) -> np.ndarray:
        """What the network sees, uint8 [rows, size, size]."""
        return self.slices["image"]

    @property
    def data_hash(self) -> str:
        """Identity of what can be learnt from: contents, labels and places of all slices."""
        columns = self.manifest[["source", "path", "content", "subtype", "folder_split"]]
        return digest(columns.to_csv(index=False))


def record_type(size: int) -> np.dtype:
    """A stored slice: what the network sees, and the thumbnail by which near-copies are found."""
    return np.dtype([("image", np.uint8, (size, size)), ("thumb", np.uint8, (THUMBNAIL, THUMBNAIL))])


def preprocess_of(cfg: DataConfig) -> Preprocess:
    """How these settings make a slice the network's square."""
    return Preprocess(cfg.size, cfg.fit, cfg.contrast)


def pixel_settings(cfg: DataConfig) -> dict[str, Any]:
    """All settings that decide a stored pixel, as plain values."""
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
    if foreign and STORE not in names:
        raise DataError(
            f"{folder} is to hold the decoded slices, but holds other files ({', '.join(foreign[:3])}). Give an empty "
            "or a new folder with data.store=FOLDER."
        )


def open_store(folder: Path) -> Store:
    """Opens a store after checking every piece; a piece is checked once a process.

    Raises DataError where there is none, one of another version, or one with a piece that is not whole.
    """
    path = folder / STORE
    if not path.is_file():
        raise DataError(f"No store in {folder}. Make it with `chestct ingest`.")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        whole = contents.pop("digest") == json_digest(contents)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        whole = False
    if not whole:
        raise _damaged(path)
    if contents["format"] != FORMAT:
        raise DataError(f"The store in {folder} was written by another version. Make it anew with `chestct ingest`.")
    pieces = {kind: _piece(folder, kind, checksum) for kind, checksum in contents["pieces"].items()}
    for kind, piece in pieces.items():
        if not piece.is_file() or _checksum(piece, piece.stat().st_mtime_ns) != contents["pieces"][kind]:
            raise _damaged(piece)
    about = contents["about"]
    slices = np.memmap(pieces["slices"], record_type(about["settings"]["size"]), "r")
    return Store(folder, pd.read_parquet(pieces["manifest"]), pd.read_parquet(pieces["pairs"]), slices, **about)


def write_store(folder: Path, slices: Path, manifest: pd.DataFrame, pairs: pd.DataFrame, about: dict[str, Any]) -> None:
    """Puts every piece into place, and removes those of the store before it.

    slices: the file of records, which is moved; about: the other fields of `Store`, plain values.
    """
    tables = {"manifest": manifest.to_parquet(index=False), "pairs": pairs.to_parquet(index=False)}
    checksums = {"slices": file_digest(slices), **{kind: digest(table) for kind, table in tables.items()}}
    pieces = {kind: _piece(folder, kind, checksum) for kind, checksum in checksums.items()}
    slices.replace(pieces["slices"])
    for kind, table in tables.items():
        write_atomic(pieces[kind], table)
    contents = {"format": FORMAT, "pieces": checksums, "about": about}
    write_atomic(folder / STORE, json.dumps(contents | {"digest": json_digest(contents)}))
    for path in folder.iterdir():
        if OWN.fullmatch(path.name) and path not in pieces.values():
            path.unlink()


def _piece(folder: Path, kind: str, checksum: str) -> Path:
    return folder / f"{kind}-{checksum[:16]}.{PIECES[kind]}"


def _damaged(path: Path) -> DataError:
    what = "does not match its checksum" if path.exists() else "is missing"
    return DataError(f"{path} {what}. Make the store anew with `chestct ingest`.")


@lru_cache(maxsize=64)
def _checksum(path: Path, modified: int) -> str:
    return file_digest(path)
