"""`dvc exp run -S` against settings that somebody wrote into params.yaml by hand."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
