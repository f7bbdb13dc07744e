"""The configuration in docs/deploy.md, but for addresses and files, run by a real nginx in front of a real service."""

import base64
import contextlib
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from chestct.config.compose import CONF
from chestct.serving.sentences import HEADLINES
from tests.conftest import until
from tests.e2e.loopback import free_port
from tests.serving.conftest import Served, serving
from tests.serving.visitor import Visitor

pytestmark = pytest.mark.slow

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
OPENSSL = shutil.which("openssl")
NAME = "ct.example.org"


@pytest.fixture(scope="module")
def service(bundle_folder: Path) -> Iterator[Served]:
    if not NGINX or not OPENSSL:
        pytest.skip("needs nginx and openssl; apt-get install nginx-light openssl")
    with serving(bundle_folder, proxies=["127.0.0.1"], hosts=[NAME], max_requests_per_address=40) as running:
        yield running


@pytest.fixture(scope="module")
def proxy(service: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client that trusts the proxy's certificate and takes it for ct.example.org."""
    folder = tmp_path_factory.mktemp("nginx")
    key, certificate, users = folder / "key.pem", folder / "certificate.pem", folder / "users"
    subject = ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"]
    command = [OPENSSL, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key]
    subprocess.run([*command, "-out", certificate, *subject], check=True, capture_output=True)
    with users.open("w", encoding="utf-8") as file:
        for user in ("ann", "bob"):
            made = subprocess.run([OPENSSL, "passwd", "-apr1", f"{user}-secret"], check=True, capture_output=True)
            file.write(f"{user}:{made.stdout.decode()}")
    port = free_port()
    page = (CONF.parent / "docs" / "deploy.md").read_text(encoding="utf-8")
    site = page.split("```nginx\n")[1].split("```")[0]
    for old, new in {
        "listen 443": f"listen 127.0.0.1:{port}",
        "/etc/ssl/chestct/fullchain.pem": str(certificate),
        "/etc/ssl/chestct/privkey.pem": str(key),
        "auth_basic_user_file /etc/nginx/chestct.users": f"auth_basic_user_file {users}",
        "http://127.0.0.1:7860": service.url,
    }.items():
        assert site.count(old) == 1, old
        site = site.replace(old, new)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = f"daemon off;\npid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{}}\n"
    main += f"http {{\naccess_log off;\n{temporary}{site}}}\n"
    if os.geteuid() == 0:
        main = f"user root;\n{main}"
    (folder / "nginx.conf").write_text(main, encoding="utf-8")
    running = subprocess.Popen([NGINX, "-p", folder, "-c", folder / "nginx.conf"], stderr=subprocess.PIPE)
    client = httpx.Client(base_url=f"https://127.0.0.1:{port}", headers={"host": NAME}, verify=False, timeout=60)

    def answer() -> httpx.Response | None:
        with contextlib.suppress(httpx.TransportError):
            return client.get("/", extensions={"sni_hostname": NAME})
        return None

    try:
        until(answer, process=running)
        yield client
    finally:
        client.close()
        running.terminate()
        running.wait(20)


def test_every_user_has_a_password_and_the_service_never_sees_it(proxy: httpx.Client, files: list[bytes]) -> None:
    assert proxy.get("/").status_code == 401
    assert proxy.post("/predict", content=files[0], auth=("ann", "bob-secret")).status_code == 401
    for user in ("ann", "bob"):
        answer = proxy.post("/predict", content=files[0], auth=(user, f"{user}-secret"))
        assert answer.status_code == 200, answer.text
        assert answer.json()["decision"]


def test_the_page_works_through_it(proxy: httpx.Client, files: list[bytes]) -> None:
    proxy.auth = ("ann", "ann-secret")
    visitor = Visitor("", proxy)
    assert proxy.get("/config", headers={"x-forwarded-host": "evil.org"}).json()["root"] == f"https://{NAME}"
    visitor.look([("a.png", files[0])])
    assert visitor.headline == HEADLINES[proxy.post("/predict", content=files[0]).json()["decision"]]


def test_bodies_and_rates_are_limited_before_the_service(proxy: httpx.Client) -> None:
    auth = ("bob", "bob-secret")
    credentials = base64.b64encode(":".join(auth).encode())
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: Basic %s\r\nContent-Length: 300000001\r\n\r\n"
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    address = (proxy.base_url.host, proxy.base_url.port)
    with socket.create_connection(address, 20) as plain, trusting.wrap_socket(plain) as connection:
        connection.sendall(head % credentials)
        assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]
    codes = {proxy.get("/nothing", auth=auth).status_code for _ in range(400)}
    assert codes == {404, 429}
