"""TLS of the router's two ports, from one certificate: gRPC's credentials and uvicorn's options."""

from __future__ import annotations

import contextlib
import pathlib
import ssl
from collections.abc import Iterator
from typing import Any, NoReturn

import grpc

from baton.config import RouterConfig


class ServerTls:
    """The files of a configuration, read and checked once.

    A certificate that is renewed takes effect when the router starts again.
    """

    def __init__(self, *, cert_file: str, key_file: str, client_ca_file: str | None) -> None:
        """ValueError names the setting whose file cannot be read or used."""
        self._cert_file, self._key_file, self._client_ca_file = cert_file, key_file, client_ca_file
        self._certificate = _read("router.tls_cert_file", cert_file)
        self._key = _read("router.tls_key_file", key_file)
        self._client_ca = None if client_ca_file is None else _read("router.tls_client_ca_file", client_ca_file)
        # gRPC would only say that it cannot listen.
        self._check()

    @classmethod
    def from_config(cls, config: RouterConfig) -> ServerTls | None:
        """None where the configuration asks for no TLS."""
        if config.tls_cert_file is None or config.tls_key_file is None:
            return None
        return cls(
            cert_file=config.tls_cert_file, key_file=config.tls_key_file, client_ca_file=config.tls_client_ca_file
        )

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`."""
        return grpc.ssl_server_credentials(
            [(self._key, self._certificate)], self._client_ca, require_client_auth=self._client_ca is not None
        )

    def uvicorn_options(self) -> dict[str, Any]:
        """Arguments of `uvicorn.Config`."""
        return {
            "ssl_certfile": self._cert_file,
            "ssl_keyfile": self._key_file,
            "ssl_ca_certs": self._client_ca_file,
            "ssl_cert_reqs": ssl.CERT_NONE if self._client_ca_file is None else ssl.CERT_REQUIRED,
        }

    def _check(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with _named("router.tls_cert_file, router.tls_key_file", f"{self._cert_file}, {self._key_file}"):
            context.load_cert_chain(self._cert_file, self._key_file, password=_refuse_password)
        if self._client_ca_file is not None:
            with _named("router.tls_client_ca_file", self._client_ca_file):
                context.load_verify_locations(self._client_ca_file)


def _read(setting: str, file: str) -> bytes:
    try:
        return pathlib.Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{setting} {file}: {error.strerror}") from error


@contextlib.contextmanager
def _named(settings: str, files: str) -> Iterator[None]:
    """Tells of what OpenSSL refuses by the settings that it was read from."""
    try:
        yield
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise ValueError(f"{settings} {files}: {reason.replace('_', ' ').lower()}") from error


def _refuse_password() -> NoReturn:
    """OpenSSL would ask for it on the terminal."""
    raise ValueError("the key is encrypted; give it without a password")
