import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from chestct.config.schema import ModelConfig
from chestct.models.vgg16 import VGG16
from chestct.models.weights import load_weights
from chestct.reporting.gallery import KINDS, described, gallery
from tests.evaluation.evaluations import made_up, with_images


@pytest.fixture(scope="module", params=["binary", "subtype"])
def evaluation(request):
    torch.manual_seed(0)
    net = VGG16(ModelConfig(), 1 if request.param == "binary" else 4, 32, load_weights("oxford")).eval()
    evaluation = with_images(made_up(request.param), net, 32)
    evaluation.cfg.evaluation.gallery = 2
    return evaluation


def test_each_gallery_holds_what_its_name_says(evaluation):
    galleries = gallery(evaluation)
    assert tuple(galleries) == KINDS
    assert all(len(pictures) <= 2 for pictures in galleries.values())
    assert galleries["errors"]
    assert galleries["right"]
    assert all(picture["truth"] != picture["called"] for picture in galleries["errors"])
    assert all(picture["decision"] == "uncertain" for picture in galleries["uncertain"])
    assert all(picture["novelty"] > 1 for picture in galleries["novel"])
    for picture in galleries["right"]:
        assert picture["truth"] == picture["called"]
        assert picture["decision"] != "uncertain"
        assert picture["novelty"] <= 1


def test_errors_come_surest_first(evaluation):
    test = described(evaluation).set_index("path")["sureness"]
    sure = [test[picture["path"]] for picture in gallery(evaluation)["errors"]]
    wrong = described(evaluation).query("called != truth")["sureness"]
    assert sure[0] == wrong.max()
    assert sure == sorted(sure, reverse=True)


def test_pictures_are_the_slices_and_the_heat_colours_them(evaluation):
    picture = gallery(evaluation)["right"][0]
    encoded = [picture[name].split(",")[1] for name in ("plain", "heat")]
    plain, heat = (np.asarray(Image.open(io.BytesIO(base64.b64decode(part)))) for part in encoded)
    assert plain.ndim == 2
    assert heat.shape == (*plain.shape, 3)
    manifest = evaluation.manifest.set_index("path")
    square = evaluation.images[manifest["row"][picture["path"]]]
    wanted = np.asarray(Image.fromarray(square).resize(plain.shape[::-1], Image.Resampling.BICUBIC)).astype(float)
    assert np.corrcoef(plain.ravel(), wanted.ravel())[0, 1] > 0.9


def test_one_slice_of_a_group_is_shown(evaluation):
    evaluation.table.loc[:, "group"] = 0
    assert {len(pictures) for pictures in gallery(evaluation).values()} <= {0, 1}


def test_without_a_network_there_is_no_gallery():
    assert gallery(made_up()) == {}
