"""The answer to a chat request, whole (`chat.completion`) or as events (`chat.completion.chunk`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from baton.v1 import inference_pb2
from router.openai.chat_format import TextParser, Turn
from router.openai.chat_request import ChatRequest
from router.openai.envelope import Envelope, Json, UsageTotal, finish_reason, json_string, stop_reason, usage_json
from router.openai.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from router.openai.tools import ParsedDelta, ToolCallDelta


class ChatAnswer:
    """Turns what the pipeline gives into what the client gets."""

    def __init__(self, request: ChatRequest, turn: Turn, *, envelope: Envelope, names: TokenNames) -> None:
        self._request = request
        self._envelope = envelope
        self._names = names
        self._usage = UsageTotal()
        self._prompt: inference_pb2.PromptEcho | None = None
        self._prompt_ids: list[int] = []
        self._choices = [_Choice(index, request, turn.parser(), names, envelope) for index in range(request.n)]

    def keep(self, _: int, response: inference_pb2.GenerateResponse) -> None:
        """Takes a response of the only prompt for `whole`."""
        self._note(response)
        for delta in response.choices:
            self._choices[delta.index].keep(delta)

    async def whole(self) -> bytes:
        """One JSON object, when all is generated."""
        extra: Json = {}
        if self._prompt is not None and self._request.prompt_logprobs is not None:
            most = self._request.prompt_logprobs
            extra["prompt_logprobs"] = prompt_logprobs(self._names, self._prompt.logprobs, most)
        if self._prompt is not None and self._request.return_token_ids:
            extra["prompt_token_ids"] = self._prompt_ids
        return self._envelope.answer([choice.whole() for choice in self._choices], self._usage.json(), **extra)

    def events(self, _: int, response: inference_pb2.GenerateResponse) -> bytes:
        """One event for each token of a response of the only prompt."""
        self._note(response)
        return b"".join(self._choices[delta.index].event(delta, self._prompt_ids) for delta in response.choices)

    def token_event(self, _: int, choice: int, text: str, token_id: int) -> bytes:
        """The event of a token with nothing more to tell."""
        return self._choices[choice].token_event(text, token_id, self._prompt_ids)

    def last_event(self) -> bytes:
        """What follows when all is generated: the usage, if asked for."""
        return self._envelope.event([], self._usage.json()) if self._request.include_usage else b""

    def _note(self, response: inference_pb2.GenerateResponse) -> None:
        if response.HasField("prompt"):
            self._prompt = response.prompt
            self._prompt_ids = list(response.prompt.token_ids)
        if response.HasField("usage"):
            self._usage.add(response.usage)


class _Choice:
    """One choice; either `keep` or `event` is called for each delta."""

    def __init__(
        self, index: int, request: ChatRequest, parser: TextParser | None, names: TokenNames, envelope: Envelope
    ) -> None:
        self._index = index
        self._request = request
        self._parser = parser
        self._names = names
        self._envelope = envelope
        self._began = False
        self._calls = False
        self._deltas: list[inference_pb2.ChoiceDelta] = []
        self._num_tokens = 0
        self._is_plain = parser is None and not (
            request.logprobs or request.return_token_ids or request.continuous_usage
        )
        self._before, self._after = envelope.event_frame(
            f'{{"index": {index}, "delta": {{"content": ', '}, "logprobs": null, "finish_reason": null}'
        )

    def keep(self, delta: inference_pb2.ChoiceDelta) -> None:
        """Takes a delta for `whole`."""
        self._deltas.append(delta)

    def whole(self) -> Json:
        """The choice, all of it. Needs a delta that ended it."""
        last = self._deltas[-1]
        parsed = self._parse("".join(delta.text for delta in self._deltas), is_last=True)
        message: Json = {"role": "assistant", "content": parsed.content, "refusal": None}
        if parsed.reasoning and self._request.include_reasoning:
            message["reasoning_content"] = parsed.reasoning
        if parsed.tool_calls:
            message["content"] = parsed.content or None
            message["tool_calls"] = _whole_calls(parsed.tool_calls)
        choice: Json = {
            "index": self._index,
            "message": message,
            "logprobs": self._logprobs(self._deltas),
            "finish_reason": self._finish_reason(last),
            "stop_reason": stop_reason(last, self._request.stop_token_ids),
        }
        if self._request.return_token_ids:
            choice["token_ids"] = [token_id for delta in self._deltas for token_id in delta.token_ids]
        return choice

    def token_event(self, text: str, token_id: int, prompt_ids: list[int]) -> bytes:
        """A delta that has one token and nothing more, as an event."""
        if self._is_plain and self._began:
            return self._before + json_string(text) + self._after
        return self.event(inference_pb2.ChoiceDelta(index=self._index, text=text, token_ids=(token_id,)), prompt_ids)

    def event(self, delta: inference_pb2.ChoiceDelta, prompt_ids: list[int]) -> bytes:
        """A delta as an event; the first one has the role, the last one why the choice ended."""
        is_last = bool(delta.finish_reason)
        is_first, self._began = not self._began, True
        self._num_tokens += len(delta.token_ids)
        parsed = self._parse(delta.text, is_last=is_last)
        choice: Json = {
            "index": self._index,
            "delta": ({"role": "assistant"} if is_first else {}) | self._delta(parsed),
            "logprobs": self._logprobs([delta]),
            "finish_reason": self._finish_reason(delta),
        }
        if is_last:
            choice["stop_reason"] = stop_reason(delta, self._request.stop_token_ids)
        extra: Json = {}
        if self._request.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
            if is_first:
                extra["prompt_token_ids"] = prompt_ids
        usage = usage_json(len(prompt_ids), self._num_tokens) if self._request.continuous_usage else None
        return self._envelope.event([choice], usage, **extra)

    def _parse(self, text: str, *, is_last: bool) -> ParsedDelta:
        if self._parser is None:
            return ParsedDelta(text)
        parsed = self._parser.feed(text)
        if is_last:
            rest = self._parser.finish()
            parsed = ParsedDelta(
                parsed.content + rest.content,
                parsed.reasoning + rest.reasoning,
                (*parsed.tool_calls, *rest.tool_calls),
            )
        if not self._request.parallel_tool_calls:
            parsed = dataclasses.replace(parsed, tool_calls=tuple(c for c in parsed.tool_calls if c.index == 0))
        self._calls = self._calls or bool(parsed.tool_calls)
        return parsed

    def _delta(self, parsed: ParsedDelta) -> Json:
        delta: Json = {}
        if parsed.content or self._parser is None:
            delta["content"] = parsed.content
        if parsed.reasoning and self._request.include_reasoning:
            delta["reasoning_content"] = parsed.reasoning
        if parsed.tool_calls:
            delta["tool_calls"] = [_call_delta(call) for call in parsed.tool_calls]
        return delta

    def _logprobs(self, deltas: Iterable[inference_pb2.ChoiceDelta]) -> Json | None:
        if not self._request.logprobs:
            return None
        positions = [position for delta in deltas for position in delta.logprobs]
        return {"content": chat_logprobs(self._names, positions), "refusal": None}

    def _finish_reason(self, delta: inference_pb2.ChoiceDelta) -> str | None:
        reason = finish_reason(delta)
        return "tool_calls" if reason == "stop" and self._calls else reason


def _call_delta(call: ToolCallDelta) -> Json:
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.id is None:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, **function}}


def _whole_calls(deltas: Iterable[ToolCallDelta]) -> list[Json]:
    calls: list[Json] = []
    for delta in deltas:
        if delta.id is not None:
            calls.append({"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}})
        calls[delta.index]["function"]["arguments"] += delta.arguments
    return calls
