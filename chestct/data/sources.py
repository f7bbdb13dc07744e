"""Which files are slices, and what their folders say about them.

Three shapes of the torchvision ImageFolder convention are read: `train|valid|test/<class>/*`, `<class>/*`, and class
folders with a suffix, as in `adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib`. A folder that maps to no label is an error,
never a silently dropped class.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from chestct.config.schema import DataConfig
from chestct.errors import DataError

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
}
"""Folder names that say which split their slices belong to."""


@dataclass(frozen=True)
class SliceFile:
    """One file that should be a slice, as its folders describe it."""

    source: str
    root: Path
    path: str  # relative to root, with /
    folder_split: str  # train, valid, test, or "" where folders do not tell
    subtype: str  # a subtype, or "cancer" where the folder does not tell which


def list_slices(cfg: DataConfig) -> list[SliceFile]:
    """All slice files of all sources, in a fixed order.

    Raises DataError for a missing or empty root, for class folders that map to nothing, for a source that holds no
    file, for a folder that cannot be listed, and for names that are no text.
    """
    if cfg.sources:
        wanted = {name: (Path(s.root), s.labels or cfg.labels) for name, s in cfg.sources.items()}
    else:
        wanted = {cfg.name: (Path(cfg.root or ""), cfg.labels)}
    try:
        files = [file for name, (root, labels) in wanted.items() for file in _list_source(name, root, labels)]
    except OSError as error:
        raise DataError(f"Cannot list {error.filename}: {error.strerror}. Its slices would be missing.") from error
    for file in files:
        if (shown := file.path.encode("utf-8", "backslashreplace").decode()) != file.path:
            raise DataError(f"The name of {file.root / shown} is not UTF-8, which no table can hold. Rename the file.")
    return files


def _list_source(name: str, root: Path, labels: Mapping[str, str]) -> list[SliceFile]:
    if not root.is_dir():
        raise DataError(
            f"No folder {root} for the source '{name}'. Give its place with data.root=FOLDER, run `dvc pull` to fetch "
            "the shared data, or train on phantoms with data=phantom."
        )
    if not labels:
        raise DataError(
            f"Nothing tells what the class folders of '{name}' mean. Set data.labels, for example "
            "data.labels={healthy: normal, tumour: cancer}."
        )
    files: list[SliceFile] = []
    unmapped: list[str] = []
    for folder_split, folder in _class_folders(root):
        label = _label(folder.name, labels)
        if label is None:
            unmapped.append(str(folder.relative_to(root)))
        elif label != "ignore":
            files += [
                SliceFile(name, root, p.relative_to(root).as_posix(), folder_split, label) for p in _files(folder)
            ]
    if unmapped:
        raise DataError(
            f"Class folders under {root} that map to no label: {', '.join(sorted(unmapped))}. Known beginnings: "
            f"{', '.join(labels)}. Add them to data.labels, for example "
            f"'data.labels={{{Path(unmapped[0]).name}: cancer}}', or map them to ignore."
        )
    if not files:
        seen = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
        raise DataError(
            f"No class folders with files under {root}. Saw: {seen}. Expected {root}/<class>/* or "
            f"{root}/train|valid|test/<class>/*. Run `dvc pull`, or train on phantoms with data=phantom."
        )
    return files


def _class_folders(root: Path) -> Iterator[tuple[str, Path]]:
    """(split or "", class folder) pairs; a root with at least one split folder is read by splits alone."""
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    splits = [p for p in folders if p.name.lower() in SPLIT_FOLDERS]
    if not splits:
        yield from (("", p) for p in folders)
        return
    for split in splits:
        for folder in sorted(p for p in split.iterdir() if p.is_dir() and not p.name.startswith(".")):
            yield SPLIT_FOLDERS[split.name.lower()], folder


def _label(folder: str, labels: Mapping[str, str]) -> str | None:
    """Label of a class folder: the longest key that it equals or begins with (before a separator)."""
    name = folder.lower()
    fits = [k for k in labels if name == k.lower() or (name.startswith(k.lower()) and not name[len(k)].isalnum())]
    return labels[max(fits, key=len)] if fits else None


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a class folder, links to folders not followed (they may loop), hidden files left out.

    Whether a file is a slice is for its content to say, so no extension is filtered here.
    """

    def fail(error: OSError) -> None:  # else folders that may not be read would be left out in silence
        raise error

    for here, folders, names in os.walk(folder, onerror=fail):
        folders.sort()
        yield from (Path(here) / name for name in sorted(names) if not name.startswith("."))
