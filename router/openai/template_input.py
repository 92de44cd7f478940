"""OpenAI's messages as chat templates expect them.

Templates are written for transformers, where a call's arguments are an object, content is often only a string, and
nobody knows the role "developer". Clients follow OpenAI's API instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.nodes

from baton.errors import InvalidRequestError


def prepare_messages(messages: list[dict[str, Any]], *, source: str, parts: bool) -> list[dict[str, Any]]:
    """Copies of the messages that the template can read; the given ones stay as they are.

    Keys without a value are dropped, arguments of calls become objects, "developer" becomes "system" for a template
    that does not know it, and text parts become one string for a template that reads strings.

    Args:
        source: text of the template.
        parts: the template reads lists of content parts.

    Raises:
        InvalidRequestError: a message holds what is not text, or is not formed as it must be.
    """
    knows_developer = "developer" in source
    return [_prepare(message, f"messages[{i}]", knows_developer, parts) for i, message in enumerate(messages)]


def reads_content_parts(environment: jinja2.Environment, source: str) -> bool:
    """Whether the template goes through the parts of a message's content, rather than take it as a string."""
    tree = environment.parse(source)
    names = {"content"}
    # `{% set content = message['content'] %}` gives the same thing another name.
    for assignment in tree.find_all(jinja2.nodes.Assign):
        if isinstance(assignment.target, jinja2.nodes.Name) and _is_content(assignment.node, names):
            names.add(assignment.target.name)
    return any(_is_content(loop.iter, names) for loop in tree.find_all(jinja2.nodes.For))


def _is_content(node: jinja2.nodes.Node, names: set[str]) -> bool:
    """The node is a message's content, maybe filtered or tested on the way."""
    if isinstance(node, jinja2.nodes.Filter):
        return node.node is not None and _is_content(node.node, names)
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, jinja2.nodes.Getitem):
        return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
    return isinstance(node, jinja2.nodes.Name) and node.name in names


def _prepare(message: Mapping[str, Any], where: str, knows_developer: bool, parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(where, "must be an object")
    # Templates that test `is defined` would write "None".
    prepared = {key: value for key, value in message.items() if value is not None}
    if prepared.get("role") == "developer" and not knows_developer:
        prepared["role"] = "system"
    if isinstance(content := prepared.get("content"), list):
        texts = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        prepared["content"] = texts if parts else "\n".join(part["text"] for part in texts)
    if calls := prepared.get("tool_calls"):
        if not isinstance(calls, list):
            raise InvalidRequestError(f"{where}.tool_calls", "must be a list")
        prepared["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return prepared


def _part(part: Any, where: str) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
    if kind not in ("text", "refusal", None) or not isinstance(text, str):
        raise InvalidRequestError(where, f"only text is served, got a part of type {kind!r}")
    return {"type": "text", "text": text}


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(where, "must be an object with a function and its name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise InvalidRequestError(f"{where}.function.arguments", "is not valid JSON") from None
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}
