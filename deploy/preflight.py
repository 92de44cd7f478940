"""What can be known to be wrong before anything is started."""

from __future__ import annotations

import pathlib
import socket

from baton.config import ServeConfig
from deploy.errors import StartError


def check(config: ServeConfig) -> None:
    """Checks the checkpoint folder, the ports and the ready file's folder.

    Raises:
        StartError: names the flag and the problem.
    """
    check_model(config.model.path)
    check_port("--grpc-port", config.router.host, config.router.grpc_port)
    check_port("--http-port", config.router.host, config.router.http_port)
    if config.ready_file is not None and not pathlib.Path(config.ready_file).absolute().parent.is_dir():
        raise StartError(f"--ready-file {config.ready_file}: its folder does not exist")


def check_model(path: str) -> None:
    """Checks that `path` looks like a checkpoint; what is in it is the workers' to judge."""
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise StartError(f"--model {path}: no such directory")
    if not (folder / "config.json").is_file():
        raise StartError(f"--model {path}: holds no config.json, so it is not a checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise StartError(f"--model {path}: holds no *.safetensors weights")


def check_port(flag: str, host: str, port: int) -> None:
    """Checks that the router can listen; gRPC alone would share a taken port in silence (SO_REUSEPORT)."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: connections of a server that has ended do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise StartError(f"{flag} {port}: cannot listen on {host}:{port} ({error.strerror})") from error
