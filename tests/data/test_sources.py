"""What folders say: which files are slices, of which class and split, and what to do where they say nothing."""

import errno
import os
import re
import sys
import unicodedata
from pathlib import Path

import pytest

from chestct.config.compose import compose
from chestct.config.schema import Config, DataConfig, PhantomConfig, SourceConfig
from chestct.data.prepare import is_synthetic, located
from chestct.data.sources import label_of, list_slices
from chestct.errors import ConfigError, DataError
from chestct.phantom.dataset import write

LABELS = {
    "normal": "normal",
    "adenocarcinoma": "adenocarcinoma",
    "large.cell.carcinoma": "large_cell",
    "cancer": "cancer",
}


def fill(root: Path, *paths: str, labels: dict[str, str] = LABELS) -> DataConfig:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return DataConfig(name="s", root=str(root), labels=dict(labels))


def read(cfg: DataConfig) -> dict[str, tuple[str, str]]:
    return {file.path: (file.folder_split, file.subtype) for file in list_slices(cfg).slices}


def skipped(cfg: DataConfig) -> dict[str, str]:
    return {row["path"]: row["reason"] for row in list_slices(cfg).skipped}


def follow(advice: str, folder: Path, **meanings: str) -> dict[str, str]:
    """The labels that a reader gets who pastes the advice into a file and says what the folders hold."""
    pasted = advice.split("\n\n", 1)[1]
    for name, label in meanings.items():
        pasted = re.sub(rf'("{re.escape(name)}.*"): .*', rf"\1: {label}", pasted)
    (folder / "labels.yaml").write_text(pasted, encoding="utf-8")
    return compose(f"data.labels_file={folder}/labels.yaml").data.labels


def test_class_folders_are_read_with_everything_below_them_in_a_fixed_order_and_splits_have_many_names(tmp_path):
    cfg = fill(tmp_path / "flat", "normal/b.png", "normal/patient1/z.png", "normal/a.png", "cancer/q.png")
    assert list(read(cfg).items()) == [
        ("cancer/q.png", ("", "cancer")),
        ("normal/a.png", ("", "normal")),
        ("normal/b.png", ("", "normal")),
        ("normal/patient1/z.png", ("", "normal")),
    ]
    suffixed = "adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib"
    splits = {"train": "train", "Training": "train", "val": "valid", "Validation": "valid", "TESTING": "test"}
    cfg = fill(tmp_path / "split", *(f"{name}/{suffixed}/a.png" for name in splits), "train/Normal/b.png")
    expected = {f"{name}/{suffixed}/a.png": (split, "adenocarcinoma") for name, split in splits.items()}
    assert read(cfg) == expected | {"train/Normal/b.png": ("train", "normal")}


@pytest.mark.parametrize("stray", ["validation2", "normal_more", "test_old"])
def test_a_folder_with_files_next_to_split_folders_is_an_error_and_the_advice_works(tmp_path, stray):
    cfg = fill(tmp_path / "d", "train/normal/a.png", "test/normal/b.png", f"{stray}/c/d.png")
    with pytest.raises(DataError, match=f"would be missing: {stray}") as error:
        list_slices(cfg)
    cfg.labels |= follow(str(error.value), tmp_path)
    assert len(read(cfg)) == 2
    assert skipped(cfg) == {f"{stray}/": "data.labels says ignore"}


def test_whatever_is_not_used_is_listed_with_its_reason(tmp_path):
    used = ["test/normal/b.png", "train/normal/a.png", "train/normal/deep/c.png"]
    left = {
        "README.md": "not in a class folder",
        "train/boxes.csv": "not in a class folder",
        "train/normal/Thumbs.db": "left by Windows",
        "train/normal/.DS_Store": "hidden",
        "train/normal/@eaDir/": "left by a file server",
        "train/normal/.ipynb_checkpoints/": "hidden",
        "__MACOSX/": "left by macOS",
        "train/normal/loop/": "a link to a folder, which is not followed",
        "empty/": "no files in it",
    }
    cfg = fill(
        tmp_path, *used, *(f"{path}a.png" if path.endswith("/") else path for path in left if "loop" not in path)
    )
    (tmp_path / "empty" / "a.png").unlink()
    (tmp_path / "train" / "normal" / "loop").symlink_to(tmp_path / "train")
    assert list(read(cfg)) == used
    assert skipped(cfg) == left


@pytest.mark.parametrize("beside", ["__MACOSX/Data/train/normal/._a.png", "docs/b.txt"])
@pytest.mark.parametrize("split", ["train/", ""])
def test_class_folders_that_lie_deeper_are_pointed_at(tmp_path, beside, split):
    cfg = fill(tmp_path, f"Data/x y/{split}normal/a.png", beside)
    with pytest.raises(DataError, match=r"'data\.root=.*/Data/x y'$") as error:
        list_slices(cfg)
    assert ": cancer" not in str(error.value)
    cfg.root = str(error.value).rsplit("data.root=", 1)[1].rstrip("'")
    assert list(read(cfg)) == [f"{split}normal/a.png"]


def test_no_label_is_suggested_and_the_advice_works_for_any_name_when_it_is_completed(tmp_path):
    cfg = fill(tmp_path / "d", "Krebs (alt)/a.png", "健康/b.png", "tumour, left/c.png", 'a "b": c/d.png', labels={})
    with pytest.raises(DataError, match=r"data\.labels_file=labels\.yaml") as error:
        list_slices(cfg)
    advice = str(error.value)
    assert len(re.findall(r'^".+":  # one of normal, .*ignore$', advice, re.MULTILINE)) == 4
    with pytest.raises(ConfigError, match=r"is not one of normal, .*ignore"):
        follow(advice, tmp_path)
    meanings = {"Krebs (alt)": "cancer", "健康": "normal", "tumour, left": "cancer", "a \\": "ignore"}
    cfg.labels = follow(advice, tmp_path, **meanings)
    assert read(cfg) == {
        "Krebs (alt)/a.png": ("", "cancer"),
        "tumour, left/c.png": ("", "cancer"),
        "健康/b.png": ("", "normal"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "no table"),
        ("a: [", "cannot be read"),
        ("no: normal", "names are text"),
        ("a: ${oc.env:HOME}", r"\[a\]='\${oc.env:HOME}' is not one of"),
        ("healthy: [normal]", "names are text"),
        ("healthy;normal\ntumour;cancer", "what follows 'healthy;normal tumour;cancer' is not one of normal, "),
        (None, "No such file"),
    ],
)
def test_a_labels_file_with_a_mistake_is_one_clear_error(tmp_path, text, message):
    if text is not None:
        (tmp_path / "labels.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        compose(f"data.labels_file={tmp_path}/labels.yaml")


@pytest.mark.parametrize(
    ("folder", "label"),
    [
        ("Cancer_T2", "cancer"),
        ("cancerous", None),
        ("cancer free", None),
        ("cancer-or-normal", None),
        ("tumör", "normal"),
    ],
)
def test_a_label_belongs_to_the_whole_beginning_of_a_name(folder, label):
    keys = {"cancer": "cancer", unicodedata.normalize("NFD", "Tumör"): "normal"}  # as macOS writes it
    assert label_of(folder, keys) == label
    assert label_of("cancer free", keys | {"cancer free": "normal"}) == "normal"
    for own in ("Cancer", "tumör", "TUMÖR"):  # those of the user come after the defaults
        assert label_of(own, keys | {own: "ignore"}) == "ignore"


def test_folders_whose_name_is_the_label_need_none():
    labels = compose().data.labels
    assert [label_of(name, labels) for name in ("cancer", "Malignant cases", "Normal cases")] == ["cancer"] * 2 + [
        "normal"
    ]
    assert label_of("Benign cases", labels) is label_of("cancer_free", labels) is None


@pytest.mark.parametrize("what", ["missing", "empty", "no class folders"])
def test_a_root_without_slices_is_an_error_with_a_way_out(tmp_path, what):
    root = tmp_path / "data"
    if what != "missing":
        root.mkdir()
    if what == "no class folders":
        (root / "foo.txt").write_text("x")
    with pytest.raises(DataError, match=r"data=phantom") as error:
        list_slices(DataConfig(name="s", root=str(root), labels=LABELS))
    assert ("foo.txt" in str(error.value)) is (what == "no class folders")


def test_a_source_without_a_folder_is_an_error_that_names_its_setting_and_never_the_current_folder(
    tmp_path, monkeypatch
):
    labels = fill(tmp_path, "normal/a.png", "deeper/sub/normal/a.png").labels
    monkeypatch.chdir(tmp_path)
    for root in ("", "nowhere"):
        for cfg, setting in (
            (DataConfig(name="chest_ct", root=root or None, labels=labels), "data.root"),
            (DataConfig(sources={"mine": SourceConfig(root)}, labels=labels), "data.sources.mine.root"),
        ):
            with pytest.raises(DataError, match=rf"No folder .* for the source .* {setting}=FOLDER"):
                list_slices(cfg)
    with pytest.raises(DataError, match=r"lie deeper: give data\.sources\.mine\.root=deeper/sub$"):
        list_slices(DataConfig(sources={"mine": SourceConfig("deeper")}, labels=labels))


def test_several_sources_keep_their_own_mapping(tmp_path):
    fill(tmp_path / "a", "healthy/a.png", "other/c.png")
    fill(tmp_path / "b", "normal/b.png")
    own = {"healthy": "normal", "other": "ignore"}
    sources = {"a": SourceConfig(str(tmp_path / "a"), own), "b": SourceConfig(str(tmp_path / "b"))}
    listing = list_slices(DataConfig(sources=sources, labels=LABELS))
    assert [(f.source, f.path, f.subtype) for f in listing.slices] == [
        ("a", "healthy/a.png", "normal"),
        ("b", "normal/b.png", "normal"),
    ]
    assert listing.skipped == [{"source": "a", "path": "other/", "reason": "data.labels says ignore"}]


def test_phantoms_without_a_place_are_drawn_as_one_of_several_sources(tmp_path):
    labels = {**LABELS, "large_cell": "large_cell", "squamous": "squamous"}
    fill(tmp_path / "a", "normal/a.png", "cancer/c.png")
    data = DataConfig(sources={"a": SourceConfig(str(tmp_path / "a")), "phantom": SourceConfig()}, labels=labels)
    data.phantom = PhantomConfig(slices=12, size=64)
    cfg = Config(data=data, cache_dir=str(tmp_path / "cache"))
    write(Path(located(cfg).sources["phantom"].root), data.phantom)
    listing = list_slices(located(cfg))
    assert [file.source for file in listing.slices] == 2 * ["a"] + 12 * ["phantom"]
    assert located(cfg).sources["a"] == data.sources["a"]
    assert not is_synthetic(data)


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_left_out(tmp_path, monkeypatch):
    cfg = fill(tmp_path, "normal/a.png", "normal/locked/b.png")
    listed = os.scandir

    def scandir(path):
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"Cannot list .*locked: Permission denied"):
        list_slices(cfg)


def test_names_in_any_script_are_read(tmp_path):
    names = ["胸部 CT – ü.png", "x" * 251 + ".png", "a b'\"\n.png"]
    cfg = fill(tmp_path, *(f"normal/{name}" for name in names))
    assert sorted(read(cfg)) == sorted(f"normal/{name}" for name in names)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS makes no file whose name is not UTF-8")
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("normal/\udcff.png", r"normal/\\udcff\.png"),
        *(("\udcff/a.png", r"/\\udcff"), ("train/\udcff/a.png", r"train/\\udcff")),
    ],
)
@pytest.mark.parametrize("root", ["", "\udcff"])
def test_a_name_that_is_no_text_is_an_error_that_shows_it(tmp_path, name, shown, root):
    path = tmp_path / root / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    shown = r"\\udcff/[^']+" if root else shown  # the first that is met, which the root spoils
    with pytest.raises(DataError, match=rf"{shown}' is not UTF-8.*Rename it"):
        list_slices(DataConfig(name="a", root=str(tmp_path / root), labels={"normal": "normal"}))
