"""`dvc exp run -S` against settings that somebody wrote into params.yaml by hand."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from chestct.config.compose import change_params
from chestct.errors import ConfigError
from tests.e2e.test_commands import ROOT


@pytest.mark.slow
def test_an_experiment_keeps_the_settings_that_were_edited_by_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "ada")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "ada@example.org")

    def run(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    for name in ("params.yaml", ".dvc/config", ".dvcignore"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    stage = {"cmd": "python -c \"import shutil; shutil.copy('params.yaml', 'out.yaml')\"", "params": ["data", "optim"]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"copy": stage | {"outs": ["out.yaml"]}}}))
    edited = (tmp_path / "params.yaml").read_text(encoding="utf-8").replace("name: phantom\n", "name: clinic\n", 1)
    (tmp_path / "params.yaml").write_text(edited, encoding="utf-8")
    run("git", "init", "-q", "-b", "main")
    run("git", "add", ".")
    run("git", "commit", "-q", "-m", "our data")
    run("dvc", "exp", "run", "-S", "optim.lr=0.5")
    used = yaml.safe_load((tmp_path / "out.yaml").read_text(encoding="utf-8"))
    assert used["data"]["name"] == "clinic"
    assert used["optim"]["lr"] == 0.5


def test_groups_are_opened_into_params_and_hand_edits_stay(tmp_path):
    path = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("patience: 10", "patience: 3"), encoding="utf-8")
    changes = {key: new for key, _, new in change_params(["data=chest_ct", "data.root=/a, (b)", "optim=sgd"], path)}
    assert changes["data.name"] == "chest_ct"
    assert changes["data.root"] == "/a, (b)"
    assert changes["optim.lr"] == 1e-3
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert written["trainer"]["patience"] == 3
    assert written["data"]["labels"] == {
        "normal": "normal",
        "adenocarcinoma": "adenocarcinoma",
        "large.cell.carcinoma": "large_cell",
        "squamous.cell.carcinoma": "squamous",
    }
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        change_params(["optim.lrr=1"], path)
    assert path.read_bytes() == before
