"""The whole story, from a fresh clone: run the pipeline, train, sweep, experiment, compare, push; then elsewhere clone,
pull, evaluate and load by name. DagsHub's part is played by servers on loopback.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from chestct.config.compose import CONF
from chestct.models.bundle import load_bundle
from tests.conftest import until
from tests.e2e.loopback import PASSWORDS, TOKEN, log_in
from tests.tracking.conftest import runs

pytestmark = pytest.mark.slow

ROOT = CONF.parent
QUICK = """
data: {phantom: {slices: 60, size: 64, difficulty: 0.0}, size: 32}
trainer: {max_epochs: 3, progress: false}
"""
OUTPUTS = ("data", *(f"artifacts/{name}" for name in ("store", "audit", "train/checkpoints", "bundle")))


def run(folder: Path, *command: str) -> str:
    with tempfile.TemporaryFile("w+") as output:  # no pipe: workers that a command leaves behind would hold it open
        done = subprocess.run(command, cwd=folder, stdout=output, stderr=output, check=False)
        output.seek(0)
        printed = output.read()
    assert done.returncode == 0, printed[-4000:]
    assert "Traceback" not in printed
    return printed


@pytest.fixture
def origin(tmp_path, monkeypatch):
    """A bare repository with this working tree's code, and defaults that make everything quick."""
    draft = tmp_path / "draft"
    for name in ("chestct", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / name, draft / name, ignore=shutil.ignore_patterns("__pycache__"))
    (draft / ".dvc").mkdir()
    for name in ("train.py", "evaluate.py", "dvc.yaml", "data.dvc", ".gitignore", ".dvcignore", ".dvc/config"):
        shutil.copy(ROOT / name, draft / name)
    (draft / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    with (draft / "conf/train.yaml").open("a") as file:
        file.write(QUICK)
    bin = str(Path(sys.executable).parent)
    environment = {
        "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",  # the stages call `python`
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(tmp_path / "site"),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "OMP_NUM_THREADS": "1",
        **{f"GIT_{who}_{what}": "ada@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("PYTHONPATH", "AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    run(draft, "python", "-m", "chestct.config.compose")  # params.yaml
    for command in (("init", "-q", "-b", "main"), ("add", "."), ("commit", "-q", "-m", "code")):
        run(draft, "git", *command)
    run(tmp_path, "git", "clone", "-q", "--bare", "draft", "origin.git")
    return tmp_path / "origin.git"


def clone(origin: Path, name: str) -> Path:
    run(origin.parent, "git", "clone", "-q", str(origin), name)
    return origin.parent / name


def remotes(folder: Path, s3: str, http: str) -> None:
    """As in docs/dagshub.md, with loopback in DagsHub's place."""
    for name, url in (("dagshub", "s3://dvc"), ("dagshub-http", http)):
        run(folder, "dvc", "remote", "add", "--force", name, url)
    run(folder, "dvc", "remote", "default", "dagshub")
    run(folder, "dvc", "remote", "modify", "dagshub", "endpointurl", s3)
    run(folder, "dvc", "remote", "modify", "dagshub-http", "auth", "basic")


def log_in_to_remotes(folder: Path) -> None:
    """What each person does, and nobody commits."""
    for name, key in (("", "access_key_id"), ("", "secret_access_key"), ("-http", "user"), ("-http", "password")):
        run(folder, "dvc", "remote", "modify", "--local", f"dagshub{name}", key, TOKEN)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for name in OUTPUTS for path in (folder / name).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def experiments(folder: Path) -> dict[str, dict]:
    """What `dvc exp show` tells of every experiment on the last commit, by name."""
    _, last = json.loads(run(folder, "dvc", "exp", "show", "--json"))
    return {known["name"]: known["revs"][0]["data"] for known in last["experiments"] or []}


def test_the_whole_story(origin, server, s3, plain_http, empty_store, monkeypatch, tmp_path):
    log_in(monkeypatch, "writer")
    ada = clone(origin, "ada")
    shutil.copy(empty_store, ada / "mlflow.db")

    # The pipeline, and the commit that others start from. A slice stands for those that data.dvc names.
    (ada / "data").mkdir()
    (ada / "data/slice.png").write_bytes(b"slice")
    run(ada, "dvc", "add", "data")
    run(ada, "dvc", "repro")
    run(ada, "git", "add", ".")
    kept = run(ada, "git", "diff", "--cached", "--name-only").split()
    assert kept == ["artifacts/evaluation/metrics.json", "data.dvc", "dvc.lock"]
    run(ada, "git", "commit", "-q", "-m", "results")
    baseline = metrics(ada / "artifacts/evaluation")

    # The same settings by hand, shared on the server, and registered there.
    shared = f"tracking.uri={server.uri}"
    printed = run(ada, "python", "train.py", shared, "tracking.register=chest", "hydra.run.dir=runs/a")
    assert f"version 1 in {server.uri}" in printed
    by_hand = metrics(ada / "runs/a/evaluation")
    for split in baseline:
        assert by_hand[split] == pytest.approx(baseline[split], abs=1e-6, nan_ok=True)

    # Experiments: one here, two at once in temporary copies.
    run(ada, "dvc", "exp", "run", "-n", "faster", "-S", "optim.lr=0.05")
    queue = "-S model.freeze=false -S optim.name=sgd -S optim.lr=1e-3,1e-4 -S trainer.max_epochs=1"
    run(ada, "dvc", "exp", "run", "--queue", *queue.split())
    try:
        run(ada, "dvc", "queue", "start", "-j", "2")
        until(lambda: run(ada, "dvc", "queue", "status").count("Success") >= 2, 600, every=10)  # 2 s of CPU
    finally:
        run(ada, "dvc", "queue", "stop", "--kill")

    # Compare: the settings reached the training, and the table has the numbers.
    known = experiments(ada)
    assert len(known) == 3
    columns = known["faster"]["metrics"]["artifacts/evaluation/metrics.json"]["data"]
    assert sorted(columns) == ["test", "valid"]
    assert columns == metrics(ada / "artifacts/evaluation") != baseline
    queued = {name: data["params"]["params.yaml"]["data"] for name, data in known.items() if name != "faster"}
    assert {params["optim"]["lr"] for params in queued.values()} == {1e-3, 1e-4}
    kept = runs(f"sqlite:///{ada}/mlflow.db")
    by_experiment = {made.info.run_name: made for made in kept}
    assert by_experiment.keys() > known.keys()
    for name, params in queued.items():
        folder = Path(by_experiment[name].info.artifact_uri)
        checkpoint = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)
        settings = checkpoint["hyper_parameters"]["settings"]
        assert settings["optim"] == params["optim"]
        assert settings["model"]["freeze"] is False
    assert "optim.lr" in run(ada, "dvc", "exp", "diff", *queued)
    run(ada, "dvc", "plots", "diff", "HEAD", *known)
    assert all(name in (ada / "dvc_plots/index.html").read_text() for name in known)
    printed = run(ada, "python", "evaluate.py", "compare=[runs/a,artifacts/evaluation]", "hydra.run.dir=compared")
    assert "B - A with its 95 % interval" in printed

    # Share: runs, data, code.
    run(ada, "git", "checkout", "-q", ".")
    run(ada, "dvc", "checkout")
    printed = run(ada, "python", "-m", "chestct", "sync", shared)
    assert f"{len(kept)} runs are on {server.uri}" in printed
    remotes(ada, s3, plain_http)
    log_in_to_remotes(ada)
    for remote in ("dagshub", "dagshub-http"):
        assert "pushed" in run(ada, "dvc", "push", "--remote", remote)
    run(ada, "git", "commit", "-q", "-a", "-m", "remotes")
    run(ada, "git", "push", "-q", "origin", "HEAD")

    # Elsewhere: what was pulled is what was pushed, and gives the same numbers.
    log_in(monkeypatch, "reader")
    bob = clone(origin, "bob")
    assert metrics(bob / "artifacts/evaluation") == baseline
    log_in_to_remotes(bob)
    run(bob, "dvc", "pull", "--remote", "dagshub-http")
    assert contents(bob) == contents(ada)
    for name in (".dvc/cache", *OUTPUTS):
        shutil.rmtree(bob / name)
    run(bob, "dvc", "pull")  # from the default one
    assert contents(bob) == contents(ada)
    assert "Running stage" not in run(bob, "dvc", "repro")
    printed = run(bob, "python", "evaluate.py", "ckpt=artifacts/train/checkpoints/best.ckpt", "hydra.run.dir=again")
    again = metrics(bob / "again")
    for split in baseline:
        assert again[split] == pytest.approx(baseline[split], abs=1e-6, nan_ok=True)
    name = "models:/chest@champion"
    run(bob, "python", "evaluate.py", f"bundle={name}", shared, "hydra.run.dir=named")
    assert metrics(bob / "named")["test"]["auroc"] == pytest.approx(baseline["test"]["auroc"], abs=1e-6)
    slices = next((ada / ".cache/phantom").glob("[!.]*")) / "test"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    printed = run(bob, "python", "-m", "chestct", "predict", str(slices), "--bundle", name)
    assert f"Scored by bundle {load_bundle(ada / 'runs/a/bundle').id}" in printed
    files = [path for root in (ada, bob) for path in root.rglob("*") if path.is_file()]
    assert not [path for path in files if PASSWORDS["writer"].encode() in path.read_bytes()]
