"""The arguments of a tool one by one, for formats that do not write them as one JSON object."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from baton.errors import InvalidRequestError
from router.openai.tools.base import Tool

# Of a schema whose arguments can be told one by one.
_PLAIN_KEYS = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "description", "title"}
_PLAIN_KEYS |= {"$schema", "$id", "strict"}
_JSON_TYPES: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}
_JSON_TYPES |= {type(None): "null", list: "array", dict: "object"}


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """One argument.

    Attributes:
        schema: of its value, with the definitions that it may refer to.
    """

    name: str
    schema: Mapping[str, Any]
    required: bool


def described_parameters(tool: Tool) -> list[Parameter]:
    """In the order of the tool's description; InvalidRequestError where its schema says more than one by one."""
    if unplain := sorted(set(tool.parameters) - _PLAIN_KEYS):
        raise InvalidRequestError(
            "tools", f"{tool.name}: calls in this model's format cannot be forced with {unplain[0]} beside properties"
        )
    required = tool.parameters.get("required") or ()
    if not isinstance(required, list | tuple) or not all(isinstance(name, str) for name in required):
        raise InvalidRequestError("tools", f"{tool.name}: required must be a list of names")
    if unknown := [name for name in required if name not in tool.properties]:
        raise InvalidRequestError("tools", f"{tool.name}: {unknown[0]!r} is required and not described")
    definitions = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    return [
        Parameter(name, {**schema, **definitions} if isinstance(schema, Mapping) else definitions, name in required)
        for name, schema in tool.properties.items()
    ]


def value_types(schema: Any) -> set[str]:
    """The JSON types that a schema allows; empty where it does not tell."""
    if not isinstance(schema, Mapping):
        return set()
    types = schema.get("type")
    if isinstance(types, str):
        return {types}
    if isinstance(types, list):
        return {name for name in types if isinstance(name, str)}
    if isinstance(values := schema.get("enum"), list):
        return {json_type(value) for value in values}
    if "const" in schema:
        return {json_type(schema["const"])}
    options = schema.get("anyOf") or schema.get("oneOf") or ()
    if not isinstance(options, list | tuple):
        return set()
    found = [value_types(option) for option in options]
    return set.union(*found) if found and all(found) else set()


def json_type(value: Any) -> str:
    """What JSON Schema calls the type of a value that was read from JSON."""
    return _JSON_TYPES[type(value)]
