"""Servers on loopback that stand for DagsHub's: MLflow with users, S3, and plain HTTP with a password."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from chestct.tracking import probe
from tests.conftest import until

TOKEN = "loopback-token-of-no-use"
PASSWORDS = {"admin": secrets.token_hex(16), "writer": secrets.token_hex(16), "reader": secrets.token_hex(16)}


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def answers(url: str) -> bool:
    """Whether there is a server that answers there, and no error."""
    with contextlib.suppress(OSError):
        urllib.request.urlopen(url, timeout=20).close()
        return True
    return False


@contextlib.contextmanager
def served(app):
    """The address of an application of Flask, which runs in a thread of this process."""
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


class Server:
    """`mlflow server` with its basic-auth app, in a process group of its own so that it can be killed whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        (folder / "auth.ini").write_text(
            "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
            f"database_uri = sqlite:///{folder}/auth.db\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            "auth_cache_ttl_seconds = 60\n"  # else every request hashes a password for a tenth of a second
        )

    def start(self) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini")}
        environment |= {"MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORDS["admin"]}
        environment |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16)}
        self.process = subprocess.Popen(
            f"{sys.executable} -m mlflow server --app-name basic-auth --host 127.0.0.1 --port {self.port} --workers 1 "
            f"--artifacts-destination artifacts --backend-store-uri sqlite:///server.db".split(),
            cwd=self.folder,
            env=environment,
            stdout=(self.folder / "server.log").open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        until(lambda: answers(f"{self.uri}/health"), 150, self.process, self.folder / "server.log", every=0.2)

    def signal(self, signum: int) -> None:
        os.killpg(self.process.pid, signum)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait(10)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running server with the users admin, writer (may do everything) and reader (may only read)."""
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            log_in(patch, "admin")
            from mlflow.server.auth.client import AuthServiceClient

            users = AuthServiceClient(made.uri)
            for name in ("writer", "reader"):
                users.create_user(name, PASSWORDS[name])
            assert probe(made.uri) is None  # admin makes the experiment, on which others may only read
            from mlflow import MlflowClient

            experiment = MlflowClient(made.uri).get_experiment_by_name("chestct").experiment_id
            users.grant_user_permission("writer", "experiment", experiment, "MANAGE")
        yield made
    finally:
        made.kill()


def log_in(monkeypatch, user, password=None):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password or PASSWORDS[user])


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
    from flask import Flask, request

    app, kept = Flask("plain"), {}

    @app.route("/<path:name>", methods=["GET", "POST"])
    def answer(name):
        login = request.authorization
        if not login or (login.username, login.password) != (TOKEN, TOKEN):
            return "", 401
        if request.method == "POST":
            kept[name] = request.get_data()
        return (kept[name], 200) if name in kept else ("", 404)

    with served(app) as address:
        yield address


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server that speaks what huggingface_hub asks of the hub for repositories of small files; (address, commits).

    commits: name of a repository -> its commits, each {path: bytes}; as on the hub, the last one is `main`.
    """
    import hashlib
    import json
    from base64 import b64decode

    from flask import Flask, Response, abort, jsonify, request

    app, commits = Flask("hub"), {}

    def sha(name, number):
        return hashlib.sha1(f"{name} {number}".encode()).hexdigest()

    def number(name, revision):
        known = {sha(name, i): i for i in range(len(commits.get(name, [])))}
        if revision == "main" and known:
            return len(known) - 1
        return known[revision] if revision in known else abort(Response("", 404, {"X-Error-Code": "RepoNotFound"}))

    @app.post("/api/repos/create")
    def create():
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return "", 401
        given = request.get_json()
        name = "/".join(filter(None, (given.get("organization"), given["name"])))
        name = name if "/" in name else f"ada/{name}"
        commits.setdefault(name, [{}])
        return jsonify(url=f"{request.host_url}{name}", name=name, id=name)

    @app.post("/api/validate-yaml")
    def validate():
        return jsonify(errors=[], warnings=[])

    @app.post("/api/models/<user>/<repo>/preupload/<revision>")
    def preupload(user, repo, revision):
        files = request.get_json()["files"]
        return jsonify(files=[{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files])

    @app.post("/api/models/<user>/<repo>/commit/<revision>")
    def commit(user, repo, revision):
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return "", 401
        name = f"{user}/{repo}"
        lines = [json.loads(line) for line in request.get_data().splitlines()]
        files = {line["value"]["path"]: b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
        commits[name].append(commits[name][-1] | files)
        oid = sha(name, len(commits[name]) - 1)
        return jsonify(success=True, commitOid=oid, commitUrl=f"{request.host_url}{name}/commit/{oid}")

    @app.get("/api/models/<user>/<repo>")
    @app.get("/api/models/<user>/<repo>/revision/<revision>")
    def info(user, repo, revision="main"):
        name = f"{user}/{repo}"
        return jsonify(id=name, modelId=name, sha=sha(name, number(name, revision)), siblings=[])

    @app.get("/api/models/<user>/<repo>/tree/<revision>")
    def tree(user, repo, revision):
        files = commits[f"{user}/{repo}"][number(f"{user}/{repo}", revision)]
        entries = [(path, data, hashlib.sha1(data).hexdigest()) for path, data in files.items()]
        return jsonify([{"type": "file", "path": p, "size": len(data), "oid": oid} for p, data, oid in entries])

    @app.get("/<user>/<repo>/resolve/<revision>/<path:path>")
    def resolve(user, repo, revision, path):
        at = number(f"{user}/{repo}", revision)
        data = commits[f"{user}/{repo}"][at].get(path)
        if data is None:
            return Response("", 404, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha(f"{user}/{repo}", at)}
        return Response(data, 200, headers)

    with served(app) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
        yield address, commits
