import re
import shlex
import shutil
import subprocess
import sys

import pytest

from chestct import cli
from chestct.config.compose import CONF, compose
from chestct.data import public
from chestct.data.public import SETS, PublicSet, content_digest, describe, fetch
from chestct.data.sources import label_of, list_slices
from chestct.errors import DataError
from tests.conftest import real


@pytest.fixture
def download(tmp_path, phantoms, monkeypatch):
    """Some phantoms as a download of the collection `tiny`, which knows them; the folder."""
    folder = tmp_path / "archive"
    for label in ("normal", "adenocarcinoma"):
        shutil.copytree(phantoms / "test" / label, folder / "Data" / f"{label.title()} cases")
    (folder / "Data" / "boxes.csv").write_text("file,left,top,right,bottom\n")
    folders = {}
    for label in ("normal", "adenocarcinoma"):
        paths = sorted((phantoms / "test" / label).iterdir())
        folders[label] = (len(paths), content_digest(paths))
    boxes = {"boxes.csv": public.file_digest(folder / "Data" / "boxes.csv")}
    also = {label: f"{label} cases" for label in folders}
    tiny = PublicSet("Tiny", "https://example.org", "CC0", "Take it.", "hospitals/tiny", folders, boxes, also)
    monkeypatch.setitem(SETS, "tiny", tiny)
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_whole_download_is_laid_out_as_the_settings_expect_it(download):
    (download / "Data" / "Normal cases" / ".DS_Store").write_bytes(b"left by macOS")
    first = next((download / "Data" / "Normal cases").glob("*.png"))
    first.rename(first.with_name("renamed.png"))
    target = fetch("tiny", download)
    assert str(target) == "hospitals/tiny"
    assert sorted(path.name for path in target.iterdir()) == ["adenocarcinoma", "boxes.csv", "normal"]
    slices = list_slices(compose(f"data.root={target}").data).slices
    assert len(slices) == sum(count for count, _ in SETS["tiny"].folders.values())
    with pytest.raises(DataError, match="is there already"):
        fetch("tiny", download)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda at: next((at / "Normal cases").iterdir()).unlink(), "normal: .* slices, where there should be"),
        (lambda at: max((at / "Normal cases").iterdir()).write_bytes(b""), r"as Tiny\.\n- normal: .* it is empty"),
        (lambda at: shutil.rmtree(at / "Normal cases"), "normal: there is no such folder"),
        (lambda at: (at / "boxes.csv").write_text("other"), r"boxes\.csv differs"),
        (lambda at: (at / "boxes.csv").unlink(), r"boxes\.csv is missing"),
        (lambda at: swap(at / "Normal cases", at / "Adenocarcinoma cases"), "not those that were published"),
    ],
)
def test_a_download_that_differs_says_where_and_nothing_is_written(download, harm, says):
    harm(download / "Data")
    with pytest.raises(DataError, match=says):
        fetch("tiny", download)
    assert not (download.parent / "hospitals").exists()


def test_the_way_to_use_a_download_as_it_is_can_be_pasted(download):
    source = download.rename(download.with_name("the archive (1)"))
    (source / "Data" / "boxes.csv").unlink()
    with pytest.raises(DataError) as error:
        fetch("tiny", source)
    assert shlex.split(str(error.value))[-1] == f"data.sources.tiny.root={source}"


def test_how_to_audit_what_was_fetched_can_be_pasted(download, capsys, monkeypatch):
    target = download.with_name("my data (1)")
    monkeypatch.setattr(sys, "argv", ["chestct data", "fetch", "tiny", str(download), "--out", str(target)])
    cli.data()
    pasted = shlex.split(capsys.readouterr().out)
    assert pasted[-4:] == ["chestct", "audit", "data=tiny", f"data.sources.tiny.root={target}"]


def swap(one, other):
    """A slice of `other` in the place of one of `one`."""
    shutil.copy(next(other.iterdir()), next(one.iterdir()))


def test_each_collection_says_where_it_lives_and_lies_where_the_settings_look_for_it():
    sources = compose("data=hospitals").data.sources
    for name, known in SETS.items():
        assert known.root == sources[name].root
        assert {known.home, known.licence} <= {
            line.strip().removeprefix("Licence: ") for line in describe(name).split("\n")
        }
    with pytest.raises(DataError, match="There are: chest_ct"):
        describe("kaggle")


def test_git_ignores_slices_of_patients_and_what_commands_write():
    if not shutil.which("git") or not (CONF.parent / ".git").exists():
        pytest.skip("no git, or no checkout")
    written = ["data", *(known.root for known in SETS.values()), "scores.csv", "scores.scans.json", "features.parquet"]
    paths = [f"{path}/x.png" if "." not in path else path for path in written]
    done = subprocess.run(["git", "check-ignore", *paths], cwd=CONF.parent, capture_output=True, text=True)
    assert done.stdout.split() == paths


def test_make_bundle_reads_what_was_fetched():
    makefile = (CONF.parent / "Makefile").read_text(encoding="utf-8")
    (folder,) = re.findall(r"^DATA \?= (.*)$", makefile, re.M)
    roots = dict(re.findall(r"data\.sources\.(\w+)\.root=\$\(DATA\)/(\S+)", makefile))
    assert {name: f"{folder}/{below}" for name, below in roots.items()} == {n: known.root for n, known in SETS.items()}


@pytest.mark.parametrize("data", ["iq_oth", "hospitals"])
def test_the_published_folders_of_iq_oth_have_labels_benign_ones_as_they_are_misspelt_there(data):
    labels = compose(f"data={data}").data.labels
    named = {name: label_of(f"{name} cases", labels) for name in ("Bengin", "Malignant", "Normal", "Benign")}
    assert named == {"Bengin": "ignore", "Malignant": "cancer", "Normal": "normal", "Benign": "ignore"}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SETS))
def test_the_published_collections_are_known(name, tmp_path):
    root = real(SETS[name].root.removeprefix("hospitals/"))
    target = fetch(name, root, tmp_path / "out")
    assert sum(path.is_file() for path in target.rglob("*.*g")) == sum(n for n, _ in SETS[name].folders.values())
