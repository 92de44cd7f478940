"""What is refused before anything starts."""

from __future__ import annotations

import json
import pathlib
import re
import socket

import pytest

from baton.config import CacheConfig, ModelConfig, RouterConfig, ServeConfig
from deploy import preflight
from deploy.errors import StartError

LLAMA = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 128,
    "layer_types": ["full_attention"] * 4,
}


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


def test_a_pool_that_cannot_hold_the_longest_sequence_is_refused(checkpoint: pathlib.Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps(LLAMA))
    model = ModelConfig(path=str(checkpoint), max_model_len=64)
    # K and V of 4 layers, 2 heads of 32, bf16, 16 tokens; 4 blocks and the null block.
    needed = 2 * 4 * 2 * 32 * 2 * 16 * 5
    preflight.check_pool(ServeConfig(model=model, cache=CacheConfig(kv_cache_bytes=needed)))
    with pytest.raises(
        StartError, match=rf"kv_cache_bytes {needed - 1}: one sequence of model.max_model_len 64 .*{needed}"
    ):
        preflight.check_pool(ServeConfig(model=model, cache=CacheConfig(kv_cache_bytes=needed - 1)))


@pytest.mark.parametrize("config", ["{}", "[]", json.dumps({**LLAMA, "sliding_window": 8})])
def test_what_only_the_worker_can_know_is_left_to_it(checkpoint: pathlib.Path, config: str) -> None:
    (checkpoint / "config.json").write_text(config)
    model = ModelConfig(path=str(checkpoint), max_model_len=64)
    preflight.check_pool(ServeConfig(model=model, cache=CacheConfig(kv_cache_bytes=1)))


def test_heads_that_the_ranks_cannot_share_are_refused(checkpoint: pathlib.Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps(LLAMA))
    values = {"model": {"path": str(checkpoint)}, "decode": {"tensor_parallel_size": 4}}
    problem = "decode.tensor_parallel_size 4: does not divide the model's num_key_value_heads, 2"
    with pytest.raises(StartError, match=problem):
        preflight.check_ranks(ServeConfig.model_validate(values))
    preflight.check_ranks(ServeConfig.model_validate({**values, "decode": {"tensor_parallel_size": 2}}))


def test_tracing_that_is_not_understood_is_refused() -> None:
    with pytest.raises(StartError, match="OTEL_TRACES_EXPORTER jaeger: must be"):
        preflight.check_tracing({"OTEL_TRACES_EXPORTER": "jaeger"})


def test_the_files_of_tls_are_checked_by_the_names_of_their_settings(checkpoint: pathlib.Path) -> None:
    router = RouterConfig(grpc_port=0, http_port=0, tls_cert_file="nothing.pem", tls_key_file="nothing.key")
    with pytest.raises(StartError, match=r"router\.tls_cert_file nothing\.pem: No such file"):
        preflight.check(ServeConfig(model=ModelConfig(path=str(checkpoint)), router=router))
