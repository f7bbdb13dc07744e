"""Several sources in one run, by the command line: each with its own folders, none leaking into another's split."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from chestct.config.compose import CONF
from tests.conftest import SMALL

SETTINGS = [s for s in SMALL if not s.startswith(("data.size", "trainer.max_epochs"))]
SETTINGS += ["data.size=32", "model.weights=none", "model.freeze=false", "trainer.max_epochs=1", "cache_dir=cache"]

LABELS = "{healthy: normal, tumour: cancer}"


@pytest.fixture
def sources(tmp_path: Path, phantoms: Path) -> tuple[str, dict[Path, str]]:
    """The setting data.sources of two folders, and the copies in the second: their paths -> the originals'.

    `clinic` is the phantoms in split folders; `public` has 16 slices in class folders of its own, without splits: ten
    of them are new, four were saved anew as RGBA from clinic, two are a clinic slice at another size as JPEG.
    """
    from chestct.config.schema import PhantomConfig
    from chestct.phantom.dataset import write

    public = tmp_path / "public"
    other = tmp_path / "other"
    write(other, PhantomConfig(slices=12, size=96, difficulty=0.0, seed=7))
    for folder in ("healthy", "tumour_T1"):
        (public / folder).mkdir(parents=True)
    for i, path in enumerate(sorted(other.glob("*/*/*.png"))[:10]):
        shutil.copy(path, public / ("healthy" if path.parent.name == "normal" else "tumour_T1") / f"{i}.png")
    copies = {}
    taken = [*sorted(phantoms.glob("test/normal/*"))[:2], *sorted(phantoms.glob("train/adenocarcinoma/*"))[:4]]
    for i, original in enumerate(taken):
        image = Image.open(original).convert("L")
        path = Path("healthy" if i < 2 else "tumour_T1", f"copy{i}" + (".png" if i < 4 else ".jpg"))
        if i < 4:
            image.convert("RGBA").save(public / path)
        else:
            image.resize((image.width * 3 // 2, image.height * 3 // 2)).save(public / path, quality=90)
        copies[path] = original.relative_to(phantoms).as_posix()
    return f"data.sources={{clinic: {{root: {phantoms}}}, public: {{root: {public}, labels: {LABELS}}}}}", copies


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """run("train.py", *arguments) -> (exit status, standard output, standard error), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(program: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [program, *arguments, *SETTINGS])
        try:
            if program.endswith(".py"):
                runpy.run_path(str(CONF.parent / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capfd.readouterr()

    return call


def the(tmp_path: Path, pattern: str) -> Path:
    (path,) = tmp_path.glob(pattern)
    return path


@pytest.mark.slow
def test_two_sources_with_their_own_folders_train_together(run, tmp_path, sources):
    setting, copies = sources
    status, _, err = run("train.py", setting)
    assert status == 0, err

    manifest = pd.read_parquet(the(tmp_path, "cache/store/*/manifest-*.parquet"))
    assert manifest["source"].value_counts().to_dict() == {"clinic": 60, "public": 16}
    public = manifest[manifest["source"] == "public"]
    assert set(public["subtype"]) == {"normal", "cancer"}  # its folders do not tell which carcinoma
    assert set(public["folder_split"]) == {""}
    at = manifest.set_index(["source", "path"])
    for path, original in copies.items():
        copy, first = at.loc[("public", path.as_posix())], at.loc[("clinic", original)]
        assert copy["group"] == first["group"], path
        assert (copy["content"] == first["content"]) == (path.suffix == ".png")

    predictions = pd.read_parquet(the(tmp_path, "runs/*/evaluation/predictions.parquet"))
    assert set(predictions["source"]) == {"clinic", "public"}
    assert not predictions["leaked"].any()
    assert predictions.groupby("group")["split"].nunique().max() == 1

    report = json.loads(the(tmp_path, "cache/audit/*/report.json").read_text())
    counts = pd.DataFrame(report["counts"]).groupby("source")["files"].sum().to_dict()
    assert counts == {"clinic": 60, "public": 16}


@pytest.mark.slow
def test_a_copy_in_another_source_stays_in_its_originals_split(run, tmp_path, sources):
    from chestct.config.compose import compose
    from chestct.data.splits import make_splits

    setting, copies = sources
    status, out, err = run("chestct", "ingest", setting)
    assert status == 0, err
    assert out.startswith("76 slices, 4 of them copies")
    manifest = pd.read_parquet(the(tmp_path, "cache/store/*/manifest-*.parquet"))
    for seed in range(5):
        cfg = compose(*SETTINGS, setting, f"data.split_seed={seed}")
        split = make_splits(manifest, cfg.task, cfg.data)
        at = pd.Series(split.to_numpy(), index=pd.MultiIndex.from_frame(manifest[["source", "path"]]))
        for path, original in copies.items():
            # Of exact copies one is kept; a near-copy goes where its original goes.
            assert at["public", path.as_posix()] == ("" if path.suffix == ".png" else at["clinic", original])
        assert set(at["public"]) == {"train", "valid", "test", ""}  # the sources are mixed, not one a split


def test_a_source_whose_folders_map_to_nothing_is_named(run, sources):
    setting, _ = sources
    status, out, err = run("chestct", "ingest", setting.replace("tumour: cancer", "lump: cancer"))
    assert status == 2
    assert "tumour_T1" in err
    assert "Traceback" not in out + err
