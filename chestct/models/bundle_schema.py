"""What a bundle's folder may hold, and what bundle.json must hold, checked before anything in it is used.

What only describes the bundle (metrics) is checked as well, because the page shows it; further keys may
stand at the top and in `data`.
"""

import os
import re
import shlex
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chestct.config.schema import BLOCKS, HIGHEST_SEED, classes_of
from chestct.config.schema_serving import CARD, FACTS, FILES, TENSORS
from chestct.config.targets import foreign
from chestct.errors import BundleError

LARGEST = {TENSORS: 4_000_000_000, FACTS: 64_000_000, CARD: 4_000_000}
LARGEST |= {name: 16_000_000 if "xml" in name else 2_000_000_000 for names in FILES.values() for name in names}
"""Bytes of each file beyond which it is not read; a head on flattened maps takes 0.4 GB, a million slices 20 MB."""

LITTER = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini", re.IGNORECASE)
"""What file browsers put into any folder, and an export may remove; .git, hidden too, is none of that."""

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Three = Annotated[list[float], Field(min_length=3, max_length=3)]


class Part(BaseModel):
    """A JSON object whose keys and types are exactly these; bounds are those of the settings."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Network(Part):
    pool: Literal["gap", "max", "mean_max_std", "flatten", "topk"]
    block: Annotated[int, Field(ge=3, le=5)] | Annotated[str, Field(pattern=f"^({BLOCKS})$")] = "5"
    context: bool = False
    smooth: Annotated[float, Field(ge=0, le=4)] = 0.0
    standardise: bool = False
    hidden: Annotated[list[Annotated[int, Field(ge=1, le=65536)]], Field(max_length=16)]
    dropout: Annotated[float, Field(ge=0, le=0.95)]
    trained_convolutions: bool
    backbone: str = "vgg16"
    head: dict[str, Any] = {}  # a head of the user's own, whose class check_trusted allows or not


class Square(Part):
    size: Annotated[int, Field(ge=32, le=1024)]
    fit: Literal["pad", "stretch", "body", "lungs"]
    contrast: Literal["keep", "body", "lungs"] = "keep"


class Window(Part):
    center: float
    width: Annotated[float, Field(ge=1)]
    from_file: bool


class WeightsOf(Part):
    packaged: bool
    mean: Three
    scale: Three
    digest: str


class Point(Part):
    calibration: Annotated[dict[Literal["scale", "shift"], float], Field(min_length=2)]
    threshold: Annotated[float, Field(ge=0, le=1.001)]  # one that calls nothing cancer lies above 1
    policy: str
    coverage: Share
    quantiles: list[Share]
    validation: Annotated[dict[Literal["cancers", "found", "normals", "flagged"], Count], Field(min_length=4)]


class Splitting(Part):
    """How the slices of its own data were divided."""

    split: Literal["grouped", "official", "official_clean"]
    split_seed: Annotated[int, Field(ge=0, le=HIGHEST_SEED)]
    valid_fraction: Annotated[float, Field(ge=0.01, le=0.5)]
    test_fraction: Annotated[float, Field(ge=0.01, le=0.5)]
    folds: Annotated[int, Field(ge=0, le=50)]
    fold: Count
    allow_leakage: bool
    holdout: list[str] = []


class Data(Part, extra="allow"):
    seen: list[str]
    data_hash: str = ""
    slices: dict[str, Annotated[int, Field(ge=0, le=10_000_000)]] = {}
    splitting: Splitting | None = None


class Metric(Part, extra="allow"):
    value: float | None
    low: float | None
    high: float | None
    slices: Count


class Elsewhere(Part):
    """What the same recipe did at its threshold in a collection that was left out of training."""

    source: str
    auroc: Share
    sensitivity: Share
    specificity: Share


class Verified(Part):
    """How a backend's answers differ from torch's on the validation slices, see chestct.evaluation.backends."""

    slices: Count
    calibration: Count
    logits: Annotated[float, Field(ge=0)]
    decisions: Share
    auroc: Metric
    heat: Annotated[float, Field(ge=-1, le=1)]
    novelty: Annotated[float, Field(gt=0)] = 1.0
    version: str


class Facts(Part, extra="allow"):
    task: Literal["binary", "subtype"]
    classes: list[str]
    model: Network
    preprocess: Square
    window: Window
    weights: WeightsOf
    operating_point: Point
    files: dict[str, str]
    backends: dict[Literal["openvino", "openvino_bf16", "openvino_int8", "onnx"], Verified] = {}
    data: Data
    statistics: dict[str, Annotated[list[float], Field(min_length=2)]] = {}
    metrics: dict[str, dict[str, Metric]] = {}
    elsewhere: list[Elsewhere] = []


def check_target(folder: Path) -> None:
    """Raises BundleError unless a folder is empty or a bundle, or is not there and can be made."""
    try:
        tempfile.TemporaryFile(dir=next(filter(os.path.lexists, folder.resolve().parents))).close()
    except OSError as error:
        raise BundleError(f"No bundle can be made at {folder} ({error.strerror}): give another bundle=FOLDER") from None
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise BundleError(f"{folder} is no folder. Give another one: {shlex.quote(f'bundle={folder}-bundle')}")
    if folder.resolve().is_mount():  # which nothing can be renamed to
        raise BundleError(f"{folder} is a mount point. Give a folder in it: {shlex.quote(f'bundle={folder}/bundle')}")
    entries = sorted(entry for entry in folder.iterdir() if not LITTER.fullmatch(entry.name))
    other = [entry for entry in entries if entry.name not in LARGEST or not entry.is_file()]
    if other or (entries and not (folder / FACTS).is_file()):
        raise BundleError(
            f"{folder} holds {(other or entries)[0].name} and is no bundle: an export would remove what is in it. "
            f"Give a folder of its own: {shlex.quote(f'bundle={folder}/bundle')}"
        )


def check_facts(facts: dict[str, Any]) -> None:
    """Raises ValueError, naming the key, where the contents of bundle.json (without its digest) break a rule."""
    try:
        Facts.model_validate(facts)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    names = {TENSORS, CARD}.union(*(FILES[name] for name in facts.get("backends", {})))
    if facts["files"].keys() != names:
        raise ValueError(f"files: {', '.join(facts['files'])} are not {', '.join(sorted(names))}")
    if outside := foreign(facts["model"].get("head", {})):
        raise ValueError(f"model.head: {outside[0]} is of code outside this package and torch, and a bundle holds none")
    if tuple(facts["classes"]) != classes_of(facts["task"]):
        raise ValueError(f"classes={facts['classes']} are not those of task={facts['task']}")
