"""Settings of the data: where slices come from, and how they become pixels, splits and batches."""

from dataclasses import dataclass, field

from chestct.config.fields import setting

SUBTYPES = ("normal", "adenocarcinoma", "large_cell", "squamous")
"""Classes of `task=subtype`, in the order of the network's outputs."""

LABEL_NAMES = (*SUBTYPES, "cancer", "ignore")
"""What a class folder may map to: a subtype, cancer of unknown subtype, or nothing (`ignore`)."""


def classes_of(task: str) -> tuple[str, ...]:
    """Class names in the order of the targets 0, 1, ...: the positive class of the binary task is `cancer`."""
    return ("normal", "cancer") if task == "binary" else SUBTYPES


@dataclass
class WindowConfig:
    """The grey-value window that turns Hounsfield units (HU) into [0, 1]; used for DICOM only."""

    center: float = setting(-600.0, "window centre in HU; -600/1500 is the usual lung window")
    width: float = setting(1500.0, "window width in HU", low=1)
    from_file: bool = setting(False, "use the window stored in the DICOM file instead, where it has one")


@dataclass
class AugmentConfig:
    """Random changes of a training slice; each is drawn anew for every view. Zero switches one off."""

    flip: float = setting(0.5, "probability of a left-right flip", low=0, high=1)
    rotate: float = setting(10.0, "largest rotation in degrees, either way", low=0, high=180)
    shift: float = setting(0.05, "largest shift as a fraction of the side", low=0, high=0.5)
    zoom: float = setting(0.1, "largest zoom in or out as a fraction", low=0, high=0.9)
    shear: float = setting(5.0, "largest shear in degrees", low=0, high=60)
    window: float = setting(0.1, "largest change of grey level and of contrast, as a fraction", low=0, high=0.9)
    gamma: float = setting(0.2, "largest change of log(gamma)", low=0, high=2)
    blur: float = setting(
        0.0,
        "largest standard deviation of a Gaussian blur, as a fraction of the side: sharpness is the scanner's",
        low=0,
        high=0.1,
    )
    noise: float = setting(0.02, "largest standard deviation of added noise, in units of the grey range", low=0, high=1)


@dataclass
class PhantomConfig:
    """Synthetic thorax slices, written as ordinary class folders."""

    slices: int = setting(400, "how many slices to draw, all splits together", low=12)
    seed: int = setting(0, "seed of everything drawn")
    size: int = setting(320, "mean side of a drawn slice in pixels; single slices vary around it", low=64, high=1024)
    difficulty: float = setting(
        0.4, "0: large lesions with much reaction around them; 1: small, faint ones", low=0, high=1
    )
    cancer: float = setting(0.6, "fraction of slices with a lesion", low=0.05, high=0.95)
    format: str = setting("png", "file format", choices=("png", "dicom"))
    defects: list[str] = setting(
        [],
        "faults to plant, with their truth beside them: exact, near, across_splits, label_conflict, "
        "shortcut_window, shortcut_size, shortcut_border, odd_files",
    )
    defect_rate: float = setting(0.05, "fraction of slices that get a copy for each copying defect", low=0, high=0.5)


@dataclass
class AuditConfig:
    """What the audit does about what it finds."""

    fail_on: list[str] = setting(
        [],
        "findings that fail the validate stage: leakage, label_conflict, unreadable, shortcut, sample_size, "
        "imbalance, identifiers, shift, duplicates",
    )


@dataclass
class SourceConfig:
    """One collection of slices in class folders."""

    root: str = setting("", "folder that holds the class folders, or train/valid/test folders with class folders")
    labels: dict[str, str] = setting({}, "class folder (or how its name begins) -> label, before those of data.labels")


@dataclass
class DataConfig:
    """Where slices come from and how they become pixels, splits and batches."""

    name: str = setting("phantom", "name of the source, shown in tables")
    root: str | None = setting(None, "folder with the class folders; empty for phantoms: they are drawn when needed")
    sources: dict[str, SourceConfig] = setting({}, "several collections at once: {name: {root: ..., labels: ...}}")
    labels: dict[str, str] = setting({}, f"class folder (or how its name begins) -> one of {', '.join(LABEL_NAMES)}")
    labels_file: str | None = setting(
        None, "YAML file with more of `labels`, one a line: for folder names that a command line cannot hold"
    )
    store: str | None = setting(None, "folder for the decoded slices; empty: chosen under cache_dir")
    size: int = setting(224, "side of the square the network sees, in pixels", low=32, high=1024)
    fit: str = setting(
        "pad",
        "how a slice becomes square: pad (aspect ratio kept), stretch, or body (cropped to the body, then padded)",
        choices=("pad", "stretch", "body"),
    )
    contrast: str = setting(
        "keep",
        "grey levels: keep (as decoded), or body (stretched linearly so that the 2nd and 98th percentile around the "
        "body become black and white: brightness and contrast then tell nothing)",
        choices=("keep", "body"),
    )
    window: WindowConfig = field(default_factory=WindowConfig)
    split: str = setting(
        "grouped",
        "grouped (no group of copies in two splits), official (folders as they come), official_clean (official "
        "without copies across splits)",
        choices=("grouped", "official", "official_clean"),
    )
    split_seed: int = setting(0, "seed of the grouped split; apart from `seed` so that seeds share one test set")
    valid_fraction: float = setting(0.15, "share of the slices for validation (grouped)", low=0.01, high=0.5)
    test_fraction: float = setting(0.2, "share of the slices for test (grouped, without folds)", low=0.01, high=0.5)
    folds: int = setting(0, "k-fold cross-validation over groups: how many folds; 0 for one split", low=0, high=50)
    fold: int = setting(0, "which fold is the test set", low=0)
    allow_leakage: bool = setting(False, "train although copies of test slices are in train; stamped on all results")
    max_unreadable: int = setting(0, "how many unreadable files are tolerated", low=0)
    max_pixels: int = setting(64_000_000, "largest image that is decoded, in pixels", low=1)
    max_bytes: int = setting(256_000_000, "largest file that is read, in bytes", low=1)
    workers: int = setting(0, "processes that prepare batches; 0: the main process", low=0)
    batch_size: int = setting(32, "slices a training step, over all processes together", low=1)
    views: int = setting(
        2, "augmented variants of a slice that frozen training cycles through, beside the plain", low=0
    )
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    phantom: PhantomConfig = field(default_factory=PhantomConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
