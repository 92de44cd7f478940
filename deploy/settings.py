"""`ServeConfig` from a YAML file and the command line's flags, which override it."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import pydantic
import yaml

from baton.config import ServeConfig
from deploy.errors import StartError

# Each flag of `baton serve` sets one value of ServeConfig.
FLAGS: Mapping[str, tuple[str, ...]] = {
    "--model": ("model", "path"),
    "--served-model-name": ("model", "served_name"),
    "--prefill-workers": ("cluster", "prefill_workers"),
    "--decode-workers": ("cluster", "decode_workers"),
    "--host": ("router", "host"),
    "--grpc-port": ("router", "grpc_port"),
    "--http-port": ("router", "http_port"),
    "--device": ("model", "device"),
    "--dtype": ("model", "dtype"),
    "--block-size": ("cache", "block_size"),
    "--kv-cache-bytes": ("cache", "kv_cache_bytes"),
    "--max-model-len": ("model", "max_model_len"),
    "--runtime": ("cluster", "runtime"),
    "--ray-address": ("cluster", "ray_address"),
    "--ready-file": ("ready_file",),
}


def load(file: str | None, flags: Mapping[str, Any]) -> ServeConfig:
    """The configuration that a YAML file and flags describe.

    Args:
        file: path of a file with the sections of `ServeConfig`; None for none.
        flags: values of the flags that were given, by flag.

    Raises:
        StartError: names the file and the value's path in it, or the flag.
    """
    values = _read(file) if file is not None else {}
    for flag, value in flags.items():
        *sections, name = FLAGS[flag]
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise StartError(f"{file}: {section}: must be a section")
        target[name] = value
    if "path" not in (values.get("model") or {}):
        raise StartError("--model is required: the checkpoint's directory")
    try:
        return ServeConfig.model_validate(values)
    except pydantic.ValidationError as error:
        raise StartError("\n".join(_describe(problem, file, flags) for problem in error.errors())) from error


def resolve(config: ServeConfig, num_cpus: int) -> ServeConfig:
    """The configuration that processes elsewhere can take: an absolute path, and threads for this machine's workers.

    A worker that took all CPUs would stall its neighbours, so they share them where the number of threads is left open.
    Workers of a Ray cluster that runs already may be on machines of their own and keep Torch's default.
    """
    model: dict[str, Any] = {"path": str(pathlib.Path(config.model.path).absolute())}
    if not config.model.num_threads and config.cluster.ray_address is None:
        num_workers = config.cluster.prefill_workers + config.cluster.decode_workers
        model["num_threads"] = max(1, num_cpus // num_workers)
    return config.model_copy(update={"model": config.model.model_copy(update=model)})


def _read(file: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(pathlib.Path(file).read_text())
    except OSError as error:
        raise StartError(f"--config {file}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise StartError(f"--config {file}: not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise StartError(f"--config {file}: must hold sections, such as model and cluster")
    return values


def _describe(problem: Any, file: str | None, flags: Mapping[str, Any]) -> str:
    path = tuple(str(part) for part in problem["loc"])
    for flag in flags:
        if FLAGS[flag] == path:
            return f"{flag} {flags[flag]}: {problem['msg']}"
    return f"{file}: {'.'.join(path)}: {problem['msg']}"
