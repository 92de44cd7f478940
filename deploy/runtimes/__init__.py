"""What runs the processes of a cluster: a table of hosts, loaded when chosen."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from baton.config import Role, ServeConfig
from deploy.environment import set_ray_authentication
from deploy.hosting import ACTORS
from deploy.runtimes.base import Host

HOSTS: Mapping[str, str] = {
    "process": "deploy.runtimes.process:ProcessHost",
    "ray": "deploy.runtimes.ray_host:RayHost",
}


def make_host(config: ServeConfig, actors: Mapping[Role, str] = ACTORS) -> Host:
    """The host that `config.cluster.runtime` names, not yet open."""
    if config.cluster.runtime == "ray":
        set_ray_authentication(joining=config.cluster.ray_address is not None)
    module, _, name = HOSTS[config.cluster.runtime].partition(":")
    host: Host = getattr(importlib.import_module(module), name)(config, actors)
    return host
