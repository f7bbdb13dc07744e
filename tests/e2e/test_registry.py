"""Bundles under names in MLflow: logged as a model that scores arrays, registered, fetched by alias, missing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient, pyfunc

from chestct.config.compose import CONF
from chestct.errors import ConfigError
from chestct.models.bundle import PACKAGED_BUNDLE, load_bundle
from chestct.pyfunc import save_model
from chestct.tracking import fetch_bundle
from chestct.tracking.registry import register
from tests.e2e.test_commands import only_run

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


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 50, 70), np.uint8)


@pytest.mark.slow
def test_an_mlflow_model_answers_as_the_bundle_does_and_holds_no_pickle(made, images):
    bundle = load_bundle("packaged")
    answers = pyfunc.load_model(str(made / "model")).predict(images)
    expected = bundle.predict(np.stack([bundle.preprocess(image) for image in images]))
    assert answers["score"].to_numpy() == pytest.approx(expected.score, abs=1e-6)  # one by one, not in a batch
    assert list(answers["decision"]) == list(expected.decision)
    files = {path.suffix for path in (made / "model").rglob("*") if path.is_file()}
    assert not files & {".pkl", ".pickle", ".pt", ".pth", ".bin"}


def test_an_array_of_another_shape_is_refused(made):
    model = pyfunc.load_model(str(made / "model"))
    with pytest.raises(Exception, match=r"shape"):
        model.predict(np.zeros((2, 3), np.uint8))


def test_every_name_of_a_bundle_finds_it(store):
    client, cfg, run = store
    assert register(client, run, "chest") == "1"
    for name in ("models:/chest@champion", "models:/chest/1", f"runs:/{run}"):
        assert load_bundle(fetch_bundle(name, cfg)).id == load_bundle("packaged").id
    assert fetch_bundle("packaged", cfg) == "packaged"
    assert fetch_bundle("some/folder", cfg) == "some/folder"


def test_an_alias_that_moves_is_followed(store, made):
    client, cfg, run = store
    register(client, run, "chest")
    before = fetch_bundle("models:/chest@champion", cfg)
    other = client.create_run(client.get_run(run).info.experiment_id).info.run_id
    client.log_artifacts(other, str(made / "model"), "bundle")
    assert register(client, other, "chest") == "2"
    after = fetch_bundle("models:/chest@champion", cfg)
    assert run in before
    assert other in after
    assert fetch_bundle("models:/chest/1", cfg) == before


def test_registering_a_run_twice_makes_one_version(store):
    client, _, run = store
    assert register(client, run, "chest") == register(client, run, "chest") == "1"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("models:/nobody@champion", "no registered model nobody (there: chest)"),
        ("models:/chest@winner", "no alias winner (there: @champion, /1)"),
        ("models:/chest/7", "no version 7 (there: @champion, /1)"),
        ("models:/chest", "@ALIAS"),
        ("runs:/0123456789abcdef0123456789abcdef", "not found"),
    ],
)
def test_a_name_that_does_not_exist_says_what_there_is(store, name, says):
    client, cfg, run = store
    register(client, run, "chest")
    with pytest.raises(ConfigError) as error:
        fetch_bundle(name, cfg)
    assert says in str(error.value)
    assert "models:/NAME@ALIAS" in str(error.value)


def test_a_run_without_a_bundle_and_a_deleted_one_say_so(store):
    client, cfg, run = store
    bare = client.create_run(client.get_run(run).info.experiment_id).info.run_id
    with pytest.raises(ConfigError, match="kept no bundle"):
        fetch_bundle(f"runs:/{bare}", cfg)
    client.delete_run(run)
    with pytest.raises(ConfigError, match="was deleted"):
        fetch_bundle(f"runs:/{run}", cfg)


def test_asking_for_a_name_makes_no_store(small, tmp_path):
    with pytest.raises(ConfigError, match="no such store"):
        fetch_bundle("models:/x@y", small("tracking=mlflow", f"tracking.uri=sqlite:///{tmp_path}/none.db"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_evaluation_is_added_to_the_run_of_its_checkpoint(call, tmp_path):
    assert call("train.py", "trainer.max_epochs=2", "tracking=mlflow")[0] == 0
    run = only_run(tmp_path)
    run_id = (run / "checkpoints" / "mlflow_run_id.txt").read_text().strip()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    before = client.get_run(run_id)
    out = f"hydra.run.dir={tmp_path}/evaluated"
    status, printed, err = call("evaluate.py", f"ckpt={run}", out, "evaluation.threshold=half", small=False)
    assert status == 0, err
    assert run_id in printed
    after = client.get_run(run_id)
    assert after.info.status == "FINISHED"
    assert after.data.metrics["best/test/auroc"] == pytest.approx(
        json.loads((tmp_path / "evaluated" / "metrics.json").read_text())["test"]["auroc"]
    )
    assert after.data.params == before.data.params
    assert len(client.search_runs([before.info.experiment_id])) == 1
    # another split is not the run's own
    assert call("evaluate.py", f"ckpt={run}", out, "data.split_seed=1", small=False)[0] == 0
    assert client.get_run(run_id).data.metrics == after.data.metrics
    # a store that is gone
    (tmp_path / "mlflow.db").rename(tmp_path / "away.db")
    status, printed, err = call("evaluate.py", f"ckpt={run}", out, small=False)
    assert status == 0, err
    assert "no such store" in printed
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
def test_mlflow_serves_the_model(made, images):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("mlflow"), "models", "serve", "-m", made / "model", "-p", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [*command, "--env-manager", "local"], env=environment, start_new_session=True, stderr=subprocess.PIPE
    )
    try:
        body = json.dumps({"inputs": images.tolist()}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        answer = None
        deadline = time.monotonic() + 120
        while answer is None and time.monotonic() < deadline and process.poll() is None:
            try:
                answer = json.loads(urllib.request.urlopen(request, timeout=30).read())
            except OSError:
                time.sleep(0.5)
        assert answer is not None
        expected = pyfunc.load_model(str(made / "model")).predict(images)
        assert pd.DataFrame(answer["predictions"])["score"].to_numpy() == pytest.approx(expected["score"].to_numpy())
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)
