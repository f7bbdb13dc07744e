"""The public collections: where they live, under which licence, and whether a download of one is whole.

Nothing is downloaded: each has terms that a person accepts. What was downloaded is known by the pixels of its slices,
so that other file names or a lossless repacking are no difference, and one slice more, less or altered is.
"""

import shlex
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

from chestct.config.schema import WindowConfig
from chestct.errors import DataError, DecodeError
from chestct.files import file_digest, json_digest
from chestct.imaging.decode import decode
from chestct.imaging.slice import pixel_hash
from chestct.imaging.slice_files import walk
from chestct.progress import steps


@dataclass(frozen=True)
class PublicSet:
    """A collection as conf/data/hospitals.yaml expects it."""

    title: str
    home: str
    licence: str
    get: str  # what to download, or to make, and what of it is used
    root: str
    folders: dict[str, tuple[int, str]]  # class folder -> how many slices, and their digest (see `content_digest`)
    files: dict[str, str] = field(default_factory=dict)  # other files below the root -> SHA-256
    also: dict[str, str] = field(default_factory=dict)  # class folder -> what the download calls it, in lower case


SETS = {str(name): PublicSet(**known) for name, known in OmegaConf.load(Path(__file__).with_suffix(".yaml")).items()}


def describe(name: str) -> str:
    """Where a collection lives and what to do with a download of it. Raises DataError for a name that is none."""
    known = _known(name)
    count = sum(count for count, _ in known.folders.values())
    return (
        f"{known.title}: {count} slices\n  {known.home}\n  Licence: {known.licence}\n  {known.get}\n"
        f"  Then: chestct data fetch {name} FOLDER   (checks it and copies it to {known.root})"
    )


def fetch(name: str, source: Path, target: Path | None = None, progress: bool = False) -> Path:
    """Copies a download that is whole to `target` (as conf/data/hospitals.yaml has it), all or nothing; returns that.

    Raises DataError that says, for each class folder, what differs from the published collection.
    """
    known = _known(name)
    target = target or Path(known.root)
    if target.exists():
        raise DataError(f"{target} is there already. Remove it, or give another place with --out FOLDER.")
    if not source.is_dir():
        raise DataError(f"There is no folder {source}. Give the one that you unzipped the download into.")
    places = {folder: _find(source, folder, known.also.get(folder, folder)) for folder in known.folders}
    problems = [f"{folder}: there is no such folder" for folder, place in places.items() if place is None]
    found = {folder: place for folder, place in places.items() if place is not None}
    slices = {folder: [path for path, reason in walk(place) if not reason] for folder, place in found.items()}
    for folder, paths in slices.items():
        if len(paths) != known.folders[folder][0]:
            problems.append(f"{folder}: {len(paths)} slices, where there should be {known.folders[folder][0]}")
    if not problems:  # digests take a while
        for folder, paths in slices.items():
            try:
                if content_digest(paths, folder, progress) != known.folders[folder][1]:
                    problems.append(f"{folder}: {len(paths)} slices, but not those that were published")
            except DecodeError as error:
                problems.append(f"{folder}: {error}")
    matches = {file: next(source.rglob(file), None) for file in known.files}
    extra = {file: path for file, path in matches.items() if path is not None}
    problems += [f"{file} is missing" for file in known.files if file not in extra]
    problems += [f"{file} differs" for file, path in extra.items() if file_digest(path) != known.files[file]]
    if problems:
        raise DataError(
            f"{source} is not what the project knows as {known.title}.\n"
            + "".join(f"- {problem}\n" for problem in problems)
            + f"What it should be: chestct data fetch {name}. To use it as it is, unchecked: python train.py "
            + settings_of(name, source)
        )
    part = target.with_name(f".{target.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    for folder, paths in slices.items():
        for path in paths:
            copy = part / folder / path.relative_to(found[folder])
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    for file, path in extra.items():
        shutil.copyfile(path, part / file)
    return part.rename(target)


def published(name: str, manifest: pd.DataFrame) -> PublicSet | None:
    """The collection of this name, where the slices of a manifest are those that were published, all and no others."""
    known = SETS.get(name)
    if not known or len(manifest) != sum(count for count, _ in known.folders.values()):
        return None
    paths = manifest["path"].str.lower()
    for folder, (_, expected) in known.folders.items():
        within = tuple(f"{name.lower()}/" for name in (folder, known.also.get(folder, folder)))
        if _digest(manifest["content"][paths.str.startswith(within)]) != expected:
            return None
    return known


def settings_of(name: str, folder: Path) -> str:
    """The settings that read a collection from a folder, as a shell takes them."""
    place = "root" if name == "chest_ct" else f"sources.{name}.root"
    return f"data={name} {shlex.quote(f'data.{place}={folder}')}"


def content_digest(paths: list[Path], label: str = "", progress: bool = False) -> str:
    """16 hex digits of what slices show, whatever their names and order. Raises DecodeError for one without pixels."""
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda path: pixel_hash(decode(path, WindowConfig()).levels), paths)
        return _digest(steps(hashes, f"Checking {label}", len(paths), progress))


def _digest(hashes: Iterable[str]) -> str:
    return json_digest(sorted(hashes))[:16]


def _known(name: str) -> PublicSet:
    if name not in SETS:
        raise DataError(f"There is no collection {name!r} here. There are: {', '.join(SETS)}.")
    return SETS[name]


def _find(source: Path, folder: str, also: str) -> Path | None:
    """The folder below `source`, or itself, whose path ends in this class folder; the least deep one."""
    ends = [tuple(text.lower().split("/")) for text in (folder, also)]
    folders = sorted((source, *(path for path in source.rglob("*") if path.is_dir())), key=lambda path: len(path.parts))
    matches = (path for path in folders for end in ends if tuple(map(str.lower, path.parts[-len(end) :])) == end)
    return next(matches, None)
