import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from chestct.config.schema import EvaluationConfig, ModelConfig
from chestct.errors import BundleError
from chestct.models.bundle import CARD, FACTS, TENSORS, Bundle, load_bundle, save_bundle
from chestct.models.novelty import channel_means, fit_reference
from chestct.models.operating_point import OperatingPoint
from chestct.models.predictions import to_scores
from chestct.models.saliency import normal_evidence
from chestct.models.vgg16 import VGG16
from chestct.models.weights import load_weights

SIZE = 32


def squares(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE), np.uint8)


def make(folder: Path, *, trained: bool = False, classes: int = 2, pool: str = "gap") -> Bundle:
    torch.manual_seed(0)
    loaded = load_weights("oxford")
    net = VGG16(ModelConfig(pool=pool), 1 if classes == 2 else classes, SIZE, loaded).eval()
    with torch.no_grad():
        maps = net.maps(torch.from_numpy(squares(24)).unsqueeze(1).float() / 255)
        logits = net.head(maps).numpy()
    targets = np.arange(24) % classes
    point = OperatingPoint.fit(logits, targets, EvaluationConfig(threshold="youden"))
    pooled = channel_means(maps)
    facts = {
        "task": "binary" if classes == 2 else "subtype",
        "classes": ["normal", "cancer"] if classes == 2 else ["normal", "adenocarcinoma", "large_cell", "squamous"],
        "model": {"pool": pool, "hidden": [], "dropout": 0.0, "trained_convolutions": trained},
        "preprocess": {"size": SIZE, "fit": "pad"},
        "window": {"center": -600.0, "width": 1500.0, "from_file": False},
        "data": {"data_hash": "0" * 64, "seen": []},
    }
    with torch.no_grad():
        baseline = normal_evidence(net, net.fine_maps(torch.from_numpy(squares(4)).unsqueeze(1).float() / 255))
    return save_bundle(folder, net, point, fit_reference(pooled, pooled), baseline, facts, "# Card\n")


@pytest.fixture
def folder(small_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_bundle, tmp_path / "bundle"))


def test_a_head_on_packaged_convolutions_makes_a_small_bundle(small_bundle: Path) -> None:
    assert sum(path.stat().st_size for path in small_bundle.iterdir()) < 150_000
    assert {path.name for path in small_bundle.iterdir()} == {TENSORS, FACTS, CARD}


@pytest.mark.parametrize(("classes", "pool"), [(2, "gap"), (4, "gap"), (2, "flatten")])
def test_a_loaded_bundle_answers_as_the_network_did(tmp_path: Path, classes: int, pool: str) -> None:
    make(tmp_path / "b", classes=classes, pool=pool)
    loaded = load_bundle(tmp_path / "b")
    torch.manual_seed(0)
    net = VGG16(ModelConfig(pool=pool), 1 if classes == 2 else classes, SIZE, load_weights("oxford")).eval()
    net.head.load_state_dict(loaded.net.head.state_dict())
    images = squares(5, seed=1)
    with torch.no_grad():
        logits = net(torch.from_numpy(images).unsqueeze(1).float() / 255).numpy()
    found = loaded.predict(images, explain=True)
    assert np.abs(found.logits - logits).max() < 1e-5
    scaled = loaded.point.calibration.scale * logits + loaded.point.calibration.shift
    expected = to_scores(scaled)
    assert np.abs(found.score - (expected[:, 0] if classes == 2 else 1 - expected[:, 0])).max() < 1e-6
    assert found.heat is not None
    assert found.heat.shape == (5, 2, 2)
    assert found.probabilities.sum(1) == pytest.approx(np.ones(5))


def test_convolutions_that_were_trained_travel_with_the_bundle(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", trained=True)
    assert (tmp_path / "b" / TENSORS).stat().st_size > 50e6
    assert bundle.predict(squares(2)).score == pytest.approx(make(tmp_path / "c").predict(squares(2)).score, abs=1e-6)


def test_single_slices_and_batches_get_the_same_answers(small_bundle: Path) -> None:
    bundle, images = load_bundle(small_bundle), squares(6, seed=2)
    together = bundle.predict(images).score
    assert together == pytest.approx([bundle.predict(image[None]).score[0] for image in images], abs=1e-5)


def test_a_bundle_is_replaced_whole(folder: Path) -> None:
    before = load_bundle(folder).id
    make(folder, classes=4)
    assert load_bundle(folder).id != before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_loading_imports_nothing_that_trains_or_serves(small_bundle: Path) -> None:
    code = (
        f"from chestct.models.bundle import load_bundle; load_bundle({str(small_bundle)!r}); import sys; "
        "print([m for m in ('lightning', 'hydra', 'mlflow', 'dvc', 'gradio', 'sklearn', 'pandas', 'torchvision', "
        "'scipy', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", [TENSORS, CARD])
def test_an_altered_file_is_refused(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} was altered"):
        load_bundle(folder)


def test_an_altered_threshold_is_refused(folder: Path) -> None:
    facts = json.loads((folder / FACTS).read_text())
    facts["operating_point"]["threshold"] = 0.01
    (folder / FACTS).write_text(json.dumps(facts))
    with pytest.raises(BundleError, match="was altered"):
        load_bundle(folder)


@pytest.mark.parametrize("name", [TENSORS, CARD])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"lacks .*{name}"):
        load_bundle(folder)


def test_a_folder_without_a_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"chestct\.export"):
        load_bundle(tmp_path / "nothing")


@pytest.mark.parametrize(("schema", "way_out"), [(99, "Update chestct"), (1, "Export it again")])
def test_another_schema_is_refused_with_the_way_out(folder: Path, schema: int, way_out: str) -> None:
    facts = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps(facts | {"schema": schema}))
    with pytest.raises(BundleError, match=f"schema {schema};.*{way_out}"):
        load_bundle(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": "x", "digest": "0"}', "\xff"])
def test_damaged_facts_are_refused(folder: Path, text: str) -> None:
    (folder / FACTS).write_text(text, "latin-1")
    with pytest.raises(BundleError):
        load_bundle(folder)


def test_a_pickle_inside_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "sprung",)

    (folder / "extra.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(BundleError, match=r"extra\.pkl"):
        load_bundle(folder)
    (folder / "extra.pkl").replace(folder / TENSORS)
    with pytest.raises(BundleError):
        load_bundle(folder)
    assert not (tmp_path / "sprung").exists()
