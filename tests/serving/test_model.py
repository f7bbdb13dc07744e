"""The Python API: what `chestct.load()` gives."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import chestct
from chestct.errors import ConfigError, DataError, DecodeError
from chestct.imaging.decode import decode
from chestct.serving.model import Model
from chestct.serving.prediction import NOT_MEDICAL
from chestct.serving.predictor import Predictor


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, chestct; chestct.load; assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_path_bytes_and_a_list_get_the_answers_of_the_service(model: Model, bundle_folder, phantoms: Path) -> None:
    paths = sorted(phantoms.glob("test/*/*.png"))
    service = Predictor(bundle_folder)
    expected = [service.predict(path).score for path in paths]
    assert [answer.score for answer in model.predict(paths)] == pytest.approx(expected, abs=1e-5)
    assert model.predict(str(paths[0])).score == pytest.approx(expected[0], abs=1e-6)
    assert model.predict(paths[0].read_bytes()).as_dict() == model.predict(paths[0]).as_dict()


def test_arrays_are_hounsfield_units_as_integers_or_grey_levels(model: Model, examples: dict[str, bytes]) -> None:
    data = examples["large-lesion.dcm"]
    gray = decode(data, model.bundle.window).gray
    window = model.bundle.window
    hu = np.rint(window.center - 0.5 + (gray - 0.5) * (window.width - 1)).astype(np.int16)
    expected = model.predict(data).score
    assert model.predict(gray).score == pytest.approx(expected, abs=1e-6)
    assert model.predict(hu).score == pytest.approx(expected, abs=0.02)
    for wrong in (hu.astype(float), gray[None], gray[:0], np.full((90, 90), np.nan)):
        with pytest.raises(DataError, match="array of"):
            model.predict(wrong)


def test_regions_enclose_the_hottest_places_and_know_their_size(model: Model, examples: dict[str, bytes]) -> None:
    answer = replace(model.predict(examples["large-lesion.dcm"]), decision="cancer")
    assert answer.heat is not None
    first = answer.regions[0]
    row, column = np.unravel_index(answer.heat.argmax(), answer.heat.shape)
    left, top, right, bottom = first.box
    assert left <= column < right
    assert top <= row < bottom
    high, wide = answer.slice.spacing
    assert first.size_mm == pytest.approx(((right - left) * wide, (bottom - top) * high))
    for spacing in (None, (0.25, 0.5)):
        array = replace(model.predict(answer.gray, spacing=spacing), decision="cancer")
        assert array.regions[0].box == first.box
        size = array.regions[0].size_mm
        assert size == (spacing and pytest.approx((0.5 * (right - left), 0.25 * (bottom - top))))
    assert not replace(answer, decision="normal").regions


@pytest.mark.parametrize(("decision", "coloured"), [("cancer", 1), ("uncertain", 1), ("normal", 0), ("refused", 0)])
def test_no_place_is_coloured_where_the_brightest_one_means_nothing(model, examples, decision, coloured) -> None:
    answer = replace(model.predict(examples["large-lesion.dcm"]), decision=decision)
    assert (answer.overlay() is not None) == coloured
    assert bool(answer.regions) == coloured


def test_mistakes_are_answered_in_a_sentence_and_whatever_is_printed_is_no_medical_advice(
    model: Model, examples: dict[str, bytes], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'none.db'}")
    answer = model.predict(examples["hills.png"])
    assert answer.decision == "refused"
    assert answer.reason in repr(answer)
    assert all(NOT_MEDICAL in repr(one) for one in (answer, model))
    with pytest.raises(ConfigError, match="models:/nobody@champion"):
        chestct.load("models:/nobody@champion")
    with pytest.raises(DecodeError, match=r"missing\.png"):
        model.predict([str(tmp_path / "missing.png")])
    with pytest.raises(DataError, match="spacing belongs to arrays"):
        model.predict(b"", spacing=(1, 1))
    slice, picture, tensor = np.zeros((90, 90), np.uint8), Image.new("L", (90, 90)), torch.zeros(90, 90)
    opened = io.BytesIO(examples["hills.png"])
    for wrong in (tensor, [tensor], picture, [slice, picture], opened, bytearray(9), None, [5]):
        with pytest.raises(DataError, match="is no slice: give a path"):
            model.predict(wrong)
    for many in (tmp_path, "study.zip"):
        with pytest.raises(DataError, match="predict_scan takes folders"):
            model.predict(many)
    for spacing in (0.7, (0.7, -0.7), (0.7, np.nan), (1, 1, 1), "wide"):
        with pytest.raises(DataError, match="two numbers above 0"):
            model.predict(slice, spacing=spacing)
    for no_path in (["study.zip"], slice, None):
        with pytest.raises(DataError, match="is no path"):
            model.predict_scan(no_path)
    with pytest.raises(DataError, match=r"^No files\. Give slices"):
        model.predict_scan()


def test_whatever_can_be_iterated_is_many_slices_and_spacing_may_be_an_array(model: Model, phantoms: Path) -> None:
    paths = sorted(phantoms.glob("test/*/*.png"))
    expected = [answer.score for answer in model.predict(paths)]
    for many in (iter(paths), tuple(paths), pd.Series(paths), (path.read_bytes() for path in paths)):
        assert [answer.score for answer in model.predict(many)] == expected
    slice = np.matrix(np.asarray(Image.open(paths[0])))
    answer = replace(model.predict(slice, spacing=np.array([0.25, 0.5])), decision="cancer")
    assert answer.score == pytest.approx(expected[0], abs=1e-6)
    assert len(answer.regions[0].size_mm) == 2
