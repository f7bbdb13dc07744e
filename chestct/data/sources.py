"""Which files are slices, and what their folders say about them.

Three shapes of the torchvision ImageFolder convention are read: `train|valid|test/<class>/*`, `<class>/*`, and class
folders with a suffix, as in `adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib`. Nothing is dropped in silence: a folder that
maps to no label, or stands next to split folders without being one, is an error; whatever else is not used is listed.
"""

import json
import re
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from chestct.config.schema import LABEL_NAMES, PHANTOM, DataConfig, SourceConfig
from chestct.errors import DataError
from chestct.imaging.slice_files import walk, why_skipped

# Folder names, in lower case, that say which split their slices belong to
SPLIT_FOLDERS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_FOLDERS |= dict.fromkeys(("valid", "val", "validation"), "valid")
MASKS = "masks"  # folder next to split or class folders with the masks of lesions
DEPTH = 4  # how many folders below a root that holds no class folders are searched for them
UNLABELLED = "Labels that stand in a table: docs/data.md. Without labels: chestct predict FOLDER."
SECONDS = 20  # for a search of all names of a source, which takes milliseconds unless a pattern backtracks without end
MATCH = """import json, re, signal, sys
hasattr(signal, "alarm") and signal.alarm(60)  # where nobody is left to end it
pattern, names = json.load(sys.stdin)
print(json.dumps([match[1] or "" if (match := re.search(pattern, name)) else "" for name in names]))"""
# Words after a label that turn it into something else, as in `cancer free`
NEGATIONS = {"free", "negative", "no", "non", "not", "or", "versus", "vs", "without"}


class SliceFile(NamedTuple):
    """One file that should be a slice, as its folders describe it: the first columns of the manifest."""

    path: str  # relative to root, with /
    source: str
    root: str
    folder_split: str  # train, valid, test, or "" where folders do not tell
    subtype: str  # a subtype, or "cancer" where the folder does not tell which
    label: str  # normal or cancer
    patient: str = ""  # where the source says how names tell it


@dataclass
class Listing:
    """What lies under the roots of all sources."""

    slices: list[SliceFile] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)  # source, path (of a folder with / at the end), reason
    notes: list[str] = field(default_factory=list)  # sentences about patients that names do not tell


def list_slices(cfg: DataConfig) -> Listing:
    """All slice files of all sources, in a fixed order, and what is skipped.

    Raises DataError for a missing or empty root, for folders that are neither a split nor a class, for a source that
    holds no file, for a folder that cannot be listed, and for names that are no text.
    """
    listing = Listing()
    check_roots(cfg)
    try:
        for name, source in sources_of(cfg).items():
            labels = {**cfg.labels, **source.labels}
            _Source(name, Path(source.root), labels, listing, source, _root_setting(cfg, name)).read()
    except OSError as error:
        raise DataError(f"Cannot list {error.filename}: {error.strerror}. Its slices would be missing.") from error
    return listing


def sources_of(cfg: DataConfig) -> dict[str, SourceConfig]:
    """The sources by name, the one of data.root included."""
    return cfg.sources or {cfg.name: SourceConfig(cfg.root or "")}


def check_roots(cfg: DataConfig) -> None:
    """Raises DataError for a source whose folder is not there; phantoms that are yet to be drawn have none."""
    for name, source in sources_of(cfg).items():
        if not (Path(source.root).is_dir() if source.root else name == PHANTOM):
            raise DataError(
                f"No folder {source.root or 'is given'} for the source '{name}'. Give its place with "
                f"{_root_setting(cfg, name)}=FOLDER. Your team's data: `dvc pull`; public collections: `chestct data "
                "fetch`; or phantoms with data=phantom."
            )


def _root_setting(cfg: DataConfig, name: str) -> str:
    """The setting that gives the folder of a source."""
    return f"data.sources.{name}.root" if cfg.sources else "data.root"


@dataclass
class _Source:
    """One collection; `read` adds what lies under its root to the listing."""

    name: str
    root: Path
    labels: Mapping[str, str]
    listing: Listing
    source: SourceConfig
    root_setting: str

    def read(self) -> None:
        before = len(self.listing.slices)
        folders = self._folders(self.root)
        splits = {folder: split for folder in folders if (split := SPLIT_FOLDERS.get(folder.name.lower()))}
        classes = [("", folder) for folder in folders]
        if splits:
            self._leave_out([folder for folder in folders if folder not in splits])
            classes = [(split, below) for folder, split in splits.items() for below in self._folders(folder)]
        if unmapped := sorted({folder.name for _, folder in classes if label_of(folder.name, self.labels) is None}):
            raise DataError(self._unmapped(unmapped))
        for split, folder in classes:
            self._add(split, folder)
        if len(self.listing.slices) == before:
            seen = ", ".join(sorted(path.name for path in self.root.iterdir())[:8]) or "nothing"
            raise DataError(
                f"No class folders with files under {self.root}. Saw: {seen}. Expected {self.root}/<class>/* or "
                f"{self.root}/train|valid|test/<class>/*. {UNLABELLED} Or "
                "run `dvc pull`, see `chestct data fetch`, or take phantoms with data=phantom."
            )
        if self.source.patient:
            self._add_patients(before)

    def _add_patients(self, at: int) -> None:
        """Gives the slices from `at` on their patients; says how many names tell none. DataError where none does."""
        files, setting = self.listing.slices[at:], f"data.sources.{self.name}.patient={self.source.patient}"
        given = json.dumps([self.source.patient, [file.path for file in files]])
        command = [sys.executable, "-I", "-c", MATCH]  # nothing ends a search within this process
        try:
            done = subprocess.run(command, input=given, capture_output=True, text=True, check=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            slow = f"takes more than {SECONDS} s for {len(files)} names: write it without a repeat in a repeat, (.+)+"
            raise DataError(f"{setting} {slow}.") from None
        # A bare number is this source's.
        patients = [f"{self.name} {one}" if one.isdigit() else one for one in json.loads(done.stdout)]
        files = [file._replace(patient=one) for file, one in zip(files, patients, strict=True)]
        self.listing.slices[at:] = files
        without = [file.path for file in files if not file.patient]
        if len(without) == len(files):
            raise DataError(f"{setting} matches none of the {len(files)} files, for example {without[0]}. Change it.")
        if without:
            self.listing.notes.append(
                f"{setting} does not match {len(without)} of {len(files)} files: of their patients nothing is known "
                f"but near-copies. For example {without[0]}."
            )

    def _folders(self, parent: Path) -> list[Path]:
        """The folders in a folder, sorted; whatever else lies there is skipped."""
        reasons = {
            path: why_skipped(path.name) or ("" if path.is_dir() else "not in a class folder")
            for path in sorted(parent.iterdir())
        }
        reasons |= {path: "lesion masks, not slices" for path in reasons if path == self.root / MASKS}
        for path, reason in reasons.items():
            self._skip(path, reason)
        return [path for path, reason in reasons.items() if not reason and self._name(path)]

    def _name(self, path: Path) -> str:
        """The path below the root, with /; raises DataError for one that is no text."""
        if str(path).encode("utf-8", "replace").decode() != str(path):
            raise DataError(f"The name {str(path)!a} is not UTF-8, which no table can hold. Rename it.")
        return path.relative_to(self.root).as_posix()

    def _add(self, split: str, folder: Path) -> None:
        subtype = label_of(folder.name, self.labels) or ""  # never: `read` refuses what has no label
        if subtype == "ignore":
            self._skip(folder, "data.labels says ignore")
            return
        label = "normal" if subtype == "normal" else "cancer"
        for path, reason in walk(folder):
            self._skip(path, reason)
            if not reason and path != self.root / self.source.boxes:
                name = self._name(path)
                self.listing.slices.append(SliceFile(name, self.name, str(self.root), split, subtype, label))

    def _leave_out(self, folders: list[Path]) -> None:
        """Skips folders next to split folders if they are empty or ignored, else raises DataError."""
        reasons = dict.fromkeys(folders, "")
        for folder in folders:
            if label_of(folder.name, self.labels) == "ignore":
                reasons[folder] = "data.labels says ignore"
            elif all(reason for _, reason in walk(folder)):
                reasons[folder] = "no files in it"
            self._skip(folder, reasons[folder])
        if strays := [folder.name for folder in folders if not reasons[folder]]:
            raise DataError(
                f"Next to the split folders under {self.root} stand others, whose files would be missing: "
                f"{', '.join(strays)}. Rename those that are splits to train, valid or test, and move the others away "
                f"or leave them out. {_advice(strays, 'ignore')}"
            )

    def _unmapped(self, names: list[str]) -> str:
        """The message about class folders without a label: where the right folders lie, or how to name what these hold.

        No label is suggested: followed without a thought, a wrong one would call normal slices cancer.
        """
        text = f"Class folders under {self.root} that map to no label: {', '.join(names)}."
        deeper = self._roots(self.root, DEPTH)
        if len(deeper) == 1 and deeper != [self.root]:
            return f"{text} Class folders lie deeper: give {shlex.quote(f'{self.root_setting}={deeper[0]}')}"
        known, choices = ", ".join(self.labels) or "none", ", ".join(LABEL_NAMES)
        return f"{text} Known beginnings: {known}. {UNLABELLED} {_advice(names, f' # one of {choices}')}"

    def _roots(self, folder: Path, depth: int) -> list[Path]:
        """Folders from here on that hold split folders or class folders, no deeper than needed."""
        below = [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.is_symlink() and not why_skipped(p.name)]
        if any(path.name.lower() in SPLIT_FOLDERS or label_of(path.name, self.labels) for path in below):
            return [folder]
        return [root for path in below if depth for root in self._roots(path, depth - 1)]

    def _skip(self, path: Path, reason: str) -> None:
        """Lists a file or folder with the reason why it is not used; nothing where there is no reason."""
        name = path.relative_to(self.root).as_posix() + "/" * path.is_dir()
        if reason and name != self.source.boxes:
            self.listing.skipped.append({"source": self.name, "path": name, "reason": reason})


def label_of(folder: str, labels: Mapping[str, str]) -> str | None:
    """Label of a class folder: that of the longest key that it equals or begins with (before a separator).

    Of keys that differ in case or Unicode form only, the last counts: those of the user come after the defaults.

    None where no key fits, and where what follows the key takes it back, as in `cancer free`.
    """
    name = _comparable(folder)
    rests = {key: name.removeprefix(_comparable(key)) for key in labels if name.startswith(_comparable(key))}
    fits = [key for key, rest in rests.items() if not rest[:1].isalnum()]
    best = max(reversed(fits), key=lambda key: len(_comparable(key)), default=None)
    return None if best is None or NEGATIONS & set(re.split(r"[\W_]+", rests[best])) else labels[best]


def _advice(names: Iterable[str], label: str) -> str:
    """How to give these folders a label: in a file, which holds names that a command line cannot."""
    lines = "\n".join(f"{json.dumps(name, ensure_ascii=False)}: {label}" for name in names)
    return f"Write these lines into a file labels.yaml and give data.labels_file=labels.yaml:\n\n{lines}"


def _comparable(name: str) -> str:
    """A name as names are compared: macOS takes letters and their accents apart."""
    return unicodedata.normalize("NFC", name).casefold()
