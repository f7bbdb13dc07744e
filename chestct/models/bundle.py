"""The deployable folder: weights, preprocessing, operating point, what the training data looked like, and a model card.

Safetensors and JSON only, with the hash of every file, so that a bundle from a stranger can do no harm and an altered
one is noticed. A head on the packaged convolutions makes a bundle of some kilobytes; torch is all that loading needs.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load, save

from chestct.config.schema import ModelConfig, WindowConfig
from chestct.config.schema_serving import CARD, FACTS, FILES, TENSORS
from chestct.config.targets import check_trusted
from chestct.errors import BundleError, WeightsError, out_of_memory
from chestct.files import digest, json_digest, read_regular
from chestct.imaging.preprocess import Preprocess
from chestct.models.backends import Graph, choose, load_graph
from chestct.models.bundle_schema import LARGEST, check_facts, check_target
from chestct.models.head import has_places
from chestct.models.novelty import NoveltyModel
from chestct.models.operating_point import OperatingPoint, Outputs
from chestct.models.saliency import explained_output, heat, normalised_cam
from chestct.models.vgg16 import VGG16
from chestct.models.weights import PACKAGED_SHA256, Weights, load_weights
from chestct.version import __version__

SCHEMA = 2
"""Version of bundle.json; any other is refused. 2: the baseline of heat maps has a mean and a spread."""

PACKAGED_BUNDLE = Path(__file__).with_name("bundle")
"""The bundle in the package, trained on real slices; its model card says on which."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """A trained network with all that is needed to use it on a file.

    facts: bundle.json. `Bundle.predict` is the one way from squares to answers, for evaluation and serving alike.
    """

    net: VGG16
    point: OperatingPoint
    novelty_model: NoveltyModel
    baseline: torch.Tensor | None  # what normal training slices show, see saliency; None where a head judges places
    facts: dict[str, Any]
    card: str = ""
    backend: str = "torch"
    graph: Graph | None = None  # of another backend, in place of the network; see chestct.models.backends
    files: Mapping[str, bytes] = field(default_factory=dict)  # of backends, for `save_bundle`

    @property
    def id(self) -> str:
        """Twelve hex digits that change with anything in the bundle, and what answers where that is not torch."""
        return str(self.facts.get("digest", ""))[:12] + (f"-{self.backend}" if self.graph else "")

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

    @property
    def elsewhere(self) -> str:
        """How the same recipe did at its threshold in collections that it had not seen; "" where that is not known."""
        if not (rows := self.facts.get("elsewhere", [])):
            return ""
        found, flagged = [row["sensitivity"] for row in rows], [1 - row["specificity"] for row in rows]
        cancers, normals = (f"{100 * min(part):.0f} to {100 * max(part):.0f} %" for part in (found, flagged))
        return (
            f"In {len(rows)} collections, each left out of training in turn, a threshold set this way called {cancers} "
            f"of the slices with cancer possible cancer, and {normals} of the normal ones."
        )

    @cached_property
    def seen(self) -> frozenset[str]:
        """The first 16 digits of the content hash of every slice in train or valid."""
        return frozenset(self.facts["data"]["seen"])

    @torch.no_grad()
    def predict(self, images: np.ndarray, explain: bool = False, rows: np.ndarray | None = None) -> Outputs:
        """Answers for squares as `preprocess` makes them, uint8 [N, S, S] or float32 in [0, 1].

        rows: int [M], which of them; None: all.
        """
        parts = []
        for x in self.net.batches(images, rows=rows):
            answer, conv5 = self.graph(x) if self.graph else self.net.answer(x)
            maps = self.net.pool(conv5)
            batch_logits = answer.cpu().numpy()
            distances = self.novelty_model.distance(self.net.channel_means(maps).cpu()).numpy()
            shown = np.empty(0)
            if explain:
                cam = normalised_cam(self.net, conv5, explained_output(batch_logits), self.baseline)[1]
                shown = heat(cam).cpu().numpy()
            parts.append((batch_logits, distances, shown))
        logits, novelty, heats = (np.concatenate(part) for part in zip(*parts, strict=True))
        probabilities = self.point.probabilities(logits)
        decision = self.point.decide(probabilities, novelty)
        return Outputs(logits, probabilities, decision, novelty, heats if explain else None)


def save_bundle(folder: Path, bundle: Bundle) -> Bundle:
    """Writes a bundle whole or not at all, and returns it as loaded from there.

    The convolutions are written too unless they are the packaged ones and were not trained further. bundle.facts: task,
    classes, model, preprocess, window, data and whatever else is worth knowing; `backends` goes with bundle.files.
    Raises BundleError where the folder holds anything but a bundle.
    """
    net = bundle.net
    packaged = net.digest == PACKAGED_SHA256 and not bundle.facts["model"]["trained_convolutions"]
    tensors = {f"head.{key}": value for key, value in net.head.state_dict().items()}
    if not packaged:
        tensors |= {f"features.{key}": value for key, value in net.features.state_dict().items()}
    tensors |= {f"novelty.{key}": value for key, value in asdict(bundle.novelty_model).items()}
    tensors |= {} if bundle.baseline is None else {"saliency.baseline": bundle.baseline}
    files = {TENSORS: save({key: value.contiguous() for key, value in tensors.items()}), CARD: bundle.card.encode()}
    files |= bundle.files
    mean, scale = net.mean.flatten().tolist(), net.scale.flatten().tolist()
    facts = {
        "schema": SCHEMA,
        "chestct": __version__,
        **{key: value for key, value in bundle.facts.items() if key != "digest"},
        "weights": {"packaged": packaged, "mean": mean, "scale": scale, "digest": net.digest},
        "operating_point": asdict(bundle.point),
        "files": {name: digest(data) for name, data in files.items()},
    }
    facts = json.loads(json.dumps(facts, allow_nan=False))
    check_facts(facts)
    text = json.dumps(facts | {"digest": json_digest(facts)}, indent=1) + "\n"
    folder = folder.resolve()  # a link goes on leading to its folder, which gets the bundle
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock_of(folder):
        _replace(folder, files | {FACTS: text.encode()})
        return load_bundle(folder)


def lock_of(folder: Path) -> FileLock:
    """What exports to one folder wait for each other by; who holds it may take it again."""
    folder = folder.resolve()
    return FileLock(folder.with_name(f".{folder.name}.lock"), is_singleton=True)


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Puts files in the place of what is in `folder`, all or none; puts back or removes what a killed export left."""
    new, old = (folder.with_name(f".{folder.name}.bundle-{which}") for which in ("new", "old"))
    if old.exists() and not os.path.lexists(folder):
        old.replace(folder)
    check_target(folder)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        for name, data in files.items():
            (new / name).write_bytes(data)
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # what a full disk could not take
    shutil.rmtree(old, ignore_errors=True)


def bundle_path(source: str | Path) -> Path:
    """The folder of a bundle, which `packaged` is a name of."""
    return PACKAGED_BUNDLE if str(source) == "packaged" else Path(source)


def load_bundle(source: str | Path, backend: str = "torch", accelerator: str = "cpu") -> Bundle:
    """The bundle in a folder; `packaged` is the one in the package.

    backend, accelerator: what it computes with and on, as `chestct.models.backends.choose` takes them. Raises
    BundleError where something is missing, altered, unexpected, out of bounds or of another version, and ConfigError
    where the backend cannot be had.
    """
    folder = bundle_path(source)
    facts = _read_facts(folder)
    files = {name: _read(folder, name, facts["files"][name]) for name in (TENSORS, CARD)}
    name, device = choose(backend, facts.get("backends", {}), accelerator)
    parts = [_read(folder, file, facts["files"][file]) for file in FILES.get(name, ())]
    try:
        tensors = load(files[TENSORS])
        net = _network(facts, tensors, folder).eval().requires_grad_(False).to(device)
        novelty_model = NoveltyModel.from_tensors(_part(tensors, "novelty."))
        if parts:
            mark = facts["backends"][name].get("novelty", 1.0)
            novelty_model = replace(novelty_model, threshold=novelty_model.threshold * mark)
        bundle = Bundle(
            net,
            OperatingPoint.from_dict(facts["operating_point"]),
            novelty_model,
            None if has_places(net.head) else tensors["saliency.baseline"],
            facts,
            files[CARD].decode(),
            backend=name,
            graph=load_graph(name, parts) if parts else None,
        )
        size = facts["preprocess"]["size"]
        bundle.predict(np.zeros((1, size, size), np.uint8), explain=True)  # whether all parts fit each other
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        reason = str(error).splitlines()[-1].strip()
        raise BundleError(f"The bundle {folder} cannot be used: {reason}. Export it again.") from None
    return bundle


def backend_files(folder: Path, facts: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of all backends of the bundle in a folder, by name."""
    names = [file for name in facts.get("backends", {}) for file in FILES[name]]
    return {name: _read(folder, name, facts["files"][name]) for name in names}


def _read_facts(folder: Path) -> dict[str, Any]:
    """bundle.json, checked."""
    path = folder / FACTS
    try:
        facts = json.loads(_read(folder, FACTS))
        schema, stated = facts["schema"], facts.pop("digest")
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
    return facts | {"digest": stated}


def _read(folder: Path, name: str, expected: str = "") -> bytes:
    try:
        data = read_regular(folder / name, LARGEST[name])
    except (FileNotFoundError, NotADirectoryError):
        if name != FACTS:
            raise BundleError(f"The bundle lacks {folder / name}. Export it again.") from None
        raise BundleError(
            f"No bundle in {folder}: there is no {FACTS}. Make one with `chestct export ckpt=last`, or use "
            "bundle=packaged."
        ) from None
    except OSError as error:
        way_out = "Let this user read it, or export it again."
        raise BundleError(f"The bundle cannot be read: {folder / name} ({error.strerror}). {way_out}") from None
    if expected and digest(data) != expected:
        raise BundleError(f"{folder / name} was altered after the bundle was written (wrong SHA-256). Export it again.")
    return data


def _network(facts: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> VGG16:
    about = facts["weights"]
    model = {key: value for key, value in facts["model"].items() if key != "trained_convolutions"}
    if about["packaged"]:
        weights = load_weights("oxford")
        if weights.digest != about["digest"]:
            raise WeightsError(f"The bundle {folder} was made for other packaged weights. Install its chestct version.")
    else:
        mean, scale = tuple(about["mean"]), tuple(about["scale"])
        weights = Weights(_part(tensors, "features."), mean, scale, about["digest"])
    cfg = ModelConfig(**model)
    check_trusted(cfg.head, f"The bundle {folder}")
    outputs = 1 if facts["task"] == "binary" else len(facts["classes"])
    with torch.device("meta"):  # no memory is taken for what bundle.json says
        net = VGG16(cfg, outputs, facts["preprocess"]["size"], weights)
    net.head.load_state_dict(_part(tensors, "head."), assign=True)
    return net


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
