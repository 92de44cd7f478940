"""What can be known to be wrong before anything is started."""

from __future__ import annotations

import json
import os
import pathlib
import socket
from collections.abc import Mapping
from typing import Any

from baton import tracing
from baton.config import RouterConfig, ServeConfig
from deploy.errors import StartError
from router.tls import ServerTls


def check(config: ServeConfig) -> None:
    """Checks the checkpoint folder, the ports, the files of TLS, the KV pool, the ranks, tracing and the ready file's
    folder.

    Raises:
        StartError: names the flag and the problem.
    """
    check_model(config.model.path)
    check_port("--grpc-port", config.router.host, config.router.grpc_port)
    check_port("--http-port", config.router.host, config.router.http_port)
    check_tls(config.router)
    check_pool(config)
    check_ranks(config)
    check_tracing()
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


def check_tls(config: RouterConfig) -> None:
    """Checks that the certificate, its key and the clients' authorities can be used, where they are set."""
    try:
        ServerTls.from_config(config)
    except ValueError as error:
        raise StartError(str(error)) from error


def check_pool(config: ServeConfig) -> None:
    """Checks that a pool of `kv_cache_bytes` can hold a sequence of `max_model_len` tokens, where both are set.

    Only of models whose layers all attend over everything is enough known here; a worker judges the others itself.
    """
    num_tokens, num_bytes = config.model.max_model_len, config.cache.kv_cache_bytes
    if num_tokens is None or num_bytes is None:
        return
    block_bytes = _block_bytes(config)
    # Block 0 of a pool holds nothing.
    num_blocks = -(-num_tokens // config.cache.block_size) + 1
    if block_bytes is not None and num_bytes < num_blocks * block_bytes:
        raise StartError(
            f"cache.kv_cache_bytes {num_bytes}: one sequence of model.max_model_len {num_tokens} needs at least "
            f"{num_blocks * block_bytes}"
        )


def _block_bytes(config: ServeConfig) -> int | None:
    """Bytes of a KV block over all layers, at least; None where config.json does not tell."""
    try:
        checkpoint: Mapping[str, Any] = json.loads((pathlib.Path(config.model.path) / "config.json").read_text())
        if checkpoint.get("sliding_window") or set(checkpoint.get("layer_types") or ()) - {"full_attention"}:
            return None
        num_heads = int(checkpoint["num_attention_heads"])
        num_kv_heads = int(checkpoint.get("num_key_value_heads") or num_heads)
        head_dim = int(checkpoint.get("head_dim") or checkpoint["hidden_size"] // num_heads)
        num_layers = int(checkpoint["num_hidden_layers"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    item_bytes = 4 if config.model.dtype == "float32" else 2
    return 2 * num_layers * num_kv_heads * head_dim * item_bytes * config.cache.block_size


def check_ranks(config: ServeConfig) -> None:
    """Checks that the model's heads and columns can be shared among the ranks of workers of either role."""
    try:
        checkpoint = json.loads((pathlib.Path(config.model.path) / "config.json").read_text())
    except (OSError, ValueError):
        checkpoint = None
    if not isinstance(checkpoint, dict):
        # A worker says what is wrong with it.
        return
    for section, size in (
        ("prefill", config.prefill.tensor_parallel_size),
        ("decode", config.decode.tensor_parallel_size),
    ):
        for field in ("num_key_value_heads", "num_attention_heads", "intermediate_size"):
            value = checkpoint.get(field)
            if isinstance(value, int) and value % size:
                raise StartError(f"{section}.tensor_parallel_size {size}: does not divide the model's {field}, {value}")


def check_tracing(environ: Mapping[str, str] = os.environ) -> None:
    """Checks that the environment's variables for tracing name what there is."""
    try:
        if tracing.exporter_of(environ) is not None:
            tracing.protocol_of(environ)
    except ValueError as error:
        raise StartError(str(error)) from error


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
