"""What tests ask of PromQL: which series an expression reads, and a dashboard's expression as Prometheus takes it."""

from __future__ import annotations

import functools
import pathlib
import re
from typing import Any

import yaml

from baton.metrics.reference import catalogue

FOLDER = pathlib.Path(__file__).parents[3] / "deploy" / "prometheus"
RULE_FILES = sorted((FOLDER / "rules").glob("*.yml"))

_STRING = re.compile(r'"[^"]*"')
_SELECTOR = re.compile(r"(\{[^{}]*\})")
_COMPARISON = re.compile(r"(==|!=|>=|<=|>|<)(?! *bool)")
# Not Baton's own, and there all the same.
_FOREIGN = {"up", "ALERTS"} | {
    f"process_{name}" for name in ("cpu_seconds_total", "resident_memory_bytes", "open_fds", "start_time_seconds")
}


@functools.cache
def rules() -> list[dict[str, Any]]:
    """Every rule of every file."""
    files = [yaml.safe_load(path.read_text()) for path in RULE_FILES]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


@functools.cache
def known_series() -> set[str]:
    """Names that a query may read: what processes expose, and what rules record."""
    exposed = {name for group in catalogue().values() for series in group for name in series.sample_names}
    return exposed | {rule["record"] for rule in rules() if "record" in rule} | _FOREIGN


def series_in(expr: str) -> set[str]:
    """Names of series that an expression reads."""
    names = re.findall(r"[a-zA-Z_:][\w:]*", _STRING.sub("", expr))
    return {name for name in names if "baton_" in name or name in _FOREIGN or name.startswith(("process_", "python_"))}


def with_variables(expr: str) -> str:
    """A dashboard's expression with everything chosen."""
    return re.sub(r"\$(model|worker)\b", ".*", expr).replace("$__rate_interval", "1m")


def unfiltered(expr: str) -> str:
    """The expression with every comparison as 0 or 1: what an alert reads gives data though it does not fire."""
    parts = _SELECTOR.split(expr)
    return "".join(part if part.startswith("{") else _COMPARISON.sub(r"\1 bool", part) for part in parts)
