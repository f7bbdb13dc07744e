"""Bundles under names in MLflow: logged as a model that scores arrays, registered, fetched by alias, missing."""

import shutil

import numpy as np
import pytest
from mlflow import MlflowClient, pyfunc
from mlflow.models import infer_signature

from chestct.config.compose import CONF
from chestct.errors import ConfigError
from chestct.models.bundle import PACKAGED_BUNDLE, load_bundle
from chestct.pyfunc import log_bundle, save_model
from chestct.tracking import Run, fetch_bundle

ROOT = CONF.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(MLflow model of the packaged bundle, store with an experiment): made once, copied by tests."""
    folder = tmp_path_factory.mktemp("registry")
    save_model(PACKAGED_BUNDLE, folder / "model")
    MlflowClient(f"sqlite:///{folder}/empty.db").create_experiment("chestct", str(folder / "artifacts"))
    return folder


@pytest.fixture
def store(made, tmp_path, small):
    """(client, settings that name the store, id of a finished run that holds a bundle)."""
    shutil.copy(made / "empty.db", tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run = client.create_run(client.get_experiment_by_name("chestct").experiment_id).info.run_id
    client.log_artifacts(run, str(made / "model"), "bundle")
    return client, small("tracking=mlflow", f"tracking.uri={uri}", f"cache_dir={tmp_path}/cache"), run


def test_an_mlflow_model_answers_as_the_bundle_does_and_holds_no_pickle(made):
    bundle, images = load_bundle("packaged"), np.random.default_rng(0).integers(0, 256, (3, 50, 70), np.uint8)
    model = pyfunc.load_model(str(made / "model"))
    answers = model.predict(images)
    assert model.metadata.get_output_schema() == infer_signature(answers).inputs
    expected = bundle.predict(np.stack([bundle.preprocess(image) for image in images]))
    assert answers["score"].to_numpy() == pytest.approx(expected.score, abs=1e-6)  # one by one, not in a batch
    assert list(answers["decision"]) == list(expected.decision)
    files = {path.suffix for path in (made / "model").rglob("*") if path.is_file()}
    assert not files & {".pkl", ".pickle", ".pt", ".pth", ".bin"}


def test_every_name_of_a_bundle_finds_it_and_an_alias_that_moves_is_followed(store, made, capsys):
    client, cfg, run = store
    for _ in range(2):  # one version
        Run(client, run).register("chest")
        assert "models:/chest@champion is now version 1" in capsys.readouterr().out
    before = fetch_bundle("models:/chest@champion", cfg)
    assert load_bundle(before).id == load_bundle("packaged").id
    assert before == fetch_bundle(f"runs:/{run}", cfg)
    assert fetch_bundle("some/folder", cfg) == "some/folder"
    other = client.create_run(client.get_run(run).info.experiment_id).info.run_id
    client.log_artifacts(other, str(made / "model"), "bundle")
    Run(client, other).register("chest")
    assert other in fetch_bundle("models:/chest@champion", cfg)
    assert fetch_bundle("models:/chest/1", cfg) == before


def test_what_was_exported_again_is_what_is_fetched(store, small_bundle, tmp_path):
    client, cfg, run = store
    first = load_bundle(fetch_bundle(f"runs:/{run}", cfg)).id
    log_bundle(Run(client, run), shutil.copytree(small_bundle, tmp_path / "v2"))
    assert load_bundle(fetch_bundle(f"runs:/{run}", cfg)).id == load_bundle(small_bundle).id != first


def test_a_bundle_whose_model_carries_the_package_is_the_one_that_is_found(store, small_bundle, tmp_path):
    client, cfg, run = store
    other = Run(client, client.create_run(client.get_run(run).info.experiment_id).info.run_id)
    log_bundle(other, small_bundle, code=True)
    assert [file.path for file in client.list_artifacts(other.run_id, "bundle/code")] == ["bundle/code/chestct"]
    assert load_bundle(fetch_bundle(f"runs:/{other.run_id}", cfg)).id == load_bundle(small_bundle).id


def test_a_bundle_is_a_model_of_its_experiment_with_its_metrics_and_who_made_it(store, made, tmp_path):
    client, _, run = store
    mine = Run(client, run)
    mine.model(made / "model")
    mine.evaluation({"auroc": 0.9, "f1": 0.7}, made / "model" / "data")
    mine.register("chest")  # which asks for the artifacts of the run
    (output,) = client.get_run(run).outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert {metric.key: metric.value for metric in model.metrics} == {"test/auroc": 0.9}
    assert (model.source_run_id, str(model.status)) == (run, "READY")
    assert {"mlflow.user", "mlflow.source.name"} <= model.tags.keys()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("models:/nobody@champion", "nobody not found"),
        ("models:/chest@winner", "alias winner not found"),
        ("models:/chest", "neither @ALIAS nor /VERSION"),
        ("runs:/BARE", "kept no bundle"),
        ("runs:/DELETED", "was deleted"),
    ],
)
def test_a_name_that_does_not_exist_says_what_names_there_are(store, name, says):
    client, cfg, run = store
    Run(client, run).register("chest")
    bare = client.create_run(client.get_run(run).info.experiment_id).info.run_id
    client.delete_run(run)
    with pytest.raises(ConfigError) as error:
        fetch_bundle(name.replace("BARE", bare).replace("DELETED", run), cfg)
    assert says in str(error.value)
    assert "models:/NAME@ALIAS" in str(error.value)


def test_an_evaluation_is_added_to_the_run_of_its_checkpoint_while_that_is_there(call, tmp_path):
    assert call("train.py", "trainer.max_epochs=1", "tracking=mlflow")[0] == 0
    (run,) = (tmp_path / "runs").iterdir()
    run_id = (run / "checkpoints" / "mlflow_run_id.txt").read_text().strip()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.log_metric(run_id, "test/auroc", 0.0)
    out = (f"hydra.run.dir={tmp_path}/evaluated", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    status, printed, err = call("evaluate.py", f"ckpt={run}", "evaluation.threshold=half", *out, small=False)
    assert status == 0, err
    assert run_id in printed
    kept = client.get_run(run_id)
    assert kept.data.metrics["test/auroc"] > 0
    assert kept.info.status == "FINISHED"
    (tmp_path / "mlflow.db").rename(tmp_path / "away.db")
    status, printed, err = call("evaluate.py", f"ckpt={run}", *out, small=False)
    assert status == 0, err
    assert "no such store" in printed
    assert not (tmp_path / "mlflow.db").exists()
