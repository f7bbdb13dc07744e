"""Where lesions are known: boxes and masks, through the crop, into the squares and the views."""

import dataclasses
import errno
import shutil
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from chestct.config.compose import compose
from chestct.config.schema import DataConfig, SourceConfig
from chestct.data.datamodule import SliceModule
from chestct.data.dataset import views_of
from chestct.data.lesions import known_lesions, unpack
from chestct.data.prepare import ingest
from chestct.data.sources import list_slices
from chestct.errors import DataError
from chestct.models.features import attach
from tests.conftest import SMALL, network, opened
from tests.data.test_prepare import LABELS, draw
from tests.imaging.files import dicom, encoded
from tests.models.test_places import in_view

HEAD = "file,left,top,right,bottom\n"
MARK = (30, 12, 48, 24)  # white, in every second slice of 90 x 80 pixels


@pytest.fixture
def root(tmp_path):
    """Six normal and six cancer slices, 90 x 80; a white mark in those of cancer, at MARK, with boxes around it."""
    rng, boxes = np.random.default_rng(0), HEAD
    for i in range(12):
        path = tmp_path / "data" / ("normal" if i % 2 else "cancer") / f"{i}.png"
        draw(path, rng)
        image = Image.open(path).point(lambda level: level // 2 + 40)
        if not i % 2:
            image.paste(255, MARK)
            boxes += f"cancer/{i}.png,30,12,40,24\ncancer/{i}.png,38,12,48,24\n" if i else ""  # of 0 nothing is known
        image.save(path)
    (tmp_path / "data" / "boxes.csv").write_text(boxes)
    return tmp_path / "data"


def settings(root, **data):
    source = SourceConfig(str(root), boxes="boxes.csv")
    return DataConfig(name="several", sources={"s": source}, labels=LABELS, size=64, **data)


@pytest.mark.parametrize("fit", ["pad", "stretch", "body"])
def test_boxes_lie_in_the_square_where_the_lesion_does(root, tmp_path, fit):
    made = ingest(settings(root, fit=fit), tmp_path / "store")
    for row in made.manifest.itertuples():
        known = row.label == "cancer" and row.path != "cancer/0.png"
        assert bool(row.lesion) == known
        if known:
            mask = unpack(row.lesion, 64)
            marked = made.images[row.row] > 210
            assert (mask & marked).sum() > 0.85 * (mask | marked).sum() > 0
    assert not made.skipped  # the file of boxes is no slice that was forgotten
    assert made.notes == []
    (root / "boxes.csv").write_text(HEAD + "cancer/2.png,0,0,9,9\n")
    assert (ingest(settings(root, fit=fit), tmp_path / "store").manifest["lesion"] != b"").sum() == 1


def test_boxes_may_lie_in_a_class_folder_and_have_decimals_which_are_rounded_outwards(root):
    (root / "boxes.csv").unlink()
    (root / "cancer" / "boxes.csv").write_text(HEAD + "cancer/2.png,10.9,10.2,30.1,30.0\n")
    source = SourceConfig(str(root), boxes="cancer/boxes.csv")
    listing = list_slices(DataConfig(name="several", sources={"s": source}, labels=LABELS))
    assert len(listing.slices) == 12
    assert known_lesions("s", source, listing.slices) == {"cancer/2.png": [(10, 10, 31, 30)]}


def test_boxes_that_may_not_be_read_are_named(root, tmp_path, monkeypatch):
    monkeypatch.setattr(pd, "read_csv", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(DataError, match=r"boxes: .*boxes.csv cannot be read: .*Permission denied"):
        ingest(settings(root), tmp_path / "store")


@pytest.mark.parametrize(
    ("boxes", "says"),
    [
        (None, "there is no file"),
        ("file,left,top,right\n", "it has no column bottom"),
        (HEAD + "cancer/2.png,1,2,9,9\ncancer/3.png,1,,3,4\n", "missing in line 3. It is to begin with file,left"),
        (HEAD + "cancer/2.png,1,5,2,3,4\n", "1 is no slice of this source"),  # a decimal comma
        ("", "cannot be read"),
        (HEAD + "cancer/2.png,1,x,3,4\n", "cannot be read"),
        (HEAD + "cancer/2.png,-1,0,5,5\n", "lies outside"),
        (HEAD + "cancer/2.png,1,2,3,4\ncancer/77.png,1,2,3,4\n", "line 3: cancer/77.png is no slice of this source"),
        (HEAD + "normal/1.png,1,2,3,4\n", "normal/1.png is a normal slice"),
        (HEAD + "cancer/2.png,5,2,5,4\n", "has an empty box"),
        (HEAD + "cancer/2.png,80,70,91,80\n", "80,70,91,80 lies outside of cancer/2.png, which has 90 x 80 pixels"),
    ],
)
def test_boxes_that_cannot_be_right_are_one_clear_error(root, tmp_path, boxes, says):
    (root / "boxes.csv").unlink()
    if boxes is not None:
        (root / "boxes.csv").write_text(boxes)
    with pytest.raises(DataError, match=says):
        ingest(settings(root), tmp_path / "store")


def test_a_box_that_the_crop_leaves_out_is_not_known_and_that_is_said(root, tmp_path):
    for path in root.glob("*/*.png"):  # a body in the middle of black
        square = Image.new("L", (300, 300))
        square.paste(Image.open(path), (100, 100))
        square.save(path)
    (root / "boxes.csv").write_text(HEAD + "cancer/2.png,2,2,9,9\ncancer/4.png,130,112,148,124\n")
    made = ingest(settings(root, fit="body"), tmp_path / "store")
    assert made.manifest["path"][made.manifest["lesion"] != b""].tolist() == ["cancer/4.png"]
    (note,) = made.notes
    assert "In 1 slices of s the lesion lies outside" in note


@pytest.fixture
def masked(tmp_path):
    """Settings of two slices of 90 x 80 pixels, and the file of the mask of the one with cancer, its mark white."""
    rng, root = np.random.default_rng(0), tmp_path / "data"
    for name in LABELS:
        draw(root / "train" / name / "a.png", rng)
    mask = root / "masks" / "train" / "cancer" / "a.png"
    mask.parent.mkdir(parents=True)
    image = Image.new("L", (90, 80))
    image.paste(255, MARK)
    image.save(mask)
    return DataConfig(name="s", root=str(root), labels=LABELS, size=64), mask


def lesion(made):
    (row,) = made.manifest[made.manifest["label"] == "cancer"].itertuples()
    return unpack(row.lesion, 64).sum() if row.lesion else 0


@pytest.mark.parametrize("split", [True, False])
def test_whatever_is_above_0_in_a_mask_is_lesion_and_a_change_of_it_reaches_the_store(masked, tmp_path, split):
    cfg, mask = masked
    if not split:  # class folders alone, and masks next to them
        for folder in (tmp_path / "data" / "train", tmp_path / "data" / "masks" / "train"):
            shutil.copytree(folder, folder.parent, dirs_exist_ok=True)
            shutil.rmtree(folder)
        mask = tmp_path / "data" / "masks" / "cancer" / "a.png"
    white = lesion(ingest(cfg, tmp_path / "store"))
    image = Image.open(mask).point(lambda level: level // 255)
    image.save(mask)
    assert lesion(ingest(cfg, tmp_path / "store")) == white > 0
    image.paste(1, (0, 0, 90, 40))
    image.save(mask)
    assert lesion(ingest(cfg, tmp_path / "store")) > 2 * white
    Image.new("L", (90, 80)).save(mask)
    (note,) = ingest(cfg, tmp_path / "store").notes
    assert note == (
        "In 1 slices of s the mask is empty: where it is counts as not known. For example "
        f"{mask.relative_to(tmp_path / 'data' / 'masks')}."
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (encoded(np.ones((9, 9), np.uint8), "PNG"), "is of another size"),
        (b"hello", "is no mask that can be read: neither PNG"),
        (encoded(np.ones((80, 90), np.uint8), "PNG")[:40], "is no mask that can be read: damaged PNG"),
        (encoded(Image.new("1", (9000, 9000)), "PNG"), "is no mask that can be read: .*data.max_pixels"),
        (dicom(np.ones((80, 90), np.int16)), "is no mask that can be read: it is DICOM"),
    ],
)
def test_a_mask_that_is_none_is_named(masked, tmp_path, content, says):
    cfg, mask = masked
    mask.write_bytes(content)
    with pytest.raises(DataError, match=f"{mask} {says}"):
        ingest(cfg, tmp_path / "store")


def test_a_mask_that_belongs_to_no_slice_or_shows_a_lesion_in_a_normal_one_is_named(masked, tmp_path):
    cfg, mask = masked
    normal = mask.parents[1] / "normal" / "a.png"
    normal.parent.mkdir()
    Image.new("L", (90, 80)).save(normal)
    (normal.parent / "README.txt").touch()
    assert lesion(ingest(cfg, tmp_path / "store"))  # empty, as many collections have them for every slice
    normal.write_bytes(mask.read_bytes())
    with pytest.raises(DataError, match=f"{normal} shows a lesion in a normal slice: remove the mask, or move"):
        ingest(cfg, tmp_path / "store")
    normal.unlink()
    stray = mask.rename(mask.with_suffix(".tiff"))
    with pytest.raises(DataError) as error:
        ingest(cfg, tmp_path / "store")
    assert str(error.value) == (
        f"{stray} is the mask of no slice. That of train/cancer/a.png is to lie at {mask}, extension included; or "
        "remove it."
    )


@pytest.fixture(scope="module")
def known(phantoms, cache):
    """(settings, data) of phantoms, whose masks are known, for a head that judges places."""
    settings = ("experiment=places", "data.views=1", "model.hidden=[8]", "data.lesions=0", "data.fit=pad")
    cfg = compose(*SMALL, *settings, "data.contrast=keep", f"data.root={phantoms}", f"cache_dir={cache}")
    return cfg, opened(cfg)


def test_places_of_known_lesions_turn_with_their_views(known, small):
    _, data = known
    dataset = data.dataset("train", train=True)
    every = list(range(len(dataset)))
    for view in (0, 1):
        batch = in_view(dataset, view, every)
        cancer = batch["y"] == 1
        assert torch.equal(batch["y"], dataset.y)
        assert not batch["places"][~cancer].any()
        assert (batch["places"][cancer] >= 0).all()  # outside of the lesion it is clear
        inside = batch["places"][cancer] > 0
        assert inside.flatten(1).any(1).all()
        assert torch.equal(dataset.shown(every, view)[1][cancer], inside)
    painted = np.zeros((dataset.rows.max() + 1, 64, 64), np.uint8)
    for row, lesion in zip(dataset.rows, dataset.lesions, strict=True):
        painted[row] = 255 * unpack(lesion, 64) if lesion else 0
    dataset.images = painted  # slices that are their lesions: what is bright in a view is where its places are
    for view in (0, 1):
        shown, inside = dataset.shown(every, view)
        bright = shown > 0.45
        assert (bright & inside).sum() > 0.8 * (bright | inside).sum() > 0
    assert (dataset.shown(every, 1)[1] != dataset.shown(every, 0)[1]).any()
    assert not data.dataset("valid").has_places
    assert not opened(small()).dataset("train", train=True).has_places  # a head on means has no use for them


def test_cached_places_are_those_of_the_masks_and_follow_them(known):
    cfg, data = known
    net = network(**vars(cfg.model))
    for shift in (0, 1):  # other lesions, the same pictures
        data.manifest.loc[data.manifest["lesion"] != b"", "lesion"] = np.roll(
            data.manifest["lesion"][data.manifest["lesion"] != b""].to_numpy(), shift
        )
        data.features.clear(), data.places.clear()
        attach(data, net, cfg, ("train",), views=2)
        cached = data.dataset("train", train=True)
        every = list(range(len(cached)))
        for view in (0, 1):
            expected = torch.nn.functional.adaptive_avg_pool2d(cached.shown(every, view)[1].float(), 4)
            torch.testing.assert_close(data.places["train"][view][:], expected)
            shown = in_view(cached, view, every)
            torch.testing.assert_close(shown["places"].clamp(min=0), expected)
            assert ((shown["places"] < 0).flatten(1).all(1) <= (shown["y"] == 1)).all()
    data.features.clear(), data.places.clear()


def test_next_to_drawn_lesions_slices_with_cancer_stay_as_they_are(known, small):
    cfg, data = known
    drawn = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, lesions=0.5))
    module = SliceModule(drawn)
    module.store, module.manifest = data.store, data.manifest
    dataset = module.dataset("train", train=True)
    cancer = dataset.y == 1
    plain, changed = (in_view(dataset, view, range(len(dataset)))["x"] for view in (0, 1))
    same = (plain == changed).flatten(1).all(1)
    assert torch.equal(same, cancer)
    computed = []
    net = network(**vars(cfg.model))
    net.pooled = lambda x: (computed.append(len(x)), x.half())[1]
    attach(module, net, dataclasses.replace(drawn, cache_dir=f"{cfg.cache_dir}/drawn"), ("train",), views=2)
    assert sum(computed) == len(dataset) + (~cancer).sum()  # nor are their features computed twice
    for seen, features in zip((plain, changed), module.features["train"], strict=True):
        torch.testing.assert_close(features[:].float(), seen, atol=1e-3, rtol=0)


def test_an_epoch_mixes_views_and_a_cycle_shows_each_slice_once_in_each(small):
    positions = np.arange(10)
    seen = np.stack([views_of(small("data.views=2"), epoch, positions) for epoch in range(3)])
    assert {*seen[0]} == {0, 1, 2}
    assert (np.sort(seen, axis=0) == np.arange(3)[:, None]).all()
    many = np.stack([views_of(small("data.views=8", "data.lesions=0.5"), epoch, positions) for epoch in range(12)])
    assert ((many == 0).sum(0) == 4).all()  # a third as they are, however many are drawn
    assert (np.sort(many, axis=0)[4:] == np.arange(1, 9)[:, None]).all()
    tuned = [views_of(small("model.freeze=false", "data.views=2"), epoch, positions) for epoch in range(3)]
    assert [{*views} for views in tuned] == [{1}, {2}, {3}]  # never one twice
    drawn = [views_of(small("model.freeze=false", "data.views=2", "data.lesions=0.5"), e, positions) for e in range(3)]
    assert [{*views} for views in drawn] == [{0, 1}, {0, 2}, {0, 3}]  # a third as they are, each in its turn
    assert (np.stack(drawn) == 0).sum(0).tolist() == [1] * 10
