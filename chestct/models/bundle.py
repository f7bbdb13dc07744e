"""The deployable folder: weights, preprocessing, operating point, what the training data looked like, and a model card.

Safetensors and JSON only, with the hash of every file, so that a bundle from a stranger can do no harm and an altered
one is noticed. A head on the packaged convolutions makes a bundle of some kilobytes; torch is all that loading needs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

import chestct
from chestct.config.schema import ModelConfig, WindowConfig
from chestct.config.targets import check_trusted
from chestct.errors import BundleError, WeightsError
from chestct.files import digest, json_digest, read_regular
from chestct.imaging.preprocess import Preprocess
from chestct.models.bundle_folder import CARD, FACTS, TENSORS, replacing
from chestct.models.bundle_schema import check_facts
from chestct.models.novelty import NoveltyModel, channel_means
from chestct.models.operating_point import OperatingPoint
from chestct.models.saliency import explained_output, heat, normalised_cam
from chestct.models.vgg16 import VGG16
from chestct.models.weights import PACKAGED_SHA256, Weights, load_weights

SCHEMA = 2
"""Version of bundle.json; any other is refused. 2: the baseline of heat maps has a mean and a spread."""

PACKAGED_BUNDLE = Path(__file__).with_name("bundle")
"""The bundle in the package, trained on real slices; its model card says on which."""

LARGEST = {TENSORS: 4_000_000_000, FACTS: 64_000_000, CARD: 4_000_000}
"""Bytes of each file beyond which it is not read; a head on flattened maps takes 0.4 GB, a million slices 20 MB."""


@dataclass(frozen=True)
class Outputs:
    """What a bundle says of N slices."""

    logits: np.ndarray  # float32 [N, 1] or [N, classes]
    probabilities: np.ndarray  # float64 [N, classes], calibrated
    decision: np.ndarray  # str [N]: cancer, normal or uncertain
    novelty: np.ndarray  # float32 [N]; above 1 a slice is too far from the training data
    heat: np.ndarray | None  # float32 [N, h, w] in [0, 1], what speaks for cancer more than in normal slices

    @property
    def score(self) -> np.ndarray:
        """P(cancer), float64 [N]."""
        return 1 - self.probabilities[:, 0]


@dataclass(frozen=True, eq=False)
class Bundle:
    """A trained network with all that is needed to use it on a file.

    facts: bundle.json. `Bundle.predict` is the one way from squares to answers, for evaluation and serving alike.
    """

    net: VGG16
    point: OperatingPoint
    novelty_model: NoveltyModel
    baseline: torch.Tensor  # what normal training slices show, see chestct.models.saliency
    facts: dict[str, Any]
    card: str = ""

    @property
    def id(self) -> str:
        """Twelve hex digits that change with anything in the bundle."""
        return str(self.facts.get("digest", ""))[:12]

    @property
    def task(self) -> str:
        return str(self.facts["task"])

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the columns of `Outputs.probabilities`; the first is normal."""
        return tuple(self.facts["classes"])

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(**self.facts["preprocess"])

    @property
    def window(self) -> WindowConfig:
        """The window for DICOM files, unless another is given."""
        return WindowConfig(**self.facts["window"])

    @cached_property
    def seen(self) -> frozenset[str]:
        """The first 16 digits of the content hash of every slice in train or valid."""
        return frozenset(self.facts["data"]["seen"])

    @torch.no_grad()
    def predict(self, images: np.ndarray, explain: bool = False) -> Outputs:
        """Answers for uint8 [N, S, S], squares as `preprocess` makes them; float32 [N, S, S] in [0, 1] works too."""
        parts = [self._seen(x, explain) for x in self.net.batches(images)]
        logits, novelty, heat = (np.concatenate(part) for part in zip(*parts, strict=True))
        probabilities = self.point.probabilities(logits)
        decision = self.point.decide(probabilities, novelty)
        return Outputs(logits, probabilities, decision, novelty, heat if explain else None)

    def _seen(self, x: torch.Tensor, explain: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits, novelty and heat (without `explain`: nothing) of slices float [B, 1, S, S]."""
        conv5 = self.net.conv5(x)
        maps = self.net.pool(conv5)
        logits = self.net.head(maps).cpu().numpy()
        shown = np.empty(0)
        if explain:
            shown = heat(normalised_cam(self.net, conv5, explained_output(logits), self.baseline)[1]).cpu().numpy()
        return logits, self.novelty_model.distance(channel_means(maps, self.net.channels).cpu()).numpy(), shown


def save_bundle(
    folder: Path,
    net: VGG16,
    point: OperatingPoint,
    novelty_model: NoveltyModel,
    baseline: torch.Tensor,
    facts: dict[str, Any],
    card: str,
) -> Bundle:
    """Writes a bundle whole or not at all, and returns it as loaded from there.

    The convolutions are written too unless they are the packaged ones and were not trained further. facts: task,
    classes, model, preprocess, window, data and whatever else is worth knowing. Raises BundleError where the folder
    holds anything but a bundle.
    """
    own = net.digest != PACKAGED_SHA256 or facts["model"]["trained_convolutions"]
    tensors = {f"head.{key}": value for key, value in net.head.state_dict().items()}
    if own:
        tensors |= {f"features.{key}": value for key, value in net.features.state_dict().items()}
    tensors |= {f"novelty.{key}": value for key, value in novelty_model.to_tensors().items()}
    tensors["saliency.baseline"] = baseline
    facts = {
        "schema": SCHEMA,
        "chestct": chestct.__version__,
        **facts,
        "weights": {
            "packaged": not own,
            "mean": net.mean.flatten().tolist(),
            "scale": net.scale.flatten().tolist(),
            "digest": net.digest,
        },
        "operating_point": point.to_dict(),
    }
    with replacing(folder) as new:
        save_file({key: value.contiguous() for key, value in tensors.items()}, new / TENSORS)
        (new / TENSORS).chmod(0o644)  # safetensors' files are for one user
        (new / CARD).write_bytes(card.encode())
        facts["files"] = {name: digest((new / name).read_bytes()) for name in (TENSORS, CARD)}
        facts = json.loads(json.dumps(facts, allow_nan=False))
        check_facts(facts)
        text = json.dumps(facts | {"digest": json_digest(facts)}, indent=1) + "\n"
        (new / FACTS).write_bytes(text.encode())
    return load_bundle(folder)


def load_bundle(source: str | Path) -> Bundle:
    """The bundle in a folder; `packaged` is the one in the package.

    Raises BundleError where something is missing, altered, unexpected, out of bounds or of a newer version.
    """
    folder = PACKAGED_BUNDLE if str(source) == "packaged" else Path(source)
    facts = _read_facts(folder)
    files = {name: _read(folder, name, facts["files"][name]) for name in (TENSORS, CARD)}
    try:
        tensors = load(files[TENSORS])
        net = _network(facts, tensors, folder)
        novelty_model = NoveltyModel.from_tensors(_part(tensors, "novelty."))
        baseline = tensors["saliency.baseline"]
        if baseline.shape[:2] != (2, 1 if facts["task"] == "binary" else len(facts["classes"])):
            raise ValueError(f"saliency.baseline is shaped {list(baseline.shape)}")
        point = OperatingPoint.from_dict(facts["operating_point"])
        card = files[CARD].decode()
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BundleError(
            f"The bundle {folder} cannot be used: {str(error).splitlines()[0]}. Export it again."
        ) from None
    return Bundle(net.eval().requires_grad_(False), point, novelty_model, baseline, facts, card)


def _read_facts(folder: Path) -> dict[str, Any]:
    """bundle.json, checked."""
    path = folder / FACTS
    if not path.exists():
        raise BundleError(
            f"No bundle in {folder}: there is no {FACTS}. Make one with `chestct export ckpt=last`, or use "
            "bundle=packaged."
        )
    try:
        facts = json.loads(_read(folder, FACTS), parse_constant=_refuse)
        schema = facts["schema"]
        stated = facts.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BundleError(f"{path} is damaged. Export the bundle again.") from None
    if schema != SCHEMA:
        newer = not isinstance(schema, int) or schema > SCHEMA
        way_out = "Update chestct." if newer else "Export it again from its checkpoint: chestct export ckpt=..."
        raise BundleError(f"The bundle {folder} has schema {schema}; this version of chestct reads {SCHEMA}. {way_out}")
    if stated != json_digest(facts):
        raise BundleError(f"{path} was altered after it was written. Export the bundle again.")
    try:
        check_facts(facts)
    except ValueError as error:
        raise BundleError(f"{path} is not a bundle's: {error}. Export the bundle again.") from None
    unexpected = sorted(
        entry.name for entry in folder.iterdir() if entry.name not in (TENSORS, FACTS, CARD) and entry.name[0] != "."
    )
    if unexpected:
        raise BundleError(
            f"The bundle {folder} holds a file that does not belong to it: {unexpected[0]}. A bundle is {TENSORS}, "
            f"{FACTS} and {CARD}; remove anything else."
        )
    return facts | {"digest": stated}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _read(folder: Path, name: str, expected: str = "") -> bytes:
    try:
        data = read_regular(folder / name, LARGEST[name])
    except OSError as error:
        what = "lacks" if isinstance(error, FileNotFoundError) else "cannot be read:"
        raise BundleError(f"The bundle {what} {folder / name} ({error.strerror}). Export it again.") from None
    if expected and digest(data) != expected:
        raise BundleError(f"{folder / name} was altered after the bundle was written (wrong SHA-256). Export it again.")
    return data


def _network(facts: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> VGG16:
    about, model = facts["weights"], facts["model"]
    if about["packaged"]:
        weights = load_weights("oxford")
        if weights.digest != about["digest"]:
            raise WeightsError(f"The bundle {folder} was made for other packaged weights. Install its chestct version.")
    else:
        mean, scale, backbone = tuple(about["mean"]), tuple(about["scale"]), model.get("backbone", "vgg16")
        weights = Weights("bundle", _part(tensors, "features."), mean, scale, about["digest"], backbone)
    outputs = 1 if facts["task"] == "binary" else len(facts["classes"])
    head = _part(tensors, "head.")
    cfg = ModelConfig(pool=model["pool"], hidden=model["hidden"], dropout=model["dropout"], head=model.get("head", {}))
    check_trusted(cfg.head, f"The bundle {folder}")
    if not cfg.head:  # before memory is taken for what bundle.json says
        layers = sorted((int(key.split(".")[0]), len(w)) for key, w in head.items() if key.endswith(".weight"))
        if (widths := [width for _, width in layers]) != [*model["hidden"], outputs]:
            raise ValueError(f"the head's layers are {widths} wide, not {[*model['hidden'], outputs]}")
    net = VGG16(cfg, outputs, facts["preprocess"]["size"], weights)
    net.head.load_state_dict(head)
    return net


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
