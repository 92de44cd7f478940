"""How the served model converses: its chat template, its reasoning and its form of tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

from baton.config import RouterConfig
from baton.errors import InvalidRequestError
from baton.v1 import inference_pb2
from router.model_card import ModelCard
from router.openai import tools
from router.openai.chat_request import ChatRequest, ConversationFields
from router.openai.chat_template import ChatTemplate
from router.openai.errors import refused
from router.openai.reasoning import END_OF_REASONING, ReasoningParser, Thinking, resolve_reasoning, thinking_at
from router.openai.tools.added_tokens import AddedTokens
from router.openai.tools.grammar import GrammarBuilder

# For models whose own form is not known: a grammar makes them write this one where a call is demanded.
_FALLBACK = "hermes"
_HARMONY = "harmony"
# A slash would end a regular expression in Lark, unless a backslash stands before it already.
_SLASH = re.compile(r"(?P<escaped>\\.)|/", re.DOTALL)


class TextParser(Protocol):
    """Reads one choice's text: what is answer, what reasoning and what a call."""

    def feed(self, text: str) -> tools.ParsedDelta: ...

    def finish(self) -> tools.ParsedDelta: ...


class ChatFormat:
    """What the checkpoint's files say of it; shared by all requests.

    Args:
        tool_format, reasoning_format: names, or None where the model has none that is known.
    """

    def __init__(
        self,
        template: ChatTemplate,
        added_tokens: AddedTokens,
        *,
        tool_format: str | None,
        reasoning_format: str | None,
    ) -> None:
        self._template = template
        self._added_tokens = added_tokens
        self._tool_format = tool_format
        self._reasoning_format = reasoning_format

    @classmethod
    def load(cls, checkpoint_dir: str, card: ModelCard, config: RouterConfig) -> ChatFormat:
        """Reads the checkpoint's files; ValueError where a template or a configured format is not valid."""
        template = ChatTemplate.load(checkpoint_dir, card)
        added_tokens = AddedTokens.load(checkpoint_dir)
        source = template.source(tools=True)
        return cls(
            template,
            added_tokens,
            tool_format=tools.resolve_format(config.tool_call_format, source, added_tokens),
            reasoning_format=resolve_reasoning(config.reasoning_format, template.source(), added_tokens),
        )

    @property
    def has_template(self) -> bool:
        """Whether the model can converse at all."""
        return self._template.source() is not None

    def render(self, fields: ConversationFields, offered_tools: list[dict[str, Any]]) -> str:
        """The prompt; InvalidRequestError where the template refuses. Takes milliseconds for a long conversation."""
        return self._template.render(
            fields.messages,
            offered_tools or None,
            add_generation_prompt=fields.add_generation_prompt,
            continue_final_message=fields.continue_final_message,
            documents=fields.documents,
            template_kwargs=fields.template_kwargs,
        )

    def turn(self, request: ChatRequest, prompt: str) -> Turn:
        """What the model is about to write, after this prompt."""
        demands_call = request.tool_choice == "required" or request.named_tool is not None
        tool_format = self._tool_format or (_FALLBACK if demands_call else None)
        return Turn(
            request,
            self._added_tokens.special,
            tool_format=tool_format if request.offered_tools or tool_format == _HARMONY else None,
            thinking=thinking_at(self._reasoning_format, prompt),
        )


class Turn:
    """One answer that the model is asked for."""

    def __init__(
        self, request: ChatRequest, special_tokens: Mapping[str, int], *, tool_format: str | None, thinking: Thinking
    ) -> None:
        self._request = request
        self._special_tokens = special_tokens
        self._tool_format = tool_format
        # A message that goes on is past its reasoning.
        self._thinking: Thinking = "none" if request.continue_final_message and thinking == "optional" else thinking

    def parser(self) -> TextParser | None:
        """A new parser for one choice; None where all of the text is the answer."""
        calls = None if self._tool_format is None else tools.make_parser(self._tool_format, self._request.offered_tools)
        return calls if self._thinking == "none" else ReasoningParser(self._thinking, calls)

    def shape(self, sampling: inference_pb2.SamplingParams) -> None:
        """Sets what the format needs of sampling: the grammar of calls, and text that has special tokens.

        Raises:
            InvalidRequestError, ApiError: the request's constraints cannot go together, or not with this model.
        """
        demanded = self._demanded_calls()
        if demanded is not None:
            if sampling.HasField("grammar"):
                raise refused("tool_choice", "demands a call, which cannot go with another constraint of the answer")
            sampling.grammar.CopyFrom(demanded)
        elif sampling.HasField("grammar"):
            self._let_reason_first(sampling.grammar)
        calls_are_special = self._tool_format and tools.parser_class(self._tool_format).needs_special_tokens
        reasoning_is_special = self._thinking != "none" and END_OF_REASONING in self._special_tokens
        if calls_are_special or reasoning_is_special:
            sampling.skip_special_tokens = False

    def _demanded_calls(self) -> inference_pb2.Grammar | None:
        if self._tool_format is None:
            return None
        return tools.tool_grammar(
            self._tool_format,
            self._request.offered_tools,
            self._request.tool_choice,
            self._request.parallel_tool_calls,
            special_tokens=self._special_tokens,
            thinking=self._thinking,
        )

    def _let_reason_first(self, grammar: inference_pb2.Grammar) -> None:
        """Puts the reasoning that the prompt has opened before what the answer must match."""
        if self._tool_format == _HARMONY:
            raise InvalidRequestError("response_format", "constraints of the answer are not served for this model")
        if self._thinking != "open":
            return
        builder = GrammarBuilder(self._special_tokens)
        grammar.CopyFrom(inference_pb2.Grammar(lark=builder.build(_body(builder, grammar), thinking="open")))


def _body(builder: GrammarBuilder, grammar: inference_pb2.Grammar) -> str:
    """The grammar as the body of a Lark rule."""
    match grammar.WhichOneof("kind"):
        case "json_object":
            return builder.json({"type": "object"})
        case "json_schema":
            try:
                schema = json.loads(grammar.json_schema)
            except (ValueError, RecursionError) as error:
                raise InvalidRequestError("sampling.grammar.json_schema", f"is not JSON: {error}") from error
            if not isinstance(schema, dict):
                raise InvalidRequestError("sampling.grammar.json_schema", "must be a JSON object")
            return builder.json(schema)
        case "regex":
            return builder.rule("/" + _SLASH.sub(lambda found: found["escaped"] or r"\/", grammar.regex) + "/")
        case "choice":
            return builder.rule(" | ".join(json.dumps(text) for text in grammar.choice.texts))
    problem = 'cannot go with reasoning; turn that off, often by chat_template_kwargs {"enable_thinking": false}'
    raise InvalidRequestError("sampling.grammar.lark", problem)
