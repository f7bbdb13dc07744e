"""Bundles on the hub, a Space, and a model that MLflow serves: whatever leaves this repository to run elsewhere."""

import os
import runpy
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

from chestct import cli
from chestct.config.compose import compose
from chestct.errors import ChestCTError, ConfigError
from chestct.models.bundle import PACKAGED_BUNDLE, load_bundle
from chestct.models.bundle_schema import LARGEST
from chestct.portable import SPACE, write_space
from chestct.pyfunc import save_model
from chestct.serving.model import bundle_folder
from chestct.tracking import TrackingError, fetch_bundle
from chestct.tracking import hub as bundles
from tests.conftest import command, until
from tests.e2e.conftest import bare_python
from tests.e2e.loopback import answers, free_port
from tests.reporting.test_drift_report import records, write


def test_a_bundle_goes_to_the_hub_with_its_card_and_comes_back_the_same(hub, small_bundle, small, tmp_path):
    address, commits = hub
    assert set(bundles.NAMES) == set(LARGEST)
    assert bundles.push(small_bundle, "ada/chest") == f"{address}/ada/chest"
    assert sorted(commits["ada/chest"][-1]) == sorted([*(file.name for file in small_bundle.iterdir()), "README.md"])
    assert load_bundle(fetch_bundle("hf://ada/chest", small())).id == load_bundle(small_bundle).id
    commits["ada/chest"].append({**commits["ada/chest"][-1], "bundle.json": b"{}", "setup.py": b"import evil"})
    folder = bundles.fetch("hf://ada/chest")
    assert not Path(folder, "setup.py").exists()
    with pytest.raises(ChestCTError, match="damaged"):
        load_bundle(folder)


def test_drift_takes_a_bundle_by_name_and_the_hub_needs_no_mlflow(hub, small_bundle, tmp_path, monkeypatch, capsys):
    bundles.push(small_bundle, "ada/chest")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", None)
    folder = bundle_folder("hf://ada/chest")
    assert load_bundle(folder).id == load_bundle(small_bundle).id
    write(tmp_path / "m.sqlite", records(load_bundle("packaged"), 0, 60))
    assert command("drift", "report", "--bundle", "hf://ada/chest", "--db", tmp_path / "m.sqlite") == 2
    assert f"The bundle {load_bundle(folder).id} has no statistics" in capsys.readouterr().err


def test_an_export_goes_into_a_folder_not_to_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for given in (["format=onnx"], ["ckpt=last"]):
        assert command("export", "bundle=hf://ada/chest", *given) == 2
        assert "chestct push" in capsys.readouterr().err
    assert not (tmp_path / "hf:").exists()


def test_the_packaged_card_tells_the_hub_what_the_model_is():
    card = (PACKAGED_BUNDLE / "MODEL_CARD.md").read_text(encoding="utf-8")
    facts = yaml.safe_load(card.split("---")[1])
    assert (facts["library_name"], facts["pipeline_tag"]) == ("chestct", "image-classification")


def test_what_the_hub_does_not_have_or_permit_says_the_way_out(hub, small_bundle, monkeypatch):
    with pytest.raises(ConfigError, match="hf://USER/NAME"):
        bundles.fetch("hf://nobody/nothing")
    with pytest.raises(ConfigError, match="no name on the hub"):
        bundles.fetch("hf://../../etc")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(TrackingError, match="HF_TOKEN"):
        bundles.push(small_bundle, "ada/chest")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    return bare_python(tmp_path_factory.mktemp("elsewhere"))


def started(command, folder, health):
    """The process of a service once it answers at `health`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "MLFLOW_"))}
    environment |= {"PORT": health.split(":")[2].split("/")[0], "MLFLOW_DISABLE_TELEMETRY": "true"}
    # MLflow looks for uvicorn there.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    log = (folder / "log").open("w+")
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    until(lambda: answers(health), 400, process, folder / "log")
    return process


def stop(process):
    os.killpg(process.pid, 9)
    process.wait(20)


def test_a_space_lists_what_it_needs_and_refuses_a_folder_that_holds_something(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "my space"
    monkeypatch.setattr(sys, "argv", ["chestct space", str(folder)])
    cli.space()
    pasted = shlex.split(capsys.readouterr().out)[-6:]
    assert pasted == ["hf", "upload", "USER/NAME", str(folder), "--repo-type", "space"]
    card = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (card["sdk"], card["sdk_version"], card["app_file"]) == ("gradio", version("gradio"), "app.py")
    needed = (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert f"gradio=={version('gradio')}" in needed
    assert not [line for line in needed if line.startswith("chestct")]
    with pytest.raises(ChestCTError, match="not empty"):
        write_space(folder)


@pytest.mark.parametrize("on_the_hub", [False, True])
def test_a_space_is_open_to_others_on_the_hub_alone(monkeypatch, on_the_hub):
    monkeypatch.delenv("SPACE_ID", raising=False)
    if on_the_hub:
        monkeypatch.setenv("SPACE_ID", "ada/chest")
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.setattr(cli, "main", lambda: None)
    runpy.run_path(str(SPACE / "app.py"))
    cfg = compose(*sys.argv[2:])
    assert sys.argv[1] == "serve"
    assert (cfg.serve.host, cfg.serve.hosts) == (("0.0.0.0", ["*"]) if on_the_hub else ("127.0.0.1", []))


@pytest.mark.slow
def test_a_space_runs_as_it_is(elsewhere, tmp_path):
    write_space(tmp_path / "space")
    url = f"http://127.0.0.1:{free_port()}"
    process = started([str(elsewhere), "app.py"], tmp_path / "space", f"{url}/readyz")
    try:
        assert httpx.get(f"{url}/healthz", timeout=60).json()["bundle"] == load_bundle("packaged").id
    finally:
        stop(process)


@pytest.mark.slow
def test_mlflow_serves_a_model_where_chestct_is_not_installed(elsewhere, tmp_path):
    save_model(PACKAGED_BUNDLE, tmp_path / "model", code=True)
    assert not {path.suffix for path in (tmp_path / "model").rglob("*")} & {".pkl", ".pickle", ".pt", ".pth"}
    port = free_port()
    serve = ["-m", "mlflow", "models", "serve", "-m", str(tmp_path / "model"), "--env-manager", "local"]
    ready = f"http://127.0.0.1:{port}/ping"
    process = started([str(elsewhere), *serve, "-p", str(port), "-h", "127.0.0.1"], tmp_path, ready)
    try:
        image = np.random.default_rng(0).integers(0, 256, (1, 60, 50), np.uint8)
        url = f"http://127.0.0.1:{port}/invocations"
        (answer,) = httpx.post(url, json={"inputs": image.tolist()}, timeout=120).json()["predictions"]
        bundle = load_bundle("packaged")
        expected = bundle.predict(bundle.preprocess(image[0])[None])
        assert answer["score"] == pytest.approx(expected.score[0], abs=1e-6)
        assert answer["decision"] == expected.decision[0]
        plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        assert subprocess.run([str(elsewhere), "-c", "import chestct"], cwd=tmp_path, env=plain).returncode != 0
    finally:
        stop(process)
