"""Checkpoints and bundles by the id of a run, and servers that would lead them astray. Names: tests/e2e."""

import shutil

import pytest
from mlflow import MlflowClient, pyfunc

from chestct.errors import ConfigError
from chestct.models.bundle import PACKAGED_BUNDLE, load_bundle
from chestct.models.checkpoint import find_checkpoint
from chestct.tracking import fetch_bundle
from chestct.tracking.registry import RUN_ID_FILE
from chestct.tracking.sync import ORIGIN
from tests.tracking.conftest import recorded

NONE = "0123456789abcdef0123456789abcdef"


def test_the_checkpoint_of_a_run_is_fetched_by_its_id(small, uri, tmp_path):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}", "tracking.experiment='spaces, and so on'")
    out = tmp_path / "runs" / "first"
    best = out / "checkpoints" / "best.ckpt"
    with recorded(cfg, out) as run:
        best.write_bytes(b"weights")
        run.artifacts(best, "checkpoints")
    name = f"runs:/{run.run_id}"
    assert find_checkpoint(name, str(tmp_path / "runs"), cfg.tracking) == best
    elsewhere = find_checkpoint(name, str(tmp_path / "new"), cfg.tracking)
    assert elsewhere.read_bytes() == b"weights"
    assert elsewhere.with_name(RUN_ID_FILE).read_text().strip() == run.run_id
    with pytest.raises(ConfigError, match="not found"):
        find_checkpoint(f"runs:/{NONE}", str(tmp_path / "runs"), cfg.tracking)
    MlflowClient(uri).delete_run(run.run_id)
    with pytest.raises(ConfigError, match="was deleted"):
        find_checkpoint(name, str(tmp_path / "third"), cfg.tracking)


def test_a_run_without_a_checkpoint_is_one_clear_error(small, uri, tmp_path):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}")
    with recorded(cfg, tmp_path / "out") as run:
        pass
    with pytest.raises(ConfigError, match="kept no checkpoint"):
        find_checkpoint(f"runs:/{run.run_id}", str(tmp_path), cfg.tracking)


@pytest.mark.parametrize("name", ["", "..", "../../home", "abc'"])
def test_what_is_no_run_id_is_no_folder_either(small, uri, tmp_path, name):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}", f"cache_dir={tmp_path}/cache")
    before = set(tmp_path.rglob("*"))
    for fetch in (
        lambda: find_checkpoint(f"runs:/{name}", str(tmp_path / "runs"), cfg.tracking),
        lambda: fetch_bundle(f"runs:/{name}", cfg),
    ):
        with pytest.raises(ConfigError, match="no id of a run"):
            fetch()
    assert set(tmp_path.rglob("*")) == before


def test_code_that_comes_with_a_registered_model_is_not_run(small, uri, tmp_path):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}", f"cache_dir={tmp_path}/cache")
    model = tmp_path / "model"
    shutil.copytree(PACKAGED_BUNDLE, model / "data" / "bundle")
    (model / "code").mkdir()
    code = "class Model:\n    predict = print\n_load_pyfunc = lambda path: Model()\n"
    (model / "code" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{code}")
    (model / "MLmodel").write_text(
        "flavors:\n  python_function:\n    loader_module: evil\n    code: code\n    data: data/bundle\n"
    )
    with recorded(cfg, tmp_path / "out") as run:
        run.artifacts(model, "bundle")
        run.register("foreign")
    assert load_bundle(fetch_bundle("models:/foreign@champion", cfg)).id == load_bundle("packaged").id
    assert not (tmp_path / "ran").exists()
    pyfunc.load_model(str(model))
    assert (tmp_path / "ran").exists()  # as docs/dagshub.md says of MLflow itself


def test_a_tag_of_a_run_decides_nothing_about_folders_or_other_runs(small, uri, tmp_path):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}", f"cache_dir={tmp_path}/deep/er/cache")
    paths = []
    for number, origin in enumerate((f"{tmp_path}/outside", "../../outside", NONE, NONE)):
        with recorded(cfg, tmp_path / f"out{number}") as run:
            shutil.copytree(PACKAGED_BUNDLE, tmp_path / f"b{number}")
            (tmp_path / "weights.ckpt").write_bytes(b"weights")
            run.artifacts(tmp_path / f"b{number}", "bundle")
            run.artifacts(tmp_path / "weights.ckpt", "checkpoints")
            run.tags({ORIGIN: origin})
        paths.append(fetch_bundle(f"runs:/{run.run_id}", cfg))
        note = find_checkpoint(f"runs:/{run.run_id}", str(tmp_path / "fetched"), cfg.tracking).with_name(RUN_ID_FILE)
        assert note.read_text().strip() == (NONE if origin == NONE else run.run_id)
    assert len(set(paths)) == 4
    assert all(path.startswith(f"{tmp_path}/deep/er/cache/bundles/") for path in paths)
    assert not (tmp_path / "outside").exists()
    assert not (tmp_path / "deep/outside").exists()
