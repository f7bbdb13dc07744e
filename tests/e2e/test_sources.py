"""Several sources in one run, by the command line: each with its own folders, none leaking into another's split."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from chestct.config.schema import PhantomConfig
from chestct.phantom.dataset import write


@pytest.fixture
def sources(tmp_path: Path, phantoms: Path) -> tuple[str, dict[Path, str]]:
    """The setting data.sources of two folders, and the copies in the second: their paths -> the originals'.

    `clinic` is the phantoms in split folders; `public` has 16 slices in class folders of its own, without splits: ten
    of them are new, four were saved anew as RGBA from clinic, two are a clinic slice at another size as JPEG.
    """
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
    labels = "{healthy: normal, tumour: cancer}"
    return f"data.sources={{clinic: {{root: {phantoms}}}, public: {{root: {public}, labels: {labels}}}}}", copies


def the(tmp_path: Path, pattern: str) -> Path:
    (path,) = tmp_path.glob(pattern)
    return path


@pytest.mark.slow
def test_two_sources_with_their_own_folders_train_together(call, tmp_path, sources):
    setting, copies = sources
    settings = ("data.size=32", "model.weights=none", "model.freeze=false", "trainer.max_epochs=1")
    status, _, err = call("train.py", setting, *settings, "data.root=null", f"cache_dir={tmp_path}/cache")
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
