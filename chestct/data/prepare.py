"""From settings to an open store: phantoms drawn where they are the source, files decoded, copies found.

A store is reused while the bytes and names of its files and the settings stay the same, and made anew otherwise.
"""

import dataclasses
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock

from chestct.config.schema import PHANTOM, Config, DataConfig, of_patients
from chestct.data import lesions
from chestct.data import store as stores
from chestct.data.duplicates import find_pairs
from chestct.data.sources import Listing, SliceFile, list_slices, sources_of
from chestct.data.store import STORE, Store, open_store, pixel_settings, preprocess_of, store_folder
from chestct.data.units import IDENTIFIERS, join
from chestct.errors import DataError, DecodeError
from chestct.files import digest, json_digest
from chestct.imaging.decode import decode, read
from chestct.imaging.preprocess import as_bytes, thumbnail
from chestct.imaging.slice import Limits, pixel_hash
from chestct.imaging.slice_files import describe_skipped
from chestct.imaging.statistics import image_statistics
from chestct.progress import steps


def prepare_store(cfg: Config, progress: bool = False) -> Store:
    """Brings everything up to date and opens the store; cheap where nothing changed. Raises DataError."""
    data = located(cfg)
    if data is not cfg.data:
        from chestct.phantom.dataset import write

        write(Path(data.sources[PHANTOM].root), cfg.data.phantom, progress)
    return ingest(data, store_folder(data, cfg.cache), progress)


def prepared_folder(cfg: Config) -> Path:
    """Where `prepare_store` put the store."""
    return store_folder(located(cfg), cfg.cache)


def is_synthetic(data: DataConfig) -> bool:
    """Whether all slices are phantoms: what a model reaches on them says nothing about patients."""
    return not any(map(of_patients, sources_of(data)))


def located(cfg: Config) -> DataConfig:
    """The data settings, with a root for phantoms that have none: a folder named by what is drawn."""
    sources = sources_of(cfg.data)
    if PHANTOM not in sources or sources[PHANTOM].root:
        return cfg.data
    from chestct.phantom.dataset import GENERATOR

    drawn = str(cfg.cache / "phantom" / json_digest([GENERATOR, dataclasses.asdict(cfg.data.phantom)])[:12])
    sources = sources | {PHANTOM: dataclasses.replace(sources[PHANTOM], root=drawn)}
    return dataclasses.replace(cfg.data, sources=sources)


def ingest(cfg: DataConfig, folder: Path, progress: bool = False) -> Store:
    """Brings the store in `folder` up to date with the sources and opens it.

    Raises DataError where sources are missing or unmapped, where the folder holds something else, where nothing is
    readable, or where more than data.max_unreadable files cannot be read.
    """
    listing = list_slices(cfg)
    try:
        place = folder.resolve()  # of `.` and `..`, too
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent / f".{place.name}.lock"):
            stores.claim(folder)
            store = _update(cfg, listing, folder, progress)
    except OSError as error:
        raise DataError(
            f"Cannot write the decoded slices to {folder}: {error.strerror or error}. Free space there, or choose "
            "another folder with cache_dir=FOLDER."
        ) from error
    if len(store.unreadable) > cfg.max_unreadable:
        shown = "\n".join(f"  {row['path']}: {row['reason']}" for row in store.unreadable[:5])
        raise DataError(
            f"{len(store.unreadable)} of {len(listing.slices)} files cannot be read, and data.max_unreadable is "
            f"{cfg.max_unreadable}:\n{shown}\nMend or remove them, or raise data.max_unreadable to go on without them."
        )
    return store


def describe(store: Store) -> str:
    """What was ingested, for a terminal: counts, what was skipped, and identifiers that were not believed."""
    manifest = store.manifest
    lines = [
        f"{len(manifest)} slices, {len(manifest) - manifest['content'].nunique()} of them copies, "
        f"{manifest['group'].nunique()} groups, {len(store.unreadable)} unreadable: {store.folder}",
        *store.disbelieved,
        *store.notes,
    ]
    if store.skipped:
        shown = describe_skipped([(row["path"], row["reason"]) for row in store.skipped])
        lines.append(f"{shown}. All of them are listed in {store.folder / STORE}.")
    return "\n".join(lines)


def _update(cfg: DataConfig, listing: Listing, folder: Path, progress: bool) -> Store:
    files, limits = listing.slices, Limits(cfg.max_bytes, cfg.max_pixels)
    # Threads, not processes: reading, hashing and Pillow release the interpreter lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = list(pool.map(lambda file: _hash(Path(file.root, file.path), limits), files))
        named = [name for name, source in cfg.sources.items() if source.patient]
        ordered = [name for name, source in cfg.sources.items() if source.ordered]
        known = _known_lesions(cfg, files, hashes)
        lesion_digests = {key: _hash(of, limits) if isinstance(of, Path) else of for key, of in known.items()}
        made_of = json_digest([files, hashes, listing.skipped, ordered, lesion_digests])
        if (store := _current(cfg, folder, made_of)) is not None:
            return store
        keys = [key or f"unhashed {i}" for i, key in enumerate(hashes)]
        distinct = dict(zip(keys, files, strict=True))  # equal bytes are decoded once
        measured = pool.map(lambda key: _measure(distinct[key], cfg, limits, known.get(key)), distinct)
        facts: dict[str, dict[str, Any]] = {}
        rows: dict[str, int] = {}  # content -> row of the store
        empty: set[str] = set()  # files whose mask shows nothing
        slices = folder / "slices.partial"
        try:
            with slices.open("wb") as out:  # no memory map: on a full disk it ends in a signal, not in an error
                progress_bar = steps(measured, "Reading slices", len(distinct), progress)
                for key, (fact, pixels) in zip(distinct, progress_bar, strict=True):
                    facts[key] = fact
                    if fact.pop("empty", False):
                        empty.add(key)
                    if pixels and fact["content"] not in rows:
                        rows[fact["content"]] = len(rows)
                        out.write(pixels)
            manifest, unreadable, unfit = _tables(files, keys, facts, rows, named)
            thumbs = np.memmap(slices, stores.record_type(cfg.size), "r")["thumb"]
            copies = find_pairs(thumbs[manifest["row"]], *(manifest[name].tolist() for name in ("content", "source")))
            units = join(manifest, copies, named, ordered)
            # Bytes that lack a decoder are tried again: it may have been installed.
            lacking = any(key in hashes for key, fact in facts.items() if not fact.get("lasting", True))
            about = {
                "settings": pixel_settings(cfg),
                "files": "" if lacking else made_of,
                "unreadable": unreadable,
                "skipped": listing.skipped + unfit,
                "disbelieved": units.disbelieved,
                "notes": [*listing.notes, *units.notes, *lesions.not_shown(manifest, known, empty)],
            }
            stores.write_store(folder, slices, manifest.assign(group=units.group), units.pairs, about)
        finally:
            slices.unlink(missing_ok=True)
    return open_store(folder)


def _tables(
    files: list[SliceFile], keys: list[str], facts: dict[str, dict[str, Any]], rows: dict[str, int], named: list[str]
) -> tuple[pd.DataFrame, list[dict[str, str]], list[dict[str, str]]]:
    """The manifest, the files that cannot be read, and those that are no axial CT slices.

    keys: of each file in `facts`, which are those of `_measure`; rows: content -> row of the store; named: sources that
    say who the patient is. Raises DataError where no file is a slice.
    """
    table: list[dict[str, Any]] = []
    unreadable: list[dict[str, str]] = []
    unfit: list[dict[str, str]] = []
    for file, key in zip(files, keys, strict=True):
        fact = facts[key]
        if "reason" in fact:
            left_out = unfit if fact.get("unfit") else unreadable
            left_out.append({"source": file.source, "path": file.path, "reason": fact["reason"]})
        else:
            # A pattern that is given says who the patient is; what DICOM says then counts no more.
            patient = file.patient if file.source in named else fact["patient"]
            lesion = fact["lesion"] if file.label == "cancer" else b""
            fact = fact | {"patient": patient, "lesion": lesion, "row": rows[fact["content"]]}
            table.append({**file._asdict(), "file_hash": key, **fact})
    if not table:
        first = (unreadable or unfit)[0]
        why = f"the first, {first['path']}: {first['reason']}"
        raise DataError(f"None of the {len(files)} files can be read as a slice; {why}")
    return pd.DataFrame(table), unreadable, unfit


def _current(cfg: DataConfig, folder: Path, made_of: str) -> Store | None:
    """The store as it stands, if it was made of the same files with the same settings."""
    if not (folder / STORE).is_file():
        return None
    try:
        store = open_store(folder)
    except DataError as error:
        print(f"{str(error).split('. ')[0]}: all slices are decoded again.", file=sys.stderr)
        return None
    return store if (store.files, store.settings) == (made_of, pixel_settings(cfg)) else None


def _hash(path: Path, limits: Limits) -> str:
    """SHA-256 of the file's bytes; "" for what is not read at all: no plain file, too large, not permitted."""
    try:
        return digest(read(path, limits))
    except DecodeError:
        return ""


def _known_lesions(cfg: DataConfig, files: list[SliceFile], hashes: list[str]) -> dict[str, lesions.Known]:
    """What is known of lesions, by the hash of the file: copies show what their original shows."""
    known: dict[str, lesions.Known] = {}
    for name, source in sources_of(cfg).items():
        hash_of = {file.path: key for file, key in zip(files, hashes, strict=True) if file.source == name}
        by_path = lesions.known_lesions(name, source, [file for file in files if file.source == name])
        known |= {hash_of[path]: lesion for path, lesion in by_path.items() if hash_of.get(path)}
    return known


def _measure(
    file: SliceFile, cfg: DataConfig, limits: Limits, known: lesions.Known | None
) -> tuple[dict[str, Any], bytes]:
    """What one file is, and its record in the store; or the reason why it is left out, and nothing."""
    try:
        data = read(Path(file.root, file.path), limits)
        slice_ = decode(data, cfg.window, limits, name=file.path)
    except DecodeError as error:
        return {"reason": error.reason, "lasting": error.lasting}, b""
    if slice_.format == "NIFTI":
        return {"reason": "NIFTI: it is a volume; export its slices, one a file"}, b""
    if slice_.unfit:
        return {"reason": slice_.unfit.removesuffix("."), "unfit": True}, b""
    # Bytes stay bytes: passes over floats would cost as much again as decoding.
    square = preprocess_of(cfg)
    gray = slice_.levels if slice_.levels.dtype == np.uint8 else slice_.gray
    mask = lesions.mask_of(known, gray.shape, file.path, limits) if known else np.zeros(gray.shape, bool)
    if mask.any() and file.label == "normal" and known == lesions.mask_file(file):
        raise DataError(f"{known} shows a lesion in a normal slice: remove the mask, or move the slice.")
    facts = {
        "content": pixel_hash(slice_.levels),
        "mode": slice_.mode,
        "format": slice_.format,
        "bytes": len(data),
        **image_statistics(gray),
        **{name: getattr(slice_, name) for name in IDENTIFIERS},
        "lesion": lesions.in_square(mask, as_bytes(gray), square) if mask.any() else b"",
        "empty": known is not None and not mask.any(),
    }
    return facts, square(gray).tobytes() + thumbnail(gray).tobytes()
