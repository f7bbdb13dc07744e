"""The bundle in the package: whole, honest about itself, and with the scores that it had when it was made."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from chestct.config.compose import compose
from chestct.config.schema import PhantomConfig
from chestct.imaging.decode import decode
from chestct.models.bundle import PACKAGED_BUNDLE, Bundle, load_bundle
from chestct.phantom.dataset import write
from chestct.phantom.thorax import draw
from chestct.serving.examples import PHANTOMS, make_examples
from chestct.serving.predictor import Predictor

GOLDEN = {
    "test/large_cell/phantom_00000.png": (0.8649, 0.5975),
    "train/normal/phantom_00004.png": (0.8447, 0.6738),
    "valid/squamous/phantom_00008.png": (0.9947, 0.6525),
}
"""Phantom -> P(cancer), novelty."""


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor("packaged")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle("packaged")


@pytest.fixture(scope="module")
def examples() -> dict[str, bytes]:
    return {example.name: example.data for example in make_examples()}


def test_it_is_small_and_names_no_place_of_one_machine() -> None:
    files = list(PACKAGED_BUNDLE.iterdir())
    assert sum(path.stat().st_size for path in files) < 700_000
    for path in files:
        assert not re.search(rb"/(home|root|tmp|work|Users)/|(?<![\w./])/[A-Za-z]{3,}/", path.read_bytes()), path


def test_it_was_trained_on_real_slices_without_leaks_and_says_what_its_numbers_are_worth(bundle: Bundle) -> None:
    data = bundle.facts["data"]
    assert (data["synthetic"], data["leaked"], data["split"]) == (False, 0, "grouped")
    assert bundle.facts["code"]["git.dirty"] is False
    assert [row["source"] for row in bundle.facts["elsewhere"]] == ["chest_ct", "iq_oth", "lidc", "lung_pet_ct_dx"]
    for words in ("Not for clinical use", "Leave one source out", "5 folds within a source", "Shortcut", "Robustness"):
        assert words in bundle.card


def test_it_was_made_by_what_is_the_default_recipe(bundle: Bundle) -> None:
    cfg, model = compose(), bundle.facts["model"]
    assert model == model | {name: value for name, value in vars(cfg.model).items() if name in model}
    assert vars(bundle.preprocess) == {name: getattr(cfg.data, name) for name in vars(bundle.preprocess)}


@pytest.mark.parametrize("name", PHANTOMS)
def test_the_examples_of_the_page_are_answered_rightly_and_the_heat_lies_on_the_lesion(name, predictor, examples):
    _, kind, difficulty, seed = PHANTOMS[name]
    lesion = draw(np.random.default_rng(seed), kind, PhantomConfig(difficulty=difficulty, size=384)).mask
    answer = predictor.predict(examples[name])
    assert answer.decision == ("cancer" if lesion.any() else "normal")
    if lesion.any():
        assert answer.heat is not None
        near = ndimage.binary_dilation(lesion, iterations=10)
        assert near[np.unravel_index(answer.heat.argmax(), lesion.shape)]


def test_its_scores_are_those_it_was_made_with(bundle: Bundle, tmp_path: Path) -> None:
    write(tmp_path / "set", PhantomConfig(slices=12, size=160))
    found = {}
    for name in GOLDEN:
        gray = decode(tmp_path / "set" / name, bundle.window).gray
        answer = bundle.predict(bundle.preprocess(gray)[np.newaxis])
        found[name] = (float(answer.score[0]), float(answer.novelty[0]))
    assert found == {name: pytest.approx(values, abs=2e-3) for name, values in GOLDEN.items()}
