"""What must be the same on every node of a Ray cluster, checked by each worker before it loads anything."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
from collections.abc import Mapping

from baton import __version__

# Two releases of these may compute different tokens, or not understand each other's messages.
_PACKAGES = ("torch", "transformers")


def installed_versions() -> dict[str, str]:
    """Versions of Baton, of Python up to its minor one, and of the packages that compute.

    Builds of one version for other devices (2.11.0+cpu) are that version: the router's node may have no GPU.
    """
    python = ".".join(platform.python_version_tuple()[:2])
    packages = {name: importlib.metadata.version(name).partition("+")[0] for name in _PACKAGES}
    return {"Baton": __version__, "Python": python, **packages}


def describe_problem(versions: Mapping[str, str], model: str) -> str:
    """Why a worker cannot run on this node; empty where it can.

    Args:
        versions: of where `baton serve` runs.
        model: the checkpoint's directory, at the same path on every node.
    """
    here = installed_versions()
    differences = [
        f"{name} is {here.get(name, 'absent')} here and {version} where baton serve runs"
        for name, version in versions.items()
        if here.get(name) != version
    ]
    if differences:
        return "; ".join(differences)
    if not pathlib.Path(model).is_dir():
        return f"--model {model}: no such directory; every node needs the checkpoint at this path"
    return ""
