"""What can be set: every value of `ServeConfig` with its type, limits and description, and the names that it goes by.

A value has a place (`cluster.prefill_workers`), perhaps a flag (`--prefill-workers`), and so one or two names in a file
(`prefill_workers`) and in the environment (`BATON_PREFILL_WORKERS`, `BATON_CLUSTER__PREFILL_WORKERS`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from baton.config import ServeConfig

Path = tuple[str, ...]

PREFIX = "BATON_"

# Each flag of `baton serve` sets one value of ServeConfig.
FLAGS: Mapping[str, Path] = {
    "--model": ("model", "path"),
    "--served-model-name": ("model", "served_name"),
    "--prefill-workers": ("cluster", "prefill_workers"),
    "--decode-workers": ("cluster", "decode_workers"),
    "--host": ("router", "host"),
    "--grpc-port": ("router", "grpc_port"),
    "--http-port": ("router", "http_port"),
    "--device": ("model", "device"),
    "--dtype": ("model", "dtype"),
    "--attention": ("model", "attention"),
    "--batch-invariant": ("model", "batch_invariant"),
    "--num-threads": ("model", "num_threads"),
    "--block-size": ("cache", "block_size"),
    "--kv-cache-bytes": ("cache", "kv_cache_bytes"),
    "--gpu-memory-utilization": ("cache", "gpu_memory_utilization"),
    "--max-model-len": ("model", "max_model_len"),
    "--max-batch-tokens": ("prefill", "max_batch_tokens"),
    "--max-batch-seqs": ("decode", "max_batch_seqs"),
    "--prefill-tensor-parallel-size": ("prefill", "tensor_parallel_size"),
    "--decode-tensor-parallel-size": ("decode", "tensor_parallel_size"),
    "--local-prefill-tokens": ("decode", "local_prefill_tokens"),
    "--transports": ("transfer", "transports"),
    "--max-queued-requests": ("router", "max_queued_requests"),
    "--tool-call-format": ("router", "tool_call_format"),
    "--reasoning-format": ("router", "reasoning_format"),
    "--tls-cert-file": ("router", "tls_cert_file"),
    "--tls-key-file": ("router", "tls_key_file"),
    "--runtime": ("cluster", "runtime"),
    "--ray-address": ("cluster", "ray_address"),
    "--worker-host": ("cluster", "worker_host"),
    "--drain-s": ("cluster", "drain_s"),
    "--log-level": ("log", "level"),
    "--log-format": ("log", "format"),
    "--ready-file": ("ready_file",),
}


# Names like those of flags, for what must not be in a command line that everybody can read.
NAMES: Mapping[str, Path] = {"api_keys": ("router", "api_keys")}


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """One value that can be set.

    Attributes:
        schema: its JSON schema.
        flag: the flag that sets it; None where there is none.
        alias: its name at the top of a file, which is the flag's; None where there is none.
    """

    path: Path
    schema: Mapping[str, Any]
    flag: str | None
    alias: str | None

    @property
    def place(self) -> str:
        """Its place in a file, dotted."""
        return ".".join(self.path)

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables that set it, the shorter first."""
        long = PREFIX + "__".join(self.path).upper()
        short = () if self.alias is None else (PREFIX + self.alias.upper(),)
        return short if long in short else (*short, long)

    @property
    def description(self) -> str:
        return " ".join(self.schema["description"].split())

    @property
    def is_required(self) -> bool:
        return "default" not in self.schema

    @property
    def default(self) -> Any:
        """As JSON has it."""
        return self.schema.get("default")

    @property
    def is_secret(self) -> bool:
        """Whether it is to be shown nowhere."""
        return bool(self.schema.get("writeOnly"))

    @property
    def plain(self) -> Mapping[str, Any]:
        """The JSON schema of what it is where it is not null."""
        options = [option for option in self.schema.get("anyOf", ()) if option.get("type") != "null"]
        return options[0] if options else self.schema

    @property
    def is_nullable(self) -> bool:
        return any(option.get("type") == "null" for option in self.schema.get("anyOf", ()))

    @property
    def kind(self) -> str:
        """The JSON type: string, integer, number, boolean, array or object."""
        return str(self.plain.get("type", "string" if self.choices else "object"))

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values that it may have, where they can be counted."""
        return tuple(self.plain.get("enum", ()))

    def limits(self) -> str:
        """In words, such as "at least 1"; empty where there are none."""
        words = {
            "minimum": "at least",
            "exclusiveMinimum": "above",
            "maximum": "at most",
            "exclusiveMaximum": "below",
            "minLength": "at least",
            "maxLength": "at most",
            "maxItems": "at most",
        }
        found = {words[key]: self.plain[key] for key in words if key in self.plain}
        if self.kind == "integer" and found.get("above") == 0:
            found = {"at least": 1, **{word: limit for word, limit in found.items() if word != "above"}}
        unit = {"string": " characters", "array": " items"}.get(self.kind, "")
        return ", ".join(f"{word} {limit:.10g}{unit}" for word, limit in found.items())


@functools.cache
def values() -> Mapping[Path, Value]:
    """Every value of `ServeConfig` by its path, in the order of the sections."""
    flags = {path: flag for flag, path in FLAGS.items()}
    names = {path: name for name, path in NAMES.items()}
    names |= {path: flag.removeprefix("--").replace("-", "_") for flag, path in FLAGS.items()}
    entries = _entries().items()
    return {
        path: Value(path, entry, flags.get(path), names.get(path)) for path, entry in entries if not _is_section(entry)
    }


@functools.cache
def sections() -> Mapping[Path, str]:
    """The sections, and the sections in them, with what they are about."""
    return {path: str(entry["description"]) for path, entry in _entries().items() if _is_section(entry)}


@functools.cache
def aliases() -> Mapping[str, Path]:
    """The names that flags give to values at the top of a file."""
    return {value.alias: path for path, value in values().items() if value.alias is not None}


@functools.cache
def variables() -> Mapping[str, Path]:
    """Every environment variable that sets a value."""
    return {variable: path for path, value in values().items() for variable in value.variables}


@functools.cache
def _entries() -> Mapping[Path, Mapping[str, Any]]:
    """The schema of each section and value; a section comes before what is in it."""
    root = ServeConfig.model_json_schema()
    found: dict[Path, Mapping[str, Any]] = {}

    def walk(path: Path, properties: Mapping[str, Any]) -> None:
        for name, entry in properties.items():
            definition = root["$defs"][entry["$ref"].rpartition("/")[2]] if "$ref" in entry else {}
            # What a field says of itself goes before what its class says.
            found[*path, name] = {**definition, **entry}
            walk((*path, name), definition.get("properties", {}))

    walk((), root["properties"])
    return found


def _is_section(entry: Mapping[str, Any]) -> bool:
    return "properties" in entry
