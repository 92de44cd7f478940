"""`POST /v1/chat/completions`: what may be asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import pydantic

from baton.v1 import inference_pb2
from router.openai.errors import refused, shown
from router.openai.fields import ApiModel, GenerationFields, UInt32
from router.openai.output_format import MANY, JsonObject

_TEXT_PARTS = ("text", "input_text", "refusal")


class ConversationFields(ApiModel):
    """What a chat template makes a prompt of."""

    messages: Annotated[list[JsonObject], MANY]
    tools: Annotated[list[JsonObject], MANY] = pydantic.Field([])
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: Annotated[list[JsonObject], MANY] | None = None
    chat_template_kwargs: JsonObject = pydantic.Field({})
    reasoning_effort: str | None = None

    @pydantic.field_validator("messages")
    @classmethod
    def _check_messages(cls, messages: list[JsonObject]) -> list[JsonObject]:
        if not messages:
            raise refused("messages", "is empty")
        for index, message in enumerate(messages):
            _check_message(f"messages[{index}]", message)
        return messages

    @pydantic.field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[JsonObject]) -> list[JsonObject]:
        for index, tool in enumerate(tools):
            _check_tool(f"tools[{index}]", tool)
        return tools

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Variables for the template beside those that every template knows."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **self.chat_template_kwargs}


class ChatRequest(ConversationFields, GenerationFields):
    """One conversation, answered n times."""

    not_served: ClassVar[Mapping[str, str]] = {
        **GenerationFields.not_served,
        "echo": "is not served in chats; use continue_final_message",
    }

    max_completion_tokens: UInt32 | None = None
    logprobs: bool = False
    top_logprobs: UInt32 | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True

    @pydantic.field_validator("tool_choice", mode="before")
    @classmethod
    def _check_tool_choice(cls, choice: Any) -> Any:
        if choice in ("none", "auto", "required") or (isinstance(choice, dict) and _function_name(choice)):
            return choice
        problem = "must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}"
        raise refused("tool_choice", f"{problem}, got {shown(choice)}")

    @pydantic.model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", "can only go with logprobs set to true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise refused("tool_choice", "can only go with tools")
        if (name := self.named_tool) is not None and name not in [tool["function"]["name"] for tool in self.tools]:
            raise refused("tool_choice", f"names {name[:100]!r}, which is none of the tools")
        return self

    @property
    def named_tool(self) -> str | None:
        """The function that `tool_choice` names."""
        return _function_name(self.tool_choice) if isinstance(self.tool_choice, dict) else None

    @property
    def offered_tools(self) -> list[JsonObject]:
        """The tools that the model is told of and may call; none where `tool_choice` is "none"."""
        return [] if self.tool_choice == "none" else self.tools

    def sampling(self) -> inference_pb2.SamplingParams:
        sampling = super().sampling()
        if self.max_completion_tokens is not None:
            sampling.max_tokens = self.max_completion_tokens
        if self.logprobs:
            sampling.logprobs = self.top_logprobs or 0
        sampling.echo = self.return_token_ids or self.continuous_usage
        return sampling

    def field_names(self) -> dict[str, str]:
        names = super().field_names() | {"prompt": "messages", "token_ids": "messages", "logprobs": "top_logprobs"}
        return names if self.max_completion_tokens is None else names | {"max_tokens": "max_completion_tokens"}


def _check_message(field: str, message: Mapping[str, Any]) -> None:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise refused(f"{field}.role", "must be a string", "invalid_type")
    content = message.get("content")
    if isinstance(content, list):
        for index, part in enumerate(content):
            _check_part(f"{field}.content[{index}]", part)
    elif not isinstance(content, str | None):
        raise refused(f"{field}.content", "must be a string or a list of parts", "invalid_type")
    if content is None and role != "assistant":
        raise refused(f"{field}.content", "is required", "missing_required_parameter")
    if message.get("function_call"):
        raise refused(f"{field}.function_call", "is not served; use tool_calls", "unsupported_parameter")
    for name in ("name", "tool_call_id"):
        if not isinstance(message.get(name), str | None):
            raise refused(f"{field}.{name}", "must be a string", "invalid_type")


def _check_part(field: str, part: Any) -> None:
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in _TEXT_PARTS:
        raise refused(field, f"only text is served, got a part of type {kind[:50]!r}", "unsupported_content")
    if not isinstance(part, dict) or not isinstance(part.get("refusal" if kind == "refusal" else "text"), str):
        raise refused(field, "must be an object with a type and a text", "invalid_type")


def _check_tool(field: str, tool: Mapping[str, Any]) -> None:
    if tool.get("type", "function") != "function":
        raise refused(f"{field}.type", f"must be 'function', got {shown(tool['type'])}")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise refused(f"{field}.function", "must be an object", "invalid_type")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise refused(f"{field}.function.name", "must be a string", "invalid_type")
    if not isinstance(function.get("parameters"), dict | None):
        raise refused(f"{field}.function.parameters", "must be a JSON schema", "invalid_type")


def _function_name(choice: Mapping[str, Any]) -> str | None:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) and choice.get("type", "function") == "function" else None
    return name if isinstance(name, str) and name else None
