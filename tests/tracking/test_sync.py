"""What stands before sending; sending to real servers is tested in tests/e2e/test_servers.py."""

import os
import subprocess
import sys

import pytest

from chestct.config.schema import TrackingConfig
from chestct.errors import ConfigError
from chestct.tracking import sync
from chestct.tracking.dagshub import dagshub_remotes


def test_sync_without_a_server_asks_for_one(small, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="tracking=dagshub"):
        sync(small("tracking=mlflow"))


@pytest.mark.slow
def test_the_token_for_dvc_stands_in_config_local_only(no_token, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], check=True, env=os.environ | {"DVC_NO_ANALYTICS": "1"})
    cfg = TrackingConfig("dagshub", owner="ada", repo="ct")
    with pytest.raises(ConfigError, match="DAGSHUB_USER_TOKEN"):
        dagshub_remotes(cfg)
    monkeypatch.setenv("DAGSHUB_USER_TOKEN", "secret-word")
    for _ in range(2):
        dagshub_remotes(cfg)
    shared = (tmp_path / ".dvc" / "config").read_text()
    assert "endpointurl = https://dagshub.com/ada/ct.s3" in shared
    assert "url = https://dagshub.com/ada/ct.dvc" in shared
    assert "remote = dagshub\n" in shared
    holding = [p for p in tmp_path.rglob("*") if p.is_file() and b"secret-word" in p.read_bytes()]
    assert holding == [tmp_path / ".dvc" / "config.local"]
    ignored = subprocess.run(["git", "check-ignore", "-q", ".dvc/config.local"], check=False)
    assert ignored.returncode == 0
    assert "secret-word" not in capsys.readouterr().out
