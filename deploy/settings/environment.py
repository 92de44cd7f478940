"""Reads settings from environment variables: `BATON_HTTP_PORT`, or by place `BATON_ROUTER__HTTP_PORT`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from deploy.errors import StartError
from deploy.settings import schema
from deploy.settings.file import suggest
from deploy.settings.setting import Setting

CONFIG_VARIABLE = "BATON_CONFIG"
# Read by the commands that are clients, and by the tests.
_OTHERS = frozenset(
    {CONFIG_VARIABLE, "BATON_TARGET", "BATON_URL", "BATON_API_KEY", "BATON_TLS_CA", "BATON_REQUIRE_TOOLS"}
)
_OF_TESTS = "BATON_TEST_"
# What Kubernetes puts into every container for a Service named baton, or baton-something.
_SERVICE_LINK = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_\w+)?$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_SERVICE_URL = re.compile(r"^(tcp|udp|sctp)://")


def read_environment(environ: Mapping[str, str]) -> list[Setting]:
    """The settings in the environment; an empty variable sets nothing.

    Raises:
        StartError: two variables set one value.
    """
    settings: dict[schema.Path, Setting] = {}
    for name, text in _candidates(environ):
        path = schema.variables().get(name)
        if path is None:
            continue
        setting = Setting(path, parse(schema.values()[path], text), name)
        other = settings.setdefault(path, setting)
        if other is not setting:
            raise StartError(f"{name} and {other.name} are the same setting; keep one")
    return list(settings.values())


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A line about each variable that looks like a setting and is none, with what was perhaps meant."""
    known = list(schema.variables())
    return [f"{name} is no setting{suggest(name, known)}" for name, _ in _candidates(environ) if name not in known]


def parse(value: schema.Value, text: str) -> Any:
    """What a text from the environment, or of a flag, stands for; a list may have commas between its items."""
    if value.kind == "string":
        return None if value.is_nullable and text == "null" else text
    if value.kind == "array" and not text.lstrip().startswith("["):
        return [item.strip() for item in text.split(",")]
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        # Validation says what it must be.
        return text


def _candidates(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """What may be meant for a setting, with its text."""
    return [
        (name, text)
        for name, text in sorted(environ.items())
        if name.startswith(schema.PREFIX) and text and not _is_no_setting(name, text)
    ]


def _is_no_setting(name: str, text: str) -> bool:
    return (
        name in _OTHERS
        or name.startswith(_OF_TESTS)
        or _SERVICE_LINK.search(name) is not None
        or _SERVICE_URL.match(text) is not None
    )
