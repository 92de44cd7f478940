"""Whether the router of this container can serve: `python -m deploy.docker.health`, the image's health check.

Where the router listens is what `baton serve` would make of the same file and environment. Flags of the command are not
known here: what they change of address or TLS is to be said by a variable or in the file.
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping

from baton.config import RouterConfig
from deploy import settings
from deploy.errors import StartError

TIMEOUT_S = 4.0
# Required, but nothing to this check; the command may have it from a flag.
_MODEL = {"--model": "/models/model"}
# Addresses that stand for all of a machine's, and the one of them to ask.
_LOCAL = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def router_config(environ: Mapping[str, str]) -> RouterConfig:
    """The router's part of the effective configuration.

    Raises:
        StartError: it is not valid.
    """
    return settings.load(None, _MODEL, environ).router


def address(router: RouterConfig) -> tuple[str, int]:
    """Host and port of the HTTP API, as seen in the container."""
    return _LOCAL.get(router.host, router.host), router.http_port


def is_ready(router: RouterConfig) -> bool:
    """Whether /ready answers 200; whether the port takes connections where only clients with a certificate may ask."""
    host, port = address(router)
    try:
        if router.tls_client_ca_file:
            socket.create_connection((host, port), timeout=TIMEOUT_S).close()
            return True
        scheme = "https" if router.tls_cert_file else "http"
        netloc = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        with urllib.request.urlopen(f"{scheme}://{netloc}/ready", timeout=TIMEOUT_S, context=_context()) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.HTTPError):
        return False


def _context() -> ssl.SSLContext:
    """Does not check the certificate, which is for the name that clients use."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def main() -> int:
    """Returns the exit status, and prints why where the configuration will not do."""
    try:
        return 0 if is_ready(router_config(os.environ)) else 1
    except StartError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
