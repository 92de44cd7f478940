"""The images' health check asks the router that the container's file and environment describe."""

from __future__ import annotations

import http.server
import pathlib
import socket
import threading
from collections.abc import Iterator

import pytest

from baton.config import RouterConfig
from deploy.docker import health
from deploy.errors import StartError


class Ready(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/ready" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def router() -> Iterator[RouterConfig]:
    """Of a server that is ready."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Ready)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield RouterConfig(host="0.0.0.0", http_port=server.server_port)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("127.0.0.1", 8000)),
        ({"BATON_HOST": "0.0.0.0", "BATON_HTTP_PORT": "9"}, ("127.0.0.1", 9)),
        ({"BATON_ROUTER__HOST": "::", "BATON_ROUTER__HTTP_PORT": "9"}, ("::1", 9)),
        ({"BATON_HOST": "10.0.0.9"}, ("10.0.0.9", 8000)),
    ],
)
def test_every_name_of_a_setting_counts(environ: dict[str, str], expected: tuple[str, int]) -> None:
    assert health.address(health.router_config(environ)) == expected


def test_a_mounted_file_counts(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text("{model: m, http_port: 7, tls_cert_file: c, tls_key_file: k}")
    router = health.router_config({"BATON_CONFIG": str(file)})
    assert (router.http_port, router.tls_cert_file) == (7, "c")


@pytest.mark.parametrize("name", ["BATON_TLS_CERT_FILE", "BATON_ROUTER__TLS_CERT_FILE"])
def test_so_does_tls(name: str) -> None:
    assert health.router_config({name: "c", "BATON_TLS_KEY_FILE": "k"}).tls_cert_file == "c"


def test_a_configuration_that_will_not_do_is_unhealthy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StartError):
        health.router_config({"BATON_HTTP_PORT": "x"})
    monkeypatch.setenv("BATON_HTTP_PORT", "x")
    assert health.main() == 1
    assert "BATON_HTTP_PORT x: must be a whole number" in capsys.readouterr().err


def test_only_200_is_ready(router: RouterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert health.is_ready(router)
    monkeypatch.setattr(Ready, "status", 503)
    assert not health.is_ready(router)


def test_nobody_who_listens_is_not_ready() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert not health.is_ready(RouterConfig(http_port=port))


def test_with_certificates_of_clients_it_is_enough_that_the_port_is_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        router = RouterConfig(http_port=port, tls_cert_file="c", tls_key_file="k", tls_client_ca_file="ca")
        assert health.is_ready(router)
    assert not health.is_ready(router)
