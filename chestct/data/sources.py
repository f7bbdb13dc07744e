"""Which files are slices, and what their folders say about them.

Three shapes of the torchvision ImageFolder convention are read: `train|valid|test/<class>/*`, `<class>/*`, and class
folders with a suffix, as in `adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib`. Nothing is dropped in silence: a folder that
maps to no label, or stands next to split folders without being one, is an error; whatever else is not used is listed.
"""

import json
import re
import shlex
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chestct.config.schema import LABEL_NAMES, DataConfig
from chestct.errors import DataError
from chestct.imaging.slice_files import walk, why_skipped

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}
"""Folder names, in lower case, that say which split their slices belong to."""

MASKS = "masks"
"""Folder next to split folders with the lesions of phantoms."""

DEPTH = 4
"""How many folders, each alone in the one above, may lie between a root and its split or class folders."""

NEGATIONS = {"free", "negative", "no", "non", "not", "or", "versus", "vs", "without"}
"""Words after a label that turn it into something else, as in `cancer free`."""

TELLING = {
    "normal": "normals?|healthy",
    "cancer": "cancer(ous)?|malignan(t|cy)|tumou?rs?|carcinomas?",
    "adenocarcinoma": "adenocarcinomas?",
    "large_cell": r"large[\W_]*cell([\W_]*carcinomas?)?",
    "squamous": r"squamous([\W_]*cell)?([\W_]*carcinomas?)?",
}
"""Names, in lower case, that say what a folder holds; NEUTRAL may follow. Other folders get no suggestion."""

NEUTRAL = r"([\W_]+(cases?|ct|images?|lungs?|patients?|scans?|slices?|[a-z]*\d\w*))*[\W_]*"


PLAIN = r"(?!(?i:true|false|null|nan|inf)$)[A-Za-z][A-Za-z0-9_.-]*"
"""Names that may stand as a key in Hydra's overrides, whose grammar cannot quote keys."""


@dataclass(frozen=True)
class SliceFile:
    """One file that should be a slice, as its folders describe it."""

    source: str
    root: Path
    path: str  # relative to root, with /
    folder_split: str  # train, valid, test, or "" where folders do not tell
    subtype: str  # a subtype, or "cancer" where the folder does not tell which


@dataclass
class Listing:
    """What lies under the roots of all sources."""

    slices: list[SliceFile] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)  # source, path (of a folder with / at the end), reason
    notes: list[str] = field(default_factory=list)  # sentences about how the folders were read


def list_slices(cfg: DataConfig) -> Listing:
    """All slice files of all sources, in a fixed order, and what is skipped.

    Raises DataError for a missing or empty root, for folders that are neither a split nor a class, for a source that
    holds no file, for a folder that cannot be listed, and for names that are no text.
    """
    if cfg.sources:
        wanted = {name: (Path(s.root), {**cfg.labels, **s.labels}) for name, s in cfg.sources.items()}
    else:
        wanted = {cfg.name: (Path(cfg.root or ""), cfg.labels)}
    listing = Listing()
    try:
        for name, (root, labels) in wanted.items():
            _Source(name, root, labels, listing).read()
    except OSError as error:
        raise DataError(f"Cannot list {error.filename}: {error.strerror}. Its slices would be missing.") from error
    for file in listing.slices:
        if (shown := _printable(file.path)) != file.path:
            raise DataError(f"The name of {file.root / shown} is not UTF-8, which no table can hold. Rename the file.")
    return listing


@dataclass
class _Source:
    """One collection; `read` adds what lies under its root to the listing."""

    name: str
    root: Path
    labels: Mapping[str, str]
    listing: Listing

    def read(self) -> None:
        if not self.root.is_dir():
            raise DataError(
                f"No folder {self.root} for the source '{self.name}'. Give its place with data.root=FOLDER, run `dvc "
                "pull` to fetch the shared data, or train on phantoms with data=phantom."
            )
        before = len(self.listing.slices)
        base = self._base()
        if base != self.root:
            shown = _printable(base.relative_to(self.root).as_posix())
            self.listing.notes.append(f"The class folders of '{self.name}' lie in {shown}/, and were read from there.")
        folders = self._folders(base)
        splits = {folder: split for folder in folders if (split := SPLIT_FOLDERS.get(folder.name.lower()))}
        if splits:
            self._leave_out([folder for folder in folders if folder not in splits], [path.name for path in splits])
            classes = [(split, below) for folder, split in splits.items() for below in self._folders(folder)]
        else:
            classes = [("", folder) for folder in folders]
        unmapped = [folder for _, folder in classes if label_of(folder.name, self.labels) is None]
        if unmapped:
            raise DataError(self._unmapped(unmapped))
        for split, folder in classes:
            self._add(split, folder)
        if len(self.listing.slices) == before:
            seen = ", ".join(sorted(_printable(p.name) for p in self.root.iterdir())[:8]) or "nothing"
            raise DataError(
                f"No class folders with files under {self.root}. Saw: {seen}. Expected {self.root}/<class>/* or "
                f"{self.root}/train|valid|test/<class>/*. Run `dvc pull`, or train on phantoms with data=phantom."
            )

    def _base(self) -> Path:
        """The folder that holds the split or class folders: the root, or one that stands alone in it."""
        base = self.root
        for _ in range(DEPTH):
            folders = [path for path in base.iterdir() if path.is_dir() and not why_skipped(path.name)]
            if any(path.name.lower() in SPLIT_FOLDERS or label_of(path.name, self.labels) for path in folders):
                way = base.relative_to(self.root).parts
                for depth in range(len(way)):
                    self._folders(self.root.joinpath(*way[:depth]))  # lists what else lies above
                return base
            if len(folders) != 1:
                break
            (base,) = folders
        return self.root

    def _folders(self, parent: Path) -> list[Path]:
        """The folders in a folder, sorted; whatever else lies there is skipped."""
        folders = []
        for path in sorted(parent.iterdir()):
            if reason := why_skipped(path.name) or ("" if path.is_dir() else "not in a class folder"):
                self._skip(path, reason)
            else:
                folders.append(path)
        return folders

    def _add(self, split: str, folder: Path) -> None:
        label = label_of(folder.name, self.labels) or ""  # never: `read` refuses what has no label
        if label == "ignore":
            self._skip(folder, "data.labels says ignore")
            return
        for path, reason in walk(folder, _fail):
            if reason:
                self._skip(path, reason)
            else:
                relative = path.relative_to(self.root).as_posix()
                self.listing.slices.append(SliceFile(self.name, self.root, relative, split, label))

    def _leave_out(self, folders: list[Path], splits: list[str]) -> None:
        """Skips folders next to split folders if they are empty or ignored, else raises DataError."""
        strays = []
        for folder in folders:
            if label_of(folder.name, self.labels) == "ignore":
                self._skip(folder, "data.labels says ignore")
            elif folder.name == MASKS:
                self._skip(folder, "lesion masks, not slices")
            elif any(not reason for _, reason in walk(folder, _fail)):
                strays.append(folder.name)
            else:
                self._skip(folder, "no files in it")
        if strays:
            raise DataError(
                f"Next to the split folders {', '.join(splits)} under {self.root} stand others, whose files would be "
                f"missing: {', '.join(map(_printable, strays))}. Rename those that are splits to train, valid or test, "
                f"and move the others away or leave them out{_advice(dict.fromkeys(strays, 'ignore'))}"
            )

    def _unmapped(self, folders: list[Path]) -> str:
        """The message about class folders without a label, with what to write for each, as far as its name says it."""
        names = sorted({folder.name for folder in folders})
        text = (
            f"Class folders under {self.root} that map to no label: {', '.join(map(_printable, names))}. Known "
            f"beginnings: {', '.join(self.labels) or 'none'}."
        )
        deeper = {path.parent for folder in folders for path in _splits_below(folder)}
        if len(deeper) == 1:
            return f"{text} Split folders lie deeper: give {shlex.quote(f'data.root={deeper.pop()}')}"
        meanings = {name: next((label for label, words in TELLING.items() if _says(name, words)), "") for name in names}
        return f"{text} Say what they hold{_advice(meanings)}"

    def _skip(self, path: Path, reason: str) -> None:
        name = _printable(path.relative_to(self.root).as_posix()) + "/" * path.is_dir()
        self.listing.skipped.append({"source": self.name, "path": name, "reason": reason})


def label_of(folder: str, labels: Mapping[str, str]) -> str | None:
    """Label of a class folder: that of the longest key that it equals or begins with (before a separator).

    None where no key fits, and where what follows the key takes it back, as in `cancer free`.
    """
    name = _comparable(folder)
    rests = {key: name.removeprefix(_comparable(key)) for key in labels if name.startswith(_comparable(key))}
    fits = [key for key, rest in rests.items() if not rest[:1].isalnum()]
    best = max(fits, key=len, default=None)
    return None if best is None or NEGATIONS & set(re.split(r"[\W_]+", rests[best])) else labels[best]


def _advice(meanings: Mapping[str, str]) -> str:
    """How to give these folders their labels, to be pasted: on the command line, or in a file where it cannot be typed.

    meanings: folder name -> label, or "" where the reader has to say it.
    """
    if all(label and re.fullmatch(PLAIN, name) for name, label in meanings.items()):
        return f": 'data.labels={{{', '.join(f'{name}: {label}' for name, label in meanings.items())}}}'"
    choices = f" # one of {', '.join(LABEL_NAMES)}"
    lines = [f"{json.dumps(name, ensure_ascii=False)}: {label or choices}" for name, label in meanings.items()]
    return ". Write these lines into a file labels.yaml and give data.labels_file=labels.yaml:\n\n" + "\n".join(lines)


def _says(name: str, words: str) -> bool:
    return re.fullmatch(f"({words}){NEUTRAL}", name.lower()) is not None


def _splits_below(folder: Path, depth: int = DEPTH) -> list[Path]:
    """Split folders within a folder, no deeper than needed."""
    below = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.is_symlink()]
    splits = [path for path in below if path.name.lower() in SPLIT_FOLDERS]
    return splits or [split for path in below if depth for split in _splits_below(path, depth - 1)]


def _comparable(name: str) -> str:
    """A name as names are compared: macOS takes letters and their accents apart."""
    return unicodedata.normalize("NFC", name).casefold()


def _printable(name: str) -> str:
    """A name with bytes that are no text shown as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _fail(error: OSError) -> None:  # else folders that may not be read would be left out in silence
    raise error
