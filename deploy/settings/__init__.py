"""`ServeConfig` from a YAML file, the environment and the command line's flags.

What is set in several of them is taken from the flag, else the environment, else the file, else the default.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import pydantic

from baton.config import ServeConfig
from deploy.errors import StartError
from deploy.settings import printing, problems, schema
from deploy.settings.environment import CONFIG_VARIABLE, read_environment, unknown_variables
from deploy.settings.file import read_file
from deploy.settings.schema import FLAGS
from deploy.settings.setting import Setting

__all__ = ["FLAGS", "Settings", "load", "read", "resolve", "unknown_variables"]


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """A configuration and where it is from.

    Attributes:
        origins: the values that were set.
    """

    config: ServeConfig
    origins: Mapping[schema.Path, Setting]

    def to_yaml(self) -> str:
        """The effective configuration as a file."""
        return printing.to_yaml(self.config, self.origins)


def read(file: str | None, flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Settings:
    """The configuration that a YAML file, the environment and flags describe.

    Args:
        file: path of the file; None for that in BATON_CONFIG, if any.
        flags: values of the flags that were given, by flag.

    Raises:
        StartError: names the origin of each value that will not do, the value, and what it must be.
    """
    file = file if file is not None else environ.get(CONFIG_VARIABLE) or None
    from_flags = [Setting(FLAGS[flag], value, flag) for flag, value in flags.items()]
    layers = [read_file(file) if file is not None else [], read_environment(environ), from_flags]
    origins = {setting.path: setting for layer in layers for setting in layer}
    if ("model", "path") not in origins:
        raise StartError("--model is required: the checkpoint's directory")
    values: dict[str, Any] = {}
    for path, setting in origins.items():
        *sections, name = path
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = setting.value
    try:
        config = ServeConfig.model_validate(values)
    except pydantic.ValidationError as error:
        raise StartError(problems.describe(error, origins)) from error
    return Settings(config, origins)


def load(file: str | None, flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> ServeConfig:
    """The configuration of `read`."""
    return read(file, flags, environ).config


def resolve(config: ServeConfig, num_cpus: int) -> ServeConfig:
    """The configuration that processes elsewhere can take: an absolute path, and threads for this machine's workers.

    A worker that took all CPUs would stall its neighbours, so they share them where the number of threads is left open,
    and take them all only while the others are idle.
    Workers of a Ray cluster that runs already may be on machines of their own and keep Torch's default.
    """
    model: dict[str, Any] = {"path": str(pathlib.Path(config.model.path).absolute())}
    if not config.model.num_threads and config.cluster.ray_address is None:
        num_workers = config.cluster.prefill_workers + config.cluster.decode_workers
        model["num_threads"] = max(1, num_cpus // num_workers)
        model["max_threads"] = config.model.max_threads or num_cpus
    return config.model_copy(update={"model": config.model.model_copy(update=model)})
