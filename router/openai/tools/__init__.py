"""Tool calls: the formats in which models write them, each with its parser and its grammar.

A format is one file and one row of the table. Names are those of vLLM's and SGLang's flags.
"""

from __future__ import annotations

import importlib
from collections.abc import Container, Mapping, Sequence
from typing import Any, Literal

from baton.errors import InvalidRequestError
from baton.v1 import inference_pb2
from router.openai.format_name import resolve_format_name
from router.openai.tools.base import ParsedDelta, Tool, ToolCallDelta, ToolParser, read_tools
from router.openai.tools.detection import detect
from router.openai.tools.grammar import GrammarBuilder

__all__ = [
    "FORMATS",
    "ParsedDelta",
    "Tool",
    "ToolCallDelta",
    "ToolParser",
    "detect",
    "make_parser",
    "parser_class",
    "resolve_format",
    "tool_grammar",
]

_PACKAGE = "router.openai.tools"
# name -> "module:Class"
FORMATS: dict[str, str] = {
    "hermes": "hermes:HermesParser",
    "llama3_json": "llama3_json:Llama3JsonParser",
    "mistral": "mistral:MistralParser",
    "pythonic": "pythonic:PythonicParser",
    "qwen3_coder": "qwen3_coder:Qwen3CoderParser",
    "deepseek_v3": "deepseek_v3:DeepSeekV3Parser",
    "deepseek_v31": "deepseek_v3:DeepSeekV31Parser",
    "harmony": "harmony:HarmonyParser",
}
# Other names that users know for the same formats.
_ALIASES = {
    "qwen": "hermes",
    "qwen25": "hermes",
    "llama3": "llama3_json",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "qwen3_xml": "qwen3_coder",
    "deepseekv3": "deepseek_v3",
    "deepseekv31": "deepseek_v31",
    "openai": "harmony",
    "gpt-oss": "harmony",
}


def resolve_format(configured: str, chat_template: str | None, vocab: Container[str]) -> str | None:
    """The format that is served; None where calls are not parsed.

    Args:
        configured: a name, "auto" (guess) or "none".
        chat_template: of the checkpoint, for requests with tools.

    Raises:
        ValueError: no format has that name.
    """
    return resolve_format_name(
        "router.tool_call_format",
        configured,
        chat_template,
        vocab,
        formats=FORMATS,
        aliases=_ALIASES,
        detect=detect,
    )


def parser_class(name: str) -> type[ToolParser]:
    """The parser of a format."""
    module, _, class_name = FORMATS[name].partition(":")
    parser: type[ToolParser] = getattr(importlib.import_module(f"{_PACKAGE}.{module}"), class_name)
    return parser


def make_parser(name: str, tools: Sequence[Any]) -> ToolParser:
    """A parser for one choice.

    Args:
        name: of a format.
        tools: the request's `tools`, in OpenAI's form.
    """
    return parser_class(name)(read_tools(tools))


def tool_grammar(
    name: str,
    tools: Sequence[Any],
    tool_choice: str | Mapping[str, Any] | None,
    parallel: bool,
    *,
    special_tokens: Mapping[str, int] | None = None,
    thinking: Literal["none", "open", "optional"] = "none",
) -> inference_pb2.Grammar | None:
    """What a model must write where the client demands a call; None where it does not.

    Whatever the grammar admits, the format's parser reads as calls of the tools, with arguments of their schemas.

    Args:
        name: of a format.
        tools: the request's `tools`, in OpenAI's form.
        tool_choice: "required" or a named function demand a call; "auto", "none" and None do not.
        parallel: more than one call may be written. A named function is called once.
        special_tokens: ids of the tokenizer's special tokens (`AddedTokens.special`).
        thinking: whether reasoning comes first: see `router.openai.reasoning.thinking_at`.

    Raises:
        InvalidRequestError: the choice is not valid, or the format cannot express a tool's schema.
    """
    if tool_choice in (None, "auto", "none"):
        return None
    known = read_tools(tools)
    if not known:
        raise InvalidRequestError("tool_choice", "demands a call, but the request has no tools")
    if tool_choice != "required":
        known = [_named(known, tool_choice)]
        parallel = False
    builder = GrammarBuilder(special_tokens or {})
    body = parser_class(name).grammar(builder, known, parallel=parallel)
    # Harmony's grammar has the reasoning within.
    return inference_pb2.Grammar(lark=builder.build(body, thinking="none" if name == "harmony" else thinking))


def _named(tools: Sequence[Tool], tool_choice: object) -> Tool:
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise InvalidRequestError(
            "tool_choice", 'must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}'
        )
    for tool in tools:
        if tool.name == name:
            return tool
    raise InvalidRequestError("tool_choice", f"names {name!r}, which is none of the request's tools")
