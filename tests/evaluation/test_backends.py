"""Backends of a bundle: verified on validation slices before they are kept, and refused with their numbers."""

import dataclasses
import importlib.metadata
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from chestct import experiment
from chestct.config.compose import compose
from chestct.config.schema import Config
from chestct.config.schema_serving import FILES
from chestct.errors import BundleError, ConfigError, DataError
from chestct.evaluation import backends
from chestct.evaluation.backends import add_backends, own_slices
from chestct.models.bundle import load_bundle, save_bundle
from chestct.models.vgg16 import VGG16
from chestct.training.train import Result
from tests.models.test_backends import needs


@pytest.fixture
def bundle(folder: Path, tmp_path: Path) -> Path:
    """A copy of the bundle of a small run."""
    return Path(shutil.copytree(folder, tmp_path / "bundle"))


def settings(run: tuple[Config, Result], *names: str) -> Config:
    return dataclasses.replace(run[0], ckpt=None, format="+".join(names))


@pytest.mark.slow
def test_what_is_verified_travels_in_facts_and_card_and_answers(bundle: Path, run: tuple[Config, Result]) -> None:
    needs("openvino_int8")
    before = load_bundle(bundle)
    made = before
    for name in ("openvino", "openvino_int8"):  # one at a time: what is there stays
        cfg = settings(run, name)
        made = add_backends(made, bundle, cfg, *own_slices(cfg, made))
    manifest = run[1].data.manifest
    numbers = made.facts["backends"]
    assert {of["slices"] for of in numbers.values()} == {int((manifest["split"] == "valid").sum())}
    assert numbers["openvino_int8"]["calibration"] == int((manifest["split"] == "train").sum())
    assert numbers["openvino"]["logits"] < 1e-3 < numbers["openvino_int8"]["logits"]
    assert numbers["openvino"]["decisions"] == 0
    assert made.card.count("## Backends") == 1
    assert "| openvino_int8 |" in made.card
    squares = run[1].data.store.images[:4]  # type: ignore[union-attr]
    quick = load_bundle(bundle, "auto")
    valid = run[1].data.store.images[manifest.query("split == 'valid'")["row"]]  # type: ignore[union-attr]
    marks = [np.median(one.predict(valid).novelty) for one in (before, quick)]
    assert marks[1] == pytest.approx(marks[0], rel=1e-3)
    assert numbers["openvino"]["novelty"] == pytest.approx(1, abs=1e-3)
    assert numbers["openvino_int8"]["novelty"] != pytest.approx(1, abs=1e-3)
    assert quick.id == f"{made.id}-openvino_int8"
    assert not np.array_equal(quick.predict(squares).logits, before.predict(squares).logits)


@pytest.mark.parametrize(
    ("factor", "reason"),
    [(-1, "logit differs by .*limit 0.01.*AUROC changes by -"), (np.nan, "logit differs by nan .*correlate by nan")],
)
def test_a_backend_that_falls_short_is_refused_with_numbers_and_nothing_changes(
    bundle: Path, run: tuple[Config, Result], monkeypatch: pytest.MonkeyPatch, factor: float, reason: str
) -> None:
    def wrong(net: VGG16, name: str, squares: np.ndarray) -> list[bytes]:
        assert len(squares) == int((run[1].data.manifest["split"] == "train").sum())
        return [b"", b""]

    before, cfg = load_bundle(bundle), settings(run, "openvino")
    flipped = lambda x: (factor * before.net.answer(x)[0], factor * before.net.answer(x)[1].flip(-1))  # noqa: E731
    monkeypatch.setattr(backends, "convert", wrong)
    monkeypatch.setattr(backends, "load_graph", lambda name, files: flipped)
    files = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with pytest.raises(BundleError, match=f"openvino is refused: .*{reason}"):
        add_backends(before, bundle, cfg, *own_slices(cfg, before))
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == files


def test_of_two_exports_at_once_none_undoes_the_other(bundle, run, monkeypatch) -> None:
    before, cfg = load_bundle(bundle), settings(run, "openvino")
    data = own_slices(cfg, before)
    monkeypatch.setattr(backends, "convert", lambda net, name, squares: [b"x"] * len(FILES[name]))
    monkeypatch.setattr(backends, "load_graph", lambda name, files: before.net.answer)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.0")
    add_backends(before, bundle, cfg, *data)
    made = add_backends(before, bundle, settings(run, "onnx"), *data)  # began before the other had ended
    assert made.facts["backends"].keys() == {"openvino", "onnx"}
    save_bundle(bundle, dataclasses.replace(before, facts=before.facts | {"note": "other"}))
    with pytest.raises(BundleError, match="became another bundle"):
        add_backends(before, bundle, cfg, *data)
    assert "backends" not in load_bundle(bundle).facts


def test_calibration_and_verification_take_the_bundles_own_slices_alone(bundle, run, tmp_path) -> None:
    made, cfg = load_bundle(bundle), settings(run, "openvino_int8")
    manifest, images = own_slices(cfg, made)
    own = run[1].data.manifest.query("split != 'test'")
    assert manifest[["content", "split"]].to_numpy().tolist() == own[["content", "split"]].to_numpy().tolist()
    assert np.array_equal(images[manifest["row"]], run[1].data.store.images[own["row"]])  # type: ignore[union-attr]
    other = compose("data.phantom.slices=24", "data.phantom.size=96", f"cache_dir={tmp_path}", "trainer.progress=false")
    with pytest.raises(DataError, match=r"is not the data that bundle .* was made with"):
        own_slices(other, made)


def test_an_export_without_anything_to_export_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format=openvino_int8"):
        experiment.export.__wrapped__(compose(f"bundle={tmp_path}"), tmp_path)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="format"):
        compose("format=tensorrt")
    assert compose("format=openvino_int8+onnx").format == "openvino_int8+onnx"


def test_nan_is_within_no_limit_and_slices_on_the_conformal_quantiles_are_within_all() -> None:
    good = {"logits": 0.0, "decisions": 0.0, "auroc": {"value": 0.0}, "heat": 1.0, "slices": 60}
    for name in set(good) - {"slices"}:
        wrong = {"value": np.nan} if name == "auroc" else np.nan
        assert len(backends.shortcomings("onnx", good | {name: wrong}, 2)) == 1
    for slices, changed, kept in ((60, 0, True), (60, 2, True), (60, 3, False), (400, 4, True), (400, 5, False)):
        numbers = good | {"slices": slices, "decisions": changed / slices}
        assert (backends.shortcomings("onnx", numbers, 2) == []) == kept


def test_agreement_of_heat_maps() -> None:
    a, none = torch.rand(16).numpy(), np.zeros(16, np.float32)
    assert backends._agreement(a, a * 0.5) == pytest.approx(1)
    assert (backends._agreement(a, none), backends._agreement(none, none)) == (0, 1)
