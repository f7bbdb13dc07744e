"""DVC's remotes against real servers on loopback: push, wipe, pull, and nothing has to be run again."""

import base64
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from chestct.config import TrackingConfig
from chestct.door import CONF, compose
from chestct.tracking.storage import dagshub_remotes

pytestmark = pytest.mark.slow

ROOT = CONF.parent
TOKEN = "loopback-token-of-no-use"
SETTINGS = ("data.phantom.slices=24", "data.phantom.size=64", "data.size=32", "trainer.max_epochs=1", "tracking=off")


@pytest.fixture
def s3():
    """moto's S3 with the bucket `dvc`; its address."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/dvc", method="PUT")).close()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def plain_http():
    """A server that keeps what is posted to it and asks for the token, as DagsHub's plain one does; its address."""
    kept: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.allowed():
                kept[self.path] = body
                self.answer(200)

        def do_GET(self):
            if self.allowed():
                self.answer(200 if self.path in kept else 404, kept.get(self.path, b""))

        do_HEAD = do_GET  # noqa: N815

        def allowed(self):
            asked = "Basic " + base64.b64encode(f"{TOKEN}:{TOKEN}".encode()).decode()
            if self.headers.get("Authorization") != asked:
                self.answer(401)
                return False
            return True

        def answer(self, status, body=b""):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git and DVC repository with this working tree's code and settings that make the pipeline quick."""
    root = tmp_path / "repository"
    root.mkdir()
    for name in ("chestct", "conf"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "evaluate.py", "dvc.yaml", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    (root / "params.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(compose(*SETTINGS))))
    monkeypatch.chdir(root)
    bin = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", f"{bin}{os.pathsep}{os.environ['PATH']}")  # the stages call `python`
    for name in ("PYTHONPATH", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    subprocess.run(["git", "init", "-q"], check=True)
    dvc("init", "-q")
    dvc("config", "core.analytics", "false")
    return root


def dvc(*arguments):
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_pushed_wiped_and_pulled_outputs_have_the_same_hashes_and_nothing_runs_again(
    repository, s3, plain_http, monkeypatch
):
    monkeypatch.setenv("DAGSHUB_USER_TOKEN", TOKEN)
    dagshub_remotes(TrackingConfig("dagshub", owner="ada", repo="ct"))
    # The remotes as they were written, moved to loopback.
    dvc("remote", "modify", "dagshub", "endpointurl", s3)
    dvc("remote", "modify", "dagshub-http", "url", plain_http)

    dvc("repro", "train")
    lock = (repository / "dvc.lock").read_text()
    for remote in ("dagshub", "dagshub-http"):
        assert "pushed" in dvc("push", "--remote", remote, "train", "--with-deps")
    before = contents(repository)
    assert any(path.endswith("best.ckpt") for path in before)
    for remote in ("dagshub", "dagshub-http"):
        shutil.rmtree(repository / ".dvc" / "cache")
        for folder in ("store", "audit", "train/checkpoints"):
            shutil.rmtree(repository / "artifacts" / folder)
        dvc("pull", "--remote", remote, "train", "--with-deps")
        assert contents(repository) == before
        again = dvc("repro", "train")
        assert "Running stage" not in again
        assert (repository / "dvc.lock").read_text() == lock
    assert TOKEN not in (repository / ".dvc" / "config").read_text()


def contents(root):
    outputs = [root / "artifacts" / folder for folder in ("store", "audit", "train/checkpoints")]
    files = [path for folder in outputs for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
