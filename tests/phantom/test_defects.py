"""Every planted defect is what the truth says it is."""

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.metrics import roc_auc_score

from chestct.config.schema import PhantomConfig
from chestct.phantom import dataset
from chestct.phantom.defects import COPIES, ODD, UNREADABLE, File, near_copy
from chestct.phantom.thorax import Phantom


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted") / "set"
    cfg = PhantomConfig(slices=40, size=96, defects=[*COPIES, "odd_files"], defect_rate=0.3)
    return root, dataset.write(root, cfg, processes=1)["files"]


def grey(path):
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("L"), float) / 255


def thumbnail(path, margin=0.0):
    """Standardised 32 x 32 picture without a margin, a fraction of the side."""
    with Image.open(path) as image:
        box = (margin * image.width, margin * image.height, (1 - margin) * image.width, (1 - margin) * image.height)
        small = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX, box), float)
    return (small - small.mean()) / small.std()


def copies(files, defect):
    originals = {f["path"]: f for f in files}
    pairs = [(f, originals[f["original"]]) for f in files if f["defect"] == defect]
    assert len(pairs) == 12
    return pairs


@pytest.mark.parametrize("defect", ["exact", "across_splits", "label_conflict"])
def test_exact_copies_decode_equal(planted, defect):
    root, files = planted
    for copy, original in copies(files, defect):
        assert (root / copy["path"]).read_bytes() == (root / original["path"]).read_bytes()
        assert (copy["split"] != original["split"]) == (defect == "across_splits")
        assert (copy["subtype"] != original["subtype"]) == (defect == "label_conflict")
        assert copy["path"].startswith(f"{copy['split']}/{copy['subtype']}/")
        assert copy["lesion"] == original["lesion"]


def test_near_copies_differ_in_bytes_but_not_in_what_they_show(planted):
    root, files = planted
    for copy, original in copies(files, "near"):
        assert (root / copy["path"]).read_bytes() != (root / original["path"]).read_bytes()
        margin = 0.03 if copy["operation"] == "crop" else 0.0  # as much as a crop takes away on average
        same = np.mean(thumbnail(root / copy["path"]) * thumbnail(root / original["path"], margin))
        strangers = [f for f in files if f["defect"] is None and f["index"] != copy["index"]]
        others = [np.mean(thumbnail(root / copy["path"]) * thumbnail(root / f["path"])) for f in strangers]
        assert same > 0.75
        assert same > max(others)
        assert copy["operation"]
        if "factor" in copy["parameters"]:
            assert copy["width"] == pytest.approx(original["width"] * copy["parameters"]["factor"], abs=1)
        with Image.open(root / copy["path"]) as image:
            assert image.size == (copy["width"], copy["height"])
            assert (image.format == "JPEG") == ("quality" in copy["parameters"])


@pytest.mark.parametrize(
    ("operation", "parameters"),
    [
        ("jpeg", {"quality": 80}),
        ("rescale", {"factor": 0.7}),
        ("shift", {"x": 0.1, "y": -0.2}),
        ("brightness", {"gain": 0.9, "offset": 0.05}),
        ("window", {"center": 60, "width": 1.2}),
        ("crop", {"left": 0.02, "top": 0.2, "right": 0.1, "bottom": 0.01}),
    ],
)
def test_masks_follow_the_geometry_of_near_copies(operation, parameters):
    mask = np.zeros((90, 120), bool)
    mask[40:60, 20:50] = True
    hu = np.where(mask, 900, -900).astype(np.float32)  # the picture is its own mask
    original = Phantom(hu, mask, mask, "squamous", 1.0, 0.5, (0.0, 2000.0))
    file = File("", 0, "train", "squamous", "squamous", "near", operation=operation, parameters=parameters)
    picture, moved = near_copy(original, file)
    assert moved.any()
    assert np.mean((picture > 127) != moved) < 0.01
    assert (moved.shape != mask.shape) == (operation in ("rescale", "crop"))


def test_clean_slices_are_no_copies_of_each_other(planted):
    root, files = planted
    clean = [(root / f["path"]).read_bytes() for f in files if f["defect"] is None]
    assert len(set(clean)) == 40


def test_odd_files_are_as_odd_as_the_truth_says(planted):
    root, files = planted
    odd = {f["operation"]: f for f in files if f["defect"] == "odd_files"}
    assert set(odd) == set(ODD)
    for kind, f in odd.items():
        assert f["readable"] == (kind not in UNREADABLE)
        assert f["index"] >= 40  # shows what no other file shows
        if f["readable"]:
            assert grey(root / f["path"]).shape == (f["height"], f["width"])
        else:
            with pytest.raises((OSError, SyntaxError)):
                grey(root / f["path"])
    modes = {}
    for kind in ("16bit", "rgba", "palette", "cmyk", "lying_extension", "exif_rotated"):
        with Image.open(root / odd[kind]["path"]) as image:
            modes[kind] = (image.mode, image.format)
    assert modes["16bit"] == ("I;16", "PNG")
    assert modes["rgba"] == ("RGBA", "PNG")
    assert modes["palette"] == ("P", "PNG")
    assert modes["cmyk"] == ("CMYK", "JPEG")
    assert modes["lying_extension"] == ("L", "JPEG")
    assert odd["lying_extension"]["path"].endswith(".png")
    with Image.open(root / odd["exif_rotated"]["path"]) as image:
        assert image.getexif()[0x0112] == 6
        assert image.size == (odd["exif_rotated"]["height"], odd["exif_rotated"]["width"])
    assert (root / odd["zero_bytes"]["path"]).stat().st_size == 0


def test_odd_encodings_keep_the_picture(planted):
    root, files = planted
    cfg = PhantomConfig(slices=40, size=96, defects=[*COPIES, "odd_files"], defect_rate=0.3)
    for f in files:
        if f["defect"] == "odd_files" and f["readable"] and f["operation"] != "16bit":  # Pillow clips 16 bits to 8
            drawn = dataset.thorax.draw(np.random.default_rng(f["seed"]), f["drawn"], cfg)
            expected = dataset.thorax.display(drawn.hu, f["window"]) / 255
            assert np.abs(grey(root / f["path"]) - expected).mean() < 0.03, f["operation"]


SHORTCUTS = {
    "shortcut_window": lambda grey: grey[grey > 0.3].mean(),
    "shortcut_size": lambda grey: grey.size,
    "shortcut_border": lambda grey: np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]).mean(),
}


@pytest.mark.slow
def test_a_shortcut_gives_the_class_away(tmp_path):
    """All three in one set, which is quicker; each shows in a number of its own, which a clean set does not have."""

    def scores(defects):
        root = tmp_path / f"{len(defects)} planted"
        files = dataset.write(root, PhantomConfig(slices=40, size=64, defects=defects))["files"]
        pictures = [grey(root / f["path"]) for f in files]
        cancer = [f["subtype"] != "normal" for f in files]
        aurocs = {name: roc_auc_score(cancer, [number(p) for p in pictures]) for name, number in SHORTCUTS.items()}
        return {name: max(score, 1 - score) for name, score in aurocs.items()}

    assert all(score > 0.9 for score in scores(list(SHORTCUTS)).values())
    assert all(score < 0.75 for score in scores([]).values())


@pytest.mark.parametrize("defect", SHORTCUTS)
def test_a_shortcut_leaves_lesions_in_place(tmp_path, defect):
    entry = next(
        f
        for f in dataset.write(tmp_path / "set", PhantomConfig(slices=12, size=64, defects=[defect]))["files"]
        if f["mask"]
    )
    with Image.open(tmp_path / "set" / entry["mask"]) as mask:
        assert mask.size == (entry["width"], entry["height"])
        assert np.asarray(mask).sum() == entry["lesion"]["area"] > 0
