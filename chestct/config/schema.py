"""The schema of conf/: every setting, its type, its default, what it may be, and what it means.

Hydra composes conf/ on top of these classes, so a misspelt key or a wrong type fails before anything is loaded;
`chestct.config.checks` then turns the result into plain dataclasses, so that the rest of the package sees neither
Hydra nor OmegaConf. Nothing heavy is imported here: `python train.py --help` must stay quick.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chestct.config.fields import at_home, setting
from chestct.config.schema_serving import FILES, MonitorConfig, ServeConfig

SUBTYPES = ("normal", "adenocarcinoma", "large_cell", "squamous")
"""Classes of `task=subtype`, in the order of the network's outputs."""

LABEL_NAMES = (*SUBTYPES, "cancer", "ignore")
"""What a class folder may map to: a subtype, cancer of unknown subtype, or nothing (`ignore`)."""

FINDINGS: tuple[str, ...] = ("leakage", "label_conflict", "shortcut", "unreadable", "sample_size", "imbalance")
FINDINGS += ("identifiers", "duplicates")
"""Kinds of findings of the audit, worst first."""

PHANTOM = "phantom"  # the source that is drawn where no folder is given for it


def of_patients(source: str) -> bool:
    """Whether a source's slices are of patients: next to these, phantoms are learned from and never measured."""
    return source != PHANTOM


MONITORS = ("valid/loss", "valid/auroc")

FITS, CONTRASTS = ("pad", "stretch", "body", "lungs"), ("keep", "body", "lungs")
POOLS = ("gap", "max", "mean_max_std", "flatten", "topk")
SPLITS, PROTOCOL = ("grouped", "official", "official_clean"), ("loso", "matrix", "within", "probe")
THRESHOLD = r"youden|cost|half|(sensitivity|specificity)\s*>=\s*(0?\.\d+|1(\.0*)?)"
BLOCKS = r"[345](\+[345])*"
FEATURE_BACKENDS = ("auto", "torch", "openvino", "openvino_bf16", "openvino_int8")
EXPORTS = rf"torch|({'|'.join(FILES)})(\+({'|'.join(FILES)}))*"
HIGHEST_SEED = 2**32 - 1  # that numpy and scikit-learn take
NAME = r"(?!\.+$)[^/\\\0]+"  # of a source: it becomes part of names of folders
DEVICES = r"auto|[1-9]\d*|\d+,|\d+(,\d+)+"


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
    blur: float = setting(0.0, "largest standard deviation of a blur, as a fraction of the side", low=0, high=0.1)
    noise: float = setting(0.02, "largest standard deviation of added noise, in units of the grey range", low=0, high=1)


@dataclass
class PhantomConfig:
    """Synthetic thorax slices, written as ordinary class folders."""

    slices: int = setting(400, "how many slices to draw, all splits together", low=12)
    seed: int = setting(0, "seed of everything drawn")
    size: int = setting(320, "mean side of a drawn slice in pixels; single slices vary around it", low=64, high=1024)
    difficulty: float = setting(0.4, "0: large lesions, much reaction around them; 1: small, faint ones", low=0, high=1)
    cancer: float = setting(0.6, "fraction of slices with a lesion", low=0.05, high=0.95)


@dataclass
class AuditConfig:
    """What the audit does about what it finds."""

    fail_on: list[str] = setting([], "findings that fail the validate stage", choices=FINDINGS)


@dataclass
class SourceConfig:
    """One collection of slices in class folders."""

    root: str = setting("", "folder that holds the class folders, or train/valid/test folders with class folders")
    labels: dict[str, str] = setting({}, "class folder -> label, before those of data.labels", choices=LABEL_NAMES)
    patient: str = setting("", "regular expression on a slice's path below root, whose one group is the patient")
    boxes: str = setting("", "CSV file below root with tumour boxes: file,left,top,right,bottom in pixels of the slice")
    ordered: bool = setting(False, "file numbers run in patient order: near-copy groups that interleave are one")
    weight: float = setting(1.0, "with data.balance: what its classes count next to those of others", low=0, high=100)


@dataclass
class DataConfig:
    """Where slices come from and how they become pixels, splits and batches."""

    name: str = setting(PHANTOM, "source's name in tables; a data.root's folder's; without / and \\", form=NAME)
    root: str | None = setting(None, "folder with the class folders; null for phantoms: they are drawn when needed")
    sources: dict[str, SourceConfig] = setting({}, "several collections at once: {name: {root: ..., labels: ...}}")
    labels: dict[str, str] = setting({}, "class folder (or how its name begins) -> label", choices=LABEL_NAMES)
    labels_file: str | None = setting(None, "YAML file with more of `labels`: for names that Hydra cannot read")
    store: str | None = setting(None, "folder for the decoded slices; null: chosen under cache_dir")
    size: int = setting(224, "side of the square the network sees, in pixels", low=32, high=1024)
    fit: str = setting("pad", "how it becomes square; body, lungs: cropped to them, then padded", choices=FITS)
    contrast: str = setting("keep", "grey levels; body, lungs: theirs become the same everywhere", choices=CONTRASTS)
    window: WindowConfig = field(default_factory=WindowConfig)
    holdout: list[str] = setting([], "sources that are for test alone; the others then give only train and valid")
    split: str = setting("grouped", "no copies across splits; folders as they come; or those, cleaned", choices=SPLITS)
    split_seed: int = setting(
        0, "seed of the grouped split; apart from `seed` so that seeds share one test set", low=0, high=HIGHEST_SEED
    )
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
    views: int = setting(2, "augmented variants of a slice that frozen training cycles through", low=0)
    view_seed: int = setting(0, "seed of views and drawn lesions; apart from `seed`: seeds share features", low=0)
    lesions: float = setting(0.0, "share of normal training slices shown with a drawn lesion", low=0, high=0.5)
    balance: bool = setting(False, "the classes of a source count alike in the loss, large groups less than their size")
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    phantom: PhantomConfig = field(default_factory=PhantomConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)

    @property
    def looks(self) -> int:
        """One in so many looks at a slice shows it unchanged: next to all views, with drawn lesions to two at most."""
        return 1 + (min(self.views, 2) if self.lesions else self.views)


@dataclass
class ModelConfig:
    """VGG16's convolutions and the head that stands on them."""

    backbone: str = setting("vgg16", "convolutions: vgg16, or another network of torchvision's that has `features`")
    weights: str = setting("oxford", "oxford (in the package), imagenet1k_v1 (downloaded), none (random), or a file")
    freeze: bool | int = setting(True, "true: all convolutions; false: none; 1-5: so many blocks", low=0, high=5)
    pool: str = setting(
        "gap", "gap: mean over places; max; mean_max_std; flatten: every place; topk: each is judged", choices=POOLS
    )
    block: str = setting("5", "which of VGG's blocks the head sees, 3, 4 or 5, or several, as in 3+4", form=BLOCKS)
    context: bool = setting(False, "with pool=topk: a place is also compared with the mean of its slice")
    smooth: float = setting(0.0, "with pool=topk: over how many places evidence is averaged (spread)", low=0, high=4)
    standardise: bool = setting(False, "features minus their mean in train, divided by their spread there")
    hidden: list[int] = setting([], "widths of hidden layers between features and output", low=1)
    head: dict[str, Any] = setting({}, "a head of your own: {_target_: CLASS}, made with in_features and out_features")
    dropout: float = setting(0.0, "dropout before every linear layer of the head", low=0, high=0.95)


@dataclass
class FeaturesConfig:
    """The frozen convolutions' outputs, computed once."""

    cache: bool = setting(True, "keep them on disk and train the head on them; false: run the convolutions every step")
    backend: str = setting("torch", "what computes them; auto: the quickest exact one here", choices=FEATURE_BACKENDS)
    batch_size: int = setting(16, "slices a forward pass while they are computed", low=1)


@dataclass
class OptimConfig:
    """Loss, optimiser and learning-rate schedule."""

    name: str = setting("adamw", "optimiser", choices=("adamw", "sgd"))
    lr: float = setting(1e-2, "learning rate of the head", low=0)
    backbone_lr_ratio: float = setting(2e-3, "learning rate of the convolutions, relative to the head's", low=0, high=1)
    weight_decay: float = setting(0.3, "weight decay", low=0)
    momentum: float = setting(0.9, "momentum (sgd)", low=0, high=1)
    optimizer: dict[str, Any] = setting({}, "another optimiser: {_target_: CLASS, ...}, made with the parameter groups")
    scheduler: dict[str, Any] = setting({}, "another schedule: {_target_: CLASS, ...}, stepped every epoch")
    schedule: str = setting("cosine", "learning rate over time", choices=("constant", "cosine", "one_cycle"))
    warmup: float = setting(0.1, "share of all steps over which the learning rate rises", low=0, high=0.9)
    label_smoothing: float = setting(0.0, "how far targets move towards the uniform distribution", low=0, high=0.5)
    places: float = setting(1.0, "with model.pool=topk: weight of the loss at places that are known", low=0, high=100)
    class_weights: bool = setting(True, "weigh classes inversely to their frequency in train")


@dataclass
class TrainerConfig:
    """How long, on what, and when to stop."""

    max_epochs: int = setting(40, "epochs at most", low=1)
    patience: int = setting(10, "epochs without a better `monitor` before stopping early; 0: never", low=0)
    monitor: str = setting("valid/loss", "validation metric that picks the best checkpoint", choices=MONITORS)
    unfreeze_epoch: int = setting(0, "epoch at which the last convolution blocks join in (two-stage); 0: never", low=0)
    unfreeze_blocks: int = setting(2, "how many of the five blocks then join in, counted from the head", low=1, high=5)
    accelerator: str = setting("auto", "device", choices=("auto", "cpu", "gpu", "cuda", "mps"))
    strategy: str = setting("single", "one process (single), or one a device (ddp)", choices=("single", "ddp"))
    devices: str = setting("auto", "devices of a machine: how many (2), which ('0,1' or '1,'), or auto", form=DEVICES)
    num_nodes: int = setting(1, "machines (ddp); torchrun or srun starts the processes of several", low=1)
    precision: str = setting("32-true", "arithmetic", choices=("32-true", "bf16-mixed", "16-mixed"))
    compile: bool = setting(False, "compile the network for the device: minutes at first, steps are shorter then")
    deterministic: bool = setting(True, "only algorithms that repeat exactly")
    progress: bool = setting(True, "show progress bars")
    args: dict[str, Any] = setting({}, "any other argument of Lightning's Trainer: {gradient_clip_val: 1.0}")

    @property
    def mode(self) -> str:
        """Whether a smaller or a larger `monitor` is better: min or max."""
        return "min" if self.monitor.endswith("loss") else "max"


@dataclass
class EvaluationConfig:
    """What is measured, and how the operating point is chosen; all of it from validation slices."""

    threshold: str = setting(
        "half",
        "score that counts as cancer: half, youden, sensitivity>=0.95, specificity>=0.95, cost; sources count alike",
        form=THRESHOLD,
    )
    cost_ratio: float = setting(5.0, "with `cost`: what a missed cancer costs, in false alarms", low=0.01, high=1000)
    coverage: float = setting(0.9, "share of each class whose conformal set holds the truth", low=0.5, high=0.999)
    resamples: int = setting(2000, "bootstrap resamples over groups behind each interval", low=100, high=100_000)
    policies: bool = setting(False, "train the same head under every split policy too (frozen models only)")
    protocol: list[str] = setting([], "parts of docs/protocol.md to measure, with `seeds` (frozen)", choices=PROTOCOL)
    phantoms: int = setting(0, "phantoms with known lesions on which heat maps are checked; 0: not checked", low=0)
    novelty: int = setting(0, "pictures of each kind that is no chest CT on which novelty is measured; 0: none", low=0)
    robustness: int = setting(0, "test slices that are scored again after graded changes; 0: none", low=0)
    gallery: int = setting(6, "slices a row of the report's galleries", low=0, high=50)
    report: bool = setting(True, "after training, test, write report and bundle; false: validate only (for searches)")


@dataclass
class TrackingConfig:
    """Where runs are recorded."""

    name: str = setting("mlflow", "mlflow, dagshub or off", choices=("mlflow", "dagshub", "off"))
    uri: str | None = setting(None, "https://SERVER or sqlite:///FILE; null: MLFLOW_TRACKING_URI, else local")
    local: str = setting("sqlite:///mlflow.db", "store on this machine, which every run is written to")
    owner: str | None = setting(None, "owner of the repository on DagsHub (tracking=dagshub)")
    repo: str | None = setting(None, "name of the repository on DagsHub (tracking=dagshub)")
    experiment: str = setting("chestct", "MLflow experiment")
    run_name: str | None = setting(None, "name of the run; null: its DVC experiment's, its sweep's, or invented")
    log_model: bool = setting(True, "keep the best checkpoint and the bundle, as an MLflow model, with the run")
    register: str | None = setting(None, "register the bundle under this name, and call it the champion of that name")


@dataclass
class Config:
    """Everything a run depends on."""

    task: str = setting("binary", "cancer or normal; or normal and three subtypes", choices=("binary", "subtype"))
    seed: int = setting(0, "seed of initial weights, order and views", low=0, high=HIGHEST_SEED)
    ckpt: str | None = setting(None, "a .ckpt file, a run folder, or `last` for the newest run")
    cache_dir: str = setting(".cache", "folder for phantoms, decoded slices and features; safe to delete")
    bundle: str | None = setting(None, "bundle: a folder, `packaged`, hf://USER/NAME, models:/NAME@champion, runs:/ID")
    format: str = setting("torch", "export: backends that the bundle gets, one or several: openvino+onnx", form=EXPORTS)
    compare: list[str] = setting([], "two evaluations to compare, slice by slice: run folders or predictions.parquet")
    callbacks: dict[str, Any] = setting({}, "callbacks of Lightning's or your own: {NAME: {_target_: CLASS, ...}}")
    loggers: dict[str, Any] = setting({}, "loggers next to MLflow's: {NAME: {_target_: CLASS, ...}}")
    trust: list[str] = setting([], "packages whose classes a checkpoint's settings may name, see docs/extend.md")
    seeds: int = setting(1, "trainings with seed, seed+1, ...; the end is their mean and spread", low=1, high=1000)
    runs_dir: str = setting("runs", "folder under which `ckpt=last` looks for runs")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    @property
    def cache(self) -> Path:
        """The folder `cache_dir`, which all experiments of a repository share."""
        return at_home(self.cache_dir)

    @property
    def starts_frozen(self) -> bool:
        """Whether all convolutions are fixed when training begins. (1 would equal True, hence `is`.)"""
        return self.model.freeze is True or self.model.freeze == 5

    @property
    def always_frozen(self) -> bool:
        """Whether the convolutions stay the given weights throughout, so that a checkpoint need not hold them."""
        return self.starts_frozen and not self.trainer.unfreeze_epoch

    def frozen_at(self, epoch: int) -> bool:
        """Whether no convolution trains in this epoch."""
        return self.starts_frozen and not 0 < self.trainer.unfreeze_epoch <= epoch
