"""What runs the processes of a cluster: a table of hosts, loaded when chosen."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from baton.config import Role, ServeConfig
from deploy.hosting import ACTORS
from deploy.runtimes.base import Host

HOSTS: Mapping[str, str] = {
    "process": "deploy.runtimes.process:ProcessHost",
    "ray": "deploy.runtimes.ray:RayHost",
}


def make_host(config: ServeConfig, actors: Mapping[Role, str] = ACTORS) -> Host:
    """The host that `config.cluster.runtime` names, not yet open."""
    module, _, name = HOSTS[config.cluster.runtime].partition(":")
    host: Host = getattr(importlib.import_module(module), name)(config, actors)
    return host
