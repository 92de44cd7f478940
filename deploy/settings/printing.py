"""A configuration as a YAML file that can be given to `baton serve` again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from baton import __version__
from baton.config import ServeConfig
from deploy.settings import schema
from deploy.settings.setting import Setting


def to_yaml(config: ServeConfig, settings: Mapping[schema.Path, Setting]) -> str:
    """Every value at its place; behind each that was set, where that was. Secrets are left out."""
    dumped = config.model_dump(mode="json")
    lines = [f"# The effective configuration of Baton {__version__}; what is set elsewhere than by default says where."]
    open_section: schema.Path = ()
    for path, value in schema.values().items():
        if path[:1] != open_section[:1]:
            lines.append("")
        new = [depth for depth in range(1, len(path)) if path[:depth] != open_section[:depth]]
        lines += [f"{'  ' * (depth - 1)}{path[depth - 1]}:" for depth in new]
        open_section = path[:-1]
        indent = "  " * (len(path) - 1)
        setting = settings.get(path)
        if value.is_secret:
            lines.append(f"{indent}# {path[-1]}: not shown" + (f", from {setting.origin}" if setting else ""))
            continue
        found: Any = dumped
        for name in path:
            found = found[name]
        origin = f"  # {setting.origin}" if setting is not None and found != value.default else ""
        lines.append(f"{indent}{path[-1]}: {_scalar(found)}{origin}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """A value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=2**31, allow_unicode=True)
    return text.removesuffix("...\n").strip()
