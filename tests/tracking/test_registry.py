"""Bundles from runs: what their code, their tags and their ids may not do. Names: tests/e2e."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from mlflow import MlflowClient, pyfunc

from chestct.config.schema_serving import FACTS
from chestct.errors import ConfigError
from chestct.models.bundle import PACKAGED_BUNDLE, load_bundle
from chestct.tracking import fetch_bundle
from tests.tracking.conftest import recorded


@pytest.mark.parametrize("name", ["", "..", "../../home", "abc'"])
def test_what_is_no_run_id_is_no_folder_either(small, uri, tmp_path, name):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}", f"cache_dir={tmp_path}/cache")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="no id of a run"):
        fetch_bundle(f"runs:/{name}", cfg)
    assert set(tmp_path.rglob("*")) == before


def test_a_server_that_answers_with_another_run_names_no_folder(small, uri, tmp_path, monkeypatch):
    info = SimpleNamespace(run_id="../../home", lifecycle_stage="active", artifact_uri=f"{tmp_path}/artifacts")
    monkeypatch.setattr(MlflowClient, "get_run", lambda *_: SimpleNamespace(info=info))
    with pytest.raises(ConfigError, match="the answer is of another run"):
        fetch_bundle(
            f"runs:/{'a' * 32}", small("tracking=mlflow", f"tracking.uri={uri}", f"cache_dir={tmp_path}/cache")
        )


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


def test_offline_the_last_fetched_is_taken_with_a_message_and_with_a_full_disk_none(
    small, uri, tmp_path, monkeypatch, capsys
):
    cfg = small("tracking=mlflow", f"tracking.uri={uri}", f"cache_dir={tmp_path}/cache")
    facts = tmp_path / "model" / "data" / "bundle" / FACTS
    facts.parent.mkdir(parents=True)
    with recorded(cfg, tmp_path / "out") as run:
        for text in "ABA":
            facts.write_text(text)
            run.artifacts(tmp_path / "model", "bundle")
            last = fetch_bundle(f"runs:/{run.run_id}", cfg)
    assert Path(last, FACTS).read_text() == "A"
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "list_artifacts", Mock(side_effect=ConnectionError("offline")))
        assert fetch_bundle(f"runs:/{run.run_id}", cfg) == last
    assert f"{uri}: offline. Taken is {last}, fetched before." in capsys.readouterr().out
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", full)
    with pytest.raises(ConfigError, match="No space left"):
        fetch_bundle(f"runs:/{run.run_id}", cfg)
