"""Configuration: composed, frozen, validated once; the same objects travel to every process as JSON.

"auto" values are resolved by functions that return a new config. `ServeConfig` is what the command line, the
environment and the YAML file describe; the supervisor derives each worker's `WorkerConfig` and the router's
`RouterProcessConfig` from it.
The docstring under a field is what docs/configuration.md and `baton serve --help` say of it.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

Role = Literal["prefill", "decode"]
# Processes, and on GPUs as many of these, that one worker's model is spread over.
TensorParallelSize = Annotated[int, Field(gt=0, le=64)]
Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
# Of Ray, whose labels are those of Kubernetes.
_LABEL = "[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
LABEL_SELECTOR = rf"^!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))$"
_API_KEY = re.compile(r"[!-~]{1,512}")


class Config(pydantic.BaseModel):
    """Base of all sections: frozen, and unknown names are errors."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )


class ModelConfig(Config):
    """The checkpoint and how to load it."""

    path: str
    """The checkpoint's directory, as `transformers` saves it: config.json, *.safetensors and the tokenizer."""
    served_name: Annotated[str, Field(max_length=256)] = ""
    """What clients call the model; empty means the directory's name."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes the GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the weights and of the KV; auto takes the checkpoint's where the device is fast at it."""
    attention: Literal["auto", "reference", "cpu", "triton"] = "auto"
    """How attention is computed; auto takes the fastest that the device has."""
    batch_invariant: bool = False
    """Whether a token's output is the same to the bit whatever else is in its batch; on a GPU, products are slower."""
    max_model_len: Positive | None = None
    """Most tokens of a sequence, prompt and answer together; null means as many as the model was made for."""
    num_threads: Annotated[int, Field(ge=0)] = 0
    """Torch threads of one worker; 0 shares this machine's CPUs among its workers."""
    max_threads: Annotated[int, Field(ge=0)] = 0
    """Torch threads of a worker while all others of its host are idle; 0 means all CPUs if num_threads is 0, else as
    many as that."""
    cuda_graphs: bool = True
    """Whether decode steps on a GPU are replayed as CUDA graphs."""

    @pydantic.field_validator("served_name")
    @classmethod
    def _check_served_name(cls, name: str) -> str:
        if name != name.strip() or not name.isprintable():
            raise ValueError("must have no blanks at its ends and no control characters")
        return name


class CacheConfig(Config):
    """The paged KV pool of one worker."""

    block_size: Literal[8, 16, 32, 64, 128, 256] = 16
    """Tokens of a KV block."""
    kv_cache_bytes: Positive | None = None
    """Bytes of KV in one worker's pool; null takes what gpu_memory_utilization leaves on a GPU, and elsewhere a share
    of the memory that is free at start."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that weights, KV and all else of the workers on it may use together; each has an equal
    part."""
    enable_prefix_cache: bool = True
    """Whether KV blocks of earlier prompts are used again."""


class PrefillConfig(Config):
    """The prefill worker's scheduler."""

    max_batch_tokens: Positive = 512
    """Most prompt tokens in one step, and so the largest chunk."""
    max_batch_requests: Positive = 16
    """Most prompts in one step."""
    ageing_s: Seconds = 5.0
    """Seconds of waiting that are worth one step of priority, so that nothing starves."""
    token_credit: Positive = 16384
    """Prompt tokens that the worker takes beyond what it computes now."""
    tensor_parallel_size: TensorParallelSize = 1
    """Ranks that one prefill worker's model is spread over: processes of one host, each with a GPU of its own where the
    model runs on GPUs."""


class DecodeConfig(Config):
    """The decode worker's scheduler and admission."""

    max_batch_seqs: Positive = 128
    """Most sequences (choices) in one step."""
    # Measured on CPUs, this many make a step of 8 sequences two to three times as long, and one of 32 half as long
    # again. A rest that is below local_prefill_tokens still takes one step; a larger chunk would only end several of
    # these in the same one.
    prefill_chunk_tokens: Positive = 32
    """Most tokens of local prefill in one step, beside the decodes: what bounds how much longer a step takes for it."""
    local_prefill_tokens: Annotated[int, Field(ge=0)] = 32
    """Prompts of which the worker lacks fewer tokens than this are prefilled by itself."""
    backlog_prefill_tokens: Annotated[int, Field(ge=0)] = 256
    """Prompts of which the worker lacks at most this many tokens are prefilled by itself while every prefill worker has
    so many waiting that it would take longer; 0 leaves them to the prefill workers."""
    watermark: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of the pool kept free at admission, so that running sequences can grow."""
    max_unacked_tokens: Positive = 1024
    """A choice with this many unacknowledged tokens is paused."""
    async_scheduling: Literal["auto", "on", "off"] = "auto"
    """Whether a step is launched before the tokens of the last one are looked at; auto does it on a GPU."""
    tensor_parallel_size: TensorParallelSize = 1
    """Ranks that one decode worker's model is spread over, as of a prefill worker; the two may differ."""


class TransferConfig(Config):
    """KV transfers between pools."""

    transports: tuple[Literal["loopback", "cuda_ipc", "shm", "collective", "grpc"], ...] = (
        "loopback",
        "cuda_ipc",
        "shm",
        "grpc",
    )
    """Ways that KV may take between workers, in order of preference: the first that both ends can use. `cuda_ipc` is
    for GPUs of one host, `collective` for NCCL between GPUs and Gloo between hosts."""
    # What messages of gRPC and the headers of frames can say.
    frame_bytes: Annotated[int, Field(gt=0, le=1 << 30)] = 4 << 20
    """Bytes of KV in the largest frame that passes through the memory of the host."""
    ring_bytes: Positive = 8 << 20
    """Bytes of the shared-memory ring of one sender and receiver."""
    lease_s: Seconds = 15.0
    """Seconds after which a reservation that is not renewed is released."""
    timeout_s: Seconds = 30.0
    """Most seconds that opening a transfer, one frame of it or its commit may take."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if not self.transports:
            raise ValueError("transports: must name at least one")
        if len(set(self.transports)) < len(self.transports):
            raise ValueError("transports: names one twice")
        if self.ring_bytes < self.frame_bytes:
            raise ValueError(f"ring_bytes: {self.ring_bytes} is less than frame_bytes, {self.frame_bytes}")
        return self


class RouterConfig(Config):
    """The router's listeners and limits."""

    host: str = "127.0.0.1"
    """The address that the router listens on."""
    grpc_port: Port = 50051
    """Port of the gRPC API; 0 takes a free one."""
    http_port: Port = 8000
    """Port of the HTTP API, of metrics and of probes; 0 takes a free one."""
    max_queued_requests: Positive = 4096
    """Most requests that wait in the router for workers; more are refused."""
    max_message_bytes: Positive = 16 << 20
    """Largest message of any gRPC stream and largest body of an HTTP request, in bytes."""
    max_prompts: Positive = 1024
    """Most prompts in the list of one HTTP request."""
    max_n: Positive = 16
    """Most choices (n) of a request."""
    max_logprobs: Positive = 20
    """Most likely tokens that a request may ask for at each position."""
    max_stop_strings: Positive = 16
    """Most stop strings of a request."""
    max_stop_string_chars: Positive = 1024
    """Most characters of a stop string."""
    max_logit_bias: Positive = 1024
    """Most tokens that a request's logit_bias may name."""
    max_grammar_bytes: Positive = 64 << 10
    """Most bytes of a request's grammar: its JSON schema, regular expression, choices or Lark text."""
    max_prompt_logprob_values: Positive = 200_000
    """Most logprobs of one request's prompt, tokens x (prompt_logprobs + 1): they come in one message, which so stays
    near the 4 MiB that gRPC clients take by default."""
    max_retries: Annotated[int, Field(ge=0)] = 3
    """Attempts after the first, when workers die before a request's KV is committed."""
    worker_wait_s: Seconds = 60.0
    """Most seconds that queued requests wait for workers to come back before they fail with UNAVAILABLE."""
    tokenizer_threads: Positive = 2
    """Threads that tokenise prompts."""
    tool_call_format: str = "auto"
    """How the model writes tool calls: a format of docs/tools.md, "auto" (told by its chat template) or "none"."""
    reasoning_format: str = "auto"
    """How the model marks its reasoning: a format of docs/tools.md, "auto" (told by its chat template) or "none"."""
    slo_ttft_s: Seconds = 2.0
    """Seconds to the first token that users expect at most: a request beyond it misses its objective in the metrics."""
    slo_tpot_s: Seconds = 0.1
    """Seconds between two tokens, on average over an answer, that users expect at most."""
    api_keys: Annotated[tuple[str, ...], Field(max_length=64, repr=False, json_schema_extra={"writeOnly": True})] = ()
    """Keys of which clients must send one, as `Authorization: Bearer KEY`; empty asks for none."""
    tls_cert_file: str | None = None
    """PEM file with the certificate of both ports and those up to its authority; null serves without TLS."""
    tls_key_file: str | None = None
    """PEM file with the private key of tls_cert_file."""
    tls_client_ca_file: str | None = None
    """PEM file with the authorities of clients' certificates, which both ports then ask for; null asks for none."""

    @pydantic.field_validator("api_keys")
    @classmethod
    def _check_api_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        # The message must not hold a key.
        if not all(_API_KEY.fullmatch(key) for key in keys):
            raise ValueError("each must have 1 to 512 visible ASCII characters and no blanks")
        return keys

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.grpc_port == self.http_port != 0:
            raise ValueError(f"http_port: {self.http_port} is grpc_port as well")
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file: one is set without the other")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise ValueError("tls_client_ca_file: needs tls_cert_file and tls_key_file")
        return self


class Placement(Config):
    """What a node of the Ray cluster must offer to a worker of one role."""

    labels: dict[str, Annotated[str, Field(pattern=LABEL_SELECTOR)]] = {}
    """Labels of the node and what they must be: a value, !value, in(a,b) or !in(a,b)."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Amounts of custom resources that Ray sets aside for a worker."""
    num_cpus: Annotated[float, Field(ge=0)] | None = None
    """CPUs that Ray sets aside for a worker; null means 1 in a cluster that was joined, else 0."""
    num_gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs that Ray sets aside for a worker; null means 1 where the model runs on GPUs, else 0."""
    strategy: Literal["spread", "pack"] = "spread"
    """Whether workers of the role go to as many nodes as possible, or to as few."""

    @pydantic.field_validator("resources")
    @classmethod
    def _check_resources(cls, resources: dict[str, float]) -> dict[str, float]:
        if named := {"CPU", "GPU", "memory", "object_store_memory"} & set(resources):
            raise ValueError(f"{min(named)} is no custom resource; there are num_cpus and num_gpus")
        return resources


class ClusterConfig(Config):
    """How many workers, and what runs them."""

    runtime: Literal["ray", "process"] = "ray"
    """What runs the workers: Ray, or plain processes of this machine."""
    ray_address: str | None = None
    """The Ray cluster to join, as host:port, or auto for the one that this host is a node of; null starts a local
    Ray."""
    prefill_workers: Positive = 1
    """Prefill workers to keep alive."""
    decode_workers: Positive = 1
    """Decode workers to keep alive."""
    worker_host: Annotated[str, Field(min_length=1)] = "auto"
    """The address that workers listen on and publish; auto is each node's own in a cluster that was joined, else
    127.0.0.1."""
    prefill_placement: Placement = Placement()
    """Where prefill workers may go in a Ray cluster: labels, resources, num_cpus, num_gpus, strategy."""
    decode_placement: Placement = Placement()
    """Where decode workers may go in a Ray cluster, likewise."""
    node_wait_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds to wait at start for nodes that fit to join the Ray cluster."""
    drain_s: Seconds = 30.0
    """Seconds that SIGTERM gives running requests."""

    @pydantic.field_validator("worker_host")
    @classmethod
    def _check_worker_host(cls, host: str) -> str:
        if host in ("0.0.0.0", "::", "[::]"):
            raise ValueError("is no address that other workers could be told; auto is each node's own")
        return host


class LogConfig(Config):
    """What every process writes to stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity of the lines that are written."""
    format: Literal["human", "json"] = "human"
    """Lines for people, or one JSON object a line."""


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
    """Written as JSON when the first request can be served, and removed at the end; null writes none."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        for role, degree, placement in (
            ("prefill", self.prefill.tensor_parallel_size, self.cluster.prefill_placement),
            ("decode", self.decode.tensor_parallel_size, self.cluster.decode_placement),
        ):
            if degree > 1 and self.model.device != "cpu" and placement.num_gpus not in (None, float(degree)):
                raise ValueError(
                    f"cluster.{role}_placement.num_gpus: {placement.num_gpus:g} is not {role}.tensor_parallel_size, "
                    f"{degree}: each rank takes a GPU"
                )
        return self


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

    @property
    def tensor_parallel_size(self) -> int:
        """That of the worker's role."""
        return (self.prefill if self.role == "prefill" else self.decode).tensor_parallel_size


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
        host=worker_host(config.cluster),
        model=config.model,
        cache=config.cache,
        prefill=config.prefill,
        decode=config.decode,
        transfer=config.transfer,
        log=config.log,
        max_message_bytes=config.router.max_message_bytes,
    )


def num_ranks(config: ServeConfig) -> int:
    """Processes of all workers together, each of which takes a GPU where the model runs on GPUs."""
    cluster = config.cluster
    return (
        cluster.prefill_workers * config.prefill.tensor_parallel_size
        + cluster.decode_workers * config.decode.tensor_parallel_size
    )


def with_part_of_gpu(config: WorkerConfig, part: float) -> WorkerConfig:
    """The config of a worker that has a GPU to itself as far as `part`, in (0, 1], goes."""
    utilization = config.cache.gpu_memory_utilization * part
    return config.model_copy(update={"cache": config.cache.model_copy(update={"gpu_memory_utilization": utilization})})


def worker_host(cluster: ClusterConfig) -> str:
    """The address that workers listen on; "auto" where every node of a Ray cluster has its own to give."""
    if cluster.worker_host != "auto":
        return cluster.worker_host
    return "auto" if cluster.runtime == "ray" and cluster.ray_address is not None else "127.0.0.1"


def supervisor_config(config: ServeConfig) -> ServeConfig:
    """The config that leaves the command's machine: without what the router alone may know."""
    return config.model_copy(update={"router": config.router.model_copy(update={"api_keys": ()})})


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
