"""Configuration: composed, frozen, validated once; the same objects travel to every process as JSON.

"auto" values are resolved by functions that return a new config. `ServeConfig` is what the command line and the YAML
file describe; the supervisor derives each worker's `WorkerConfig` and the router's `RouterConfig` from it.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Annotated, Literal

import pydantic
from pydantic import Field

Role = Literal["prefill", "decode"]
Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


class Config(pydantic.BaseModel):
    """Base of all sections: frozen, and unknown names are errors."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Config):
    """The checkpoint and how to load it."""

    path: str
    served_name: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "reference", "cpu"] = "auto"
    max_model_len: Positive | None = None
    # Torch threads of one worker; 0 lets torch decide.
    num_threads: Annotated[int, Field(ge=0)] = 0


class CacheConfig(Config):
    """The paged KV pool of one worker."""

    block_size: Literal[8, 16, 32, 64, 128, 256] = 16
    # Bytes of KV in one worker's pool; None takes a share of the memory that is free at start.
    kv_cache_bytes: Positive | None = None
    enable_prefix_cache: bool = True


class PrefillConfig(Config):
    """The prefill worker's scheduler."""

    # Most prompt tokens in one step, and so the largest chunk.
    max_batch_tokens: Positive = 512
    # Most prompts in one step.
    max_batch_requests: Positive = 16
    # Waiting this long is worth one step of priority, so that nothing starves.
    ageing_s: Seconds = 5.0
    # Prompt tokens that the worker takes beyond what it computes now.
    token_credit: Positive = 16384


class DecodeConfig(Config):
    """The decode worker's scheduler and admission."""

    # Most sequences (choices) in one step.
    max_batch_seqs: Positive = 128
    # Tokens of local prefill in one step, beside the decodes.
    prefill_chunk_tokens: Positive = 64
    # Prompts of which the worker lacks fewer tokens than this are prefilled by itself.
    local_prefill_tokens: Annotated[int, Field(ge=0)] = 32
    # Share of the pool kept free at admission, so that running sequences can grow.
    watermark: Annotated[float, Field(ge=0, lt=1)] = 0.02
    # A choice with this many unacknowledged tokens is paused.
    max_unacked_tokens: Positive = 1024


class TransferConfig(Config):
    """KV transfers between pools."""

    # In order of preference.
    transports: tuple[Literal["loopback", "shm", "grpc"], ...] = ("loopback", "shm", "grpc")
    # Largest payload of one frame.
    frame_bytes: Positive = 1 << 20
    # Shared-memory ring of one sender and receiver.
    ring_bytes: Positive = 16 << 20
    # A reservation that is not renewed for this long is released.
    lease_s: Seconds = 15.0
    # Longest time that Open, one frame or Commit may take.
    timeout_s: Seconds = 30.0


class RouterConfig(Config):
    """The router's listeners and limits."""

    host: str = "127.0.0.1"
    grpc_port: Port = 50051
    http_port: Port = 8000
    # Requests that wait in the router for workers.
    max_queued_requests: Positive = 4096
    # Largest message of any gRPC stream, in bytes.
    max_message_bytes: Positive = 16 << 20
    max_n: Positive = 16
    max_logprobs: Positive = 20
    max_stop_strings: Positive = 16
    max_stop_string_chars: Positive = 1024
    max_logit_bias: Positive = 1024
    # Attempts after the first, when workers die before a request's KV is committed.
    max_retries: Annotated[int, Field(ge=0)] = 3
    # Longest wait for workers to come back before queued requests fail with UNAVAILABLE.
    worker_wait_s: Seconds = 60.0
    # Threads that tokenise prompts.
    tokenizer_threads: Positive = 2


class ClusterConfig(Config):
    """How many workers, and what runs them."""

    runtime: Literal["ray", "process"] = "ray"
    ray_address: str | None = None
    prefill_workers: Positive = 1
    decode_workers: Positive = 1
    # The address that workers listen on and publish.
    worker_host: str = "127.0.0.1"
    # What Ray sets aside for a worker; 0 lets it be placed anywhere.
    ray_worker_cpus: Annotated[float, Field(ge=0)] = 0.0
    ray_worker_gpus: Annotated[float, Field(ge=0)] = 0.0
    # Time that SIGTERM gives running requests.
    drain_s: Seconds = 30.0


class LogConfig(Config):
    level: Literal["debug", "info", "warning", "error"] = "info"


class ServeConfig(Config):
    """All of `baton serve`."""

    model: ModelConfig
    cache: CacheConfig = CacheConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    transfer: TransferConfig = TransferConfig()
    router: RouterConfig = RouterConfig()
    cluster: ClusterConfig = ClusterConfig()
    log: LogConfig = LogConfig()
    ready_file: str | None = None


class WorkerConfig(Config):
    """All that one worker process needs."""

    role: Role
    name: str
    epoch: Positive
    host: str = "127.0.0.1"
    model: ModelConfig
    cache: CacheConfig = CacheConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    transfer: TransferConfig = TransferConfig()
    log: LogConfig = LogConfig()
    max_message_bytes: Positive = 16 << 20


class RouterProcessConfig(Config):
    """All that the router process needs."""

    model: ModelConfig
    router: RouterConfig
    decode: DecodeConfig
    transfer: TransferConfig
    log: LogConfig = LogConfig()
    # host:port of the supervisor's Membership service.
    membership_address: str
    # Time that SIGTERM gives running requests.
    drain_s: Seconds = 30.0


def worker_config(config: ServeConfig, role: Role, name: str, epoch: int) -> WorkerConfig:
    """The config of one worker incarnation."""
    return WorkerConfig(
        role=role,
        name=name,
        epoch=epoch,
        host=config.cluster.worker_host,
        model=config.model,
        cache=config.cache,
        prefill=config.prefill,
        decode=config.decode,
        transfer=config.transfer,
        log=config.log,
        max_message_bytes=config.router.max_message_bytes,
    )


def router_process_config(config: ServeConfig, membership_address: str) -> RouterProcessConfig:
    """The config of the router process."""
    return RouterProcessConfig(
        model=config.model,
        router=config.router,
        decode=config.decode,
        transfer=config.transfer,
        log=config.log,
        membership_address=membership_address,
        drain_s=config.cluster.drain_s,
    )


def model_name(model: ModelConfig) -> str:
    """The name that clients use: the one given, else the checkpoint folder's."""
    return model.served_name or pathlib.Path(model.path).resolve().name


def numba_cache_dir(environ: Mapping[str, str] = os.environ) -> str:
    """Folder for compiled kernels: NUMBA_CACHE_DIR, else the user's cache, else a private temporary folder.

    Read-only homes (containers) fall through to the last.
    """
    if configured := environ.get("NUMBA_CACHE_DIR"):
        return configured
    home = pathlib.Path(environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    candidate = home / "baton" / "numba"
    try:
        candidate.mkdir(parents=True, exist_ok=True)
        if os.access(candidate, os.W_OK):
            return str(candidate)
    except OSError:
        pass
    fallback = pathlib.Path("/tmp") / f"baton-numba-{os.getuid()}"
    fallback.mkdir(mode=0o700, exist_ok=True)
    return str(fallback)
