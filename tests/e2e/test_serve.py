"""`python serve.py` as a process: how it starts, what it prints, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from chestct.config.compose import CONF
from chestct.models.bundle import PACKAGED_BUNDLE, load_bundle
from chestct.tracking import Run
from tests.e2e.loopback import free_port
from tests.serving.conftest import bundle_folder, examples, files
from tests.serving.visitor import Visitor

__all__ = ["bundle_folder", "examples", "files"]  # fixtures

ROOT = CONF.parent


@contextmanager
def process(tmp_path: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A service in an empty folder, ready; yields it and its URL."""
    port = free_port()
    command = [sys.executable, str(ROOT / "serve.py"), f"serve.port={port}", *arguments]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert running.poll() is None, running.communicate()[0]
            assert time.monotonic() < deadline
            try:
                if httpx.get(f"{url}/healthz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        yield running, url
    finally:
        running.kill()
        running.wait()


@pytest.mark.slow
def test_it_serves_reloads_and_ends_well_with_a_page_open(bundle_folder: Path, files, examples, tmp_path: Path) -> None:
    with process(tmp_path, f"bundle={bundle_folder}") as (running, url):
        with httpx.stream("GET", f"{url}/gradio_api/heartbeat/abc") as page:  # what an open page holds on to
            next(page.iter_lines())
            running.send_signal(signal.SIGHUP)
            assert httpx.post(f"{url}/predict", content=files[0]).status_code == 200
            odd = examples["no-lesion.dcm"].replace(b"PHANTOM", b"JaneDoe").replace(b"IS\x02\0001 ", b"IS\x02\0JD")
            assert odd != examples["no-lesion.dcm"]
            visitor = Visitor(url)
            visitor.look([("Jane.dcm", odd)])
            assert "Jane" in str(visitor.values)  # whose own page tells it
            time.sleep(0.5)
            begun = time.monotonic()
            running.send_signal(signal.SIGTERM)
            printed, _ = running.communicate(timeout=20)
        assert running.returncode == 0, printed
        assert time.monotonic() - begun < 10
        assert "bundle reloaded" in printed
        assert "Traceback" not in printed
        assert "Jane" not in printed
        assert "JD" not in printed
        assert str(bundle_folder) not in printed
    assert not list(tmp_path.iterdir())  # neither runs nor uploads nor anything else


@pytest.mark.slow
def test_an_alias_that_moves_is_followed_on_sighup(bundle_folder: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("chestct", str(tmp_path / "artifacts"))

    def registered(bundle: Path) -> str:
        run = client.create_run(experiment).info.run_id
        client.log_artifacts(run, str(bundle), "bundle")
        Run(client, run).register("chest")
        return load_bundle(bundle).id

    def until(url: str, bundle: str) -> bool:
        deadline = time.monotonic() + 30
        while httpx.get(f"{url}/healthz").json()["bundle"] != bundle and time.monotonic() < deadline:
            time.sleep(0.1)
        return bool(httpx.get(f"{url}/healthz").json()["bundle"] == bundle)

    first = registered(bundle_folder)
    with process(tmp_path, "bundle=models:/chest@champion", f"tracking.uri={uri}") as (running, url):
        assert until(url, first)
        second = registered(PACKAGED_BUNDLE)
        running.send_signal(signal.SIGHUP)
        assert first != second
        assert until(url, second)


@pytest.mark.parametrize(
    ("changed", "setting", "message"),
    [({}, "bundle=gone", "No bundle in gone"), ({"CHESTCT_USERNAME": "ann"}, "bundle=packaged", "CHESTCT_PASSWORD")],
)
def test_a_service_that_cannot_start_says_why_in_one_sentence(tmp_path: Path, changed, setting, message) -> None:
    command = [sys.executable, str(ROOT / "serve.py"), setting, f"serve.port={free_port()}"]
    ended = subprocess.run(command, cwd=tmp_path, env=os.environ | changed, capture_output=True, text=True)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_names_every_setting_of_the_service() -> None:
    ended = subprocess.run([sys.executable, str(ROOT / "serve.py"), "--help"], capture_output=True, text=True)
    for said in ("127.0.0.1:7860", "max_upload_bytes", "CHESTCT_PASSWORD", "SIGHUP"):
        assert said in ended.stdout
