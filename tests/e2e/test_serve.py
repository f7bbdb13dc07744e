"""`python serve.py` as a process: how it starts, what it prints, and how it ends."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from chestct.config.compose import CONF
from chestct.config.schema_serving import FACTS
from chestct.serving.monitor import read_records
from tests.conftest import until
from tests.e2e.loopback import answers, free_port
from tests.serving.test_monitor import prediction, record
from tests.serving.visitor import Visitor

SERVE = [sys.executable, str(CONF.parent / "serve.py")]


@pytest.fixture
def started(bundle_folder: Path, tmp_path: Path):
    """(process, URL, bundle) of a service in an empty folder `here`, ready to answer."""
    bundle, url, here = tmp_path / "bundle", f"http://127.0.0.1:{free_port()}", tmp_path / "here"
    shutil.copytree(bundle_folder, bundle)
    here.mkdir()
    command = [*SERVE, f"bundle={bundle}", f"serve.port={url.rsplit(':', 1)[1]}"]
    command += ["monitor.enabled=true", f"monitor.path={tmp_path / 'm.sqlite'}", "monitor.keep_days=7"]
    environment = os.environ | {"TMPDIR": str(here), "PYTHONPATH": str(CONF.parent)}
    running = subprocess.Popen(command, cwd=here, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True)
    try:
        until(lambda: answers(f"{url}/readyz"), 120, running)
        yield running, url, bundle
    finally:
        running.kill()
        running.communicate()


@pytest.mark.slow
def test_it_serves_reloads_and_ends_well_with_a_page_open(started, files, examples, tmp_path: Path) -> None:
    running, url, bundle = started
    known, printed, records = httpx.get(f"{url}/healthz", timeout=60).json()["bundle"], "", tmp_path / "m.sqlite"
    record(records, prediction())
    with sqlite3.connect(records) as database:
        database.execute("UPDATE answers SET time = time - 8 * 86400")  # what the service is not to keep

    def says(text: str) -> None:
        nonlocal printed
        while text not in (line := running.stdout.readline()):
            assert line, printed
            printed += line

    with httpx.stream("GET", f"{url}/gradio_api/heartbeat/abc", timeout=60) as page:  # what an open page holds on to
        next(page.iter_lines())
        running.send_signal(signal.SIGHUP)
        says("bundle reloaded")
        (bundle / FACTS).write_text("{")
        running.send_signal(signal.SIGHUP)
        says("bundle not reloaded")  # and the old one goes on
        assert httpx.post(f"{url}/predict", content=files[0], timeout=60).status_code == 200
        odd = examples["no-lesion.dcm"].replace(b"PHANTOM", b"JaneDoe").replace(b"IS\x02\0001 ", b"IS\x02\0JD")
        assert odd != examples["no-lesion.dcm"]
        visitor = Visitor(url)
        visitor.look([("Jane.dcm", odd)])
        assert "Jane" in str(visitor.values)  # whose own page tells it
        visitor.example(0)  # of which there is no record
        running.send_signal(signal.SIGTERM)
        printed += running.communicate(timeout=28)[0]  # uvicorn would wait 30 s for the open page
    assert running.returncode == 0, printed
    assert not [text for text in ("Traceback", "Jane", "JD") if text in printed]
    assert read_records(records)["bundle"].tolist() == [known] * 2  # of the API and of the page
    assert not list((tmp_path / "here").iterdir())  # neither runs nor uploads nor anything else


@pytest.mark.slow
def test_a_service_is_alive_while_it_waits_for_its_bundle_and_can_be_stopped_then(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a server that takes the question and never answers
        url, store = (f"http://127.0.0.1:{port}" for port in (free_port(), silent.getsockname()[1]))
        settings = ["bundle=models:/m@champion", f"tracking.uri={store}", f"serve.port={url.rsplit(':', 1)[1]}"]
        environment = os.environ | {"PYTHONPATH": str(CONF.parent), "MLFLOW_HTTP_REQUEST_TIMEOUT": "600"}
        running = subprocess.Popen(
            [*SERVE, *settings], cwd=tmp_path, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True
        )
        try:
            until(lambda: answers(f"{url}/healthz"), 120, running)
            assert httpx.get(f"{url}/healthz", timeout=60).json()["status"] == "starting"
            assert httpx.get(f"{url}/readyz", timeout=60).status_code == 503
            running.send_signal(signal.SIGHUP)  # which has nothing to load anew yet
            assert httpx.get(f"{url}/healthz", timeout=60).json()["status"] == "starting"
            silent.accept()
            running.send_signal(signal.SIGTERM)
            printed = running.communicate(timeout=60)[0]
        finally:
            running.kill()
            running.communicate()
    assert (running.returncode, "Terminated" in printed, "Traceback" in printed) == (130, True, False), printed
