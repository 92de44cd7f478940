"""What is refused before anything starts."""

from __future__ import annotations

import pathlib
import re
import socket

import pytest

from baton.config import ModelConfig, RouterConfig, ServeConfig
from deploy import preflight
from deploy.errors import StartError


@pytest.fixture
def checkpoint(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


def test_a_checkpoint_and_free_ports_pass(checkpoint: pathlib.Path) -> None:
    router = RouterConfig(grpc_port=0, http_port=0)
    preflight.check(ServeConfig(model=ModelConfig(path=str(checkpoint)), router=router, ready_file="ready.json"))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "holds no config.json, so it is not a checkpoint"),
        ("model.safetensors", r"holds no *.safetensors weights"),
    ],
)
def test_a_directory_that_is_no_checkpoint_is_refused(checkpoint: pathlib.Path, missing: str, message: str) -> None:
    (checkpoint / missing).unlink()
    with pytest.raises(StartError, match=re.escape(f"--model {checkpoint}: {message}")):
        preflight.check_model(str(checkpoint))


def test_a_missing_directory_is_refused() -> None:
    with pytest.raises(StartError, match="--model /nowhere: no such directory"):
        preflight.check_model("/nowhere")


@pytest.mark.parametrize("option", [None, socket.SO_REUSEPORT])
def test_a_port_in_use_is_refused_by_the_flags_name(option: int | None) -> None:
    with socket.socket() as listener:
        if option is not None:
            listener.setsockopt(socket.SOL_SOCKET, option, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(StartError, match=f"--grpc-port {port}: .*127.0.0.1:{port} .Address already in use"):
            preflight.check_port("--grpc-port", "127.0.0.1", port)


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(StartError, match=r"--http-port 8000: cannot listen on 203.0.113.1:8000"):
        preflight.check_port("--http-port", "203.0.113.1", 8000)


def test_the_ready_files_folder_must_exist(checkpoint: pathlib.Path) -> None:
    router = RouterConfig(grpc_port=0, http_port=0)
    config = ServeConfig(model=ModelConfig(path=str(checkpoint)), router=router, ready_file="/nowhere/ready.json")
    with pytest.raises(StartError, match=r"--ready-file /nowhere/ready.json"):
        preflight.check(config)
