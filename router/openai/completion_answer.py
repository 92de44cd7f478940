"""The answer to a completion request, whole or as events: `text_completion`."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Sequence
from typing import Any

from baton.v1 import inference_pb2
from router.openai.completion_request import CompletionRequest
from router.openai.envelope import Envelope, Json, UsageTotal, finish_reason, json_string, stop_reason, usage_json
from router.openai.logprobs import CompletionLogprobs, TokenNames, prompt_logprobs

# What is written in less time than a thread hop is worth.
_MAX_INLINE_LOGPROBS = 1024


class CompletionAnswer:
    """Turns what the pipeline gives into what the client gets.

    Args:
        num_prompts: of the request; choice i of prompt p has the index p * n + i.
    """

    def __init__(self, request: CompletionRequest, num_prompts: int, *, envelope: Envelope, names: TokenNames) -> None:
        self._request = request
        self._envelope = envelope
        self._names = names
        self._usage = UsageTotal()
        self._choices = [_Choice(index, request, names, envelope) for index in range(num_prompts * request.n)]
        self._formatted: dict[int, bytes] = {}

    def keep(self, prompt_index: int, response: inference_pb2.GenerateResponse) -> None:
        """Takes a response for `whole`; each choice is written when it ends."""
        for choice, delta in self._take(prompt_index, response):
            choice.keep(delta)
            if delta.finish_reason and not choice.is_large:
                self._formatted[choice.index] = choice.whole()

    async def whole(self) -> bytes:
        """One JSON object, when all is generated."""
        for choice in self._choices:
            # A long prompt's logprobs are megabytes: nobody else's stream shall wait for all of them.
            if choice.is_large:
                self._formatted[choice.index] = await asyncio.to_thread(choice.whole)
        return self._envelope.answer_of([self._formatted[choice.index] for choice in self._choices], self._usage.json())

    def events(self, prompt_index: int, response: inference_pb2.GenerateResponse) -> bytes:
        """One event for each token of a response."""
        return b"".join(choice.event(delta) for choice, delta in self._take(prompt_index, response))

    def token_event(self, prompt_index: int, choice: int, text: str, token_id: int) -> bytes:
        """The event of a token with nothing more to tell."""
        return self._choices[prompt_index * self._request.n + choice].token_event(text, token_id)

    def last_event(self) -> bytes:
        """What follows when all is generated: the usage, if asked for."""
        return self._envelope.event([], self._usage.json()) if self._request.include_usage else b""

    def _take(
        self, prompt_index: int, response: inference_pb2.GenerateResponse
    ) -> list[tuple[_Choice, inference_pb2.ChoiceDelta]]:
        first = prompt_index * self._request.n
        if response.HasField("prompt"):
            prompt = _Prompt(response.prompt, self._request, self._names)
            for choice in self._choices[first : first + self._request.n]:
                choice.set_prompt(prompt)
        if response.HasField("usage"):
            self._usage.add(response.usage)
        return [(self._choices[first + delta.index], delta) for delta in response.choices]


class _Prompt:
    """A prompt that was sent back, for all of its choices.

    Args:
        echo: as it came.
    """

    def __init__(self, echo: inference_pb2.PromptEcho, request: CompletionRequest, names: TokenNames) -> None:
        self.echo = echo
        self._request = request
        self._names = names
        self._logprobs: tuple[CompletionLogprobs, dict[str, list[Any]]] | None = None

    def logprobs(self, num_top: int) -> tuple[CompletionLogprobs, dict[str, list[Any]]]:
        """What writes the logprobs that follow, and those of the prompt, which are written once."""
        if self._logprobs is None:
            writer = CompletionLogprobs(
                self._names, num_top=num_top, skips_special=self._request.skip_special_tokens, text=self.echo.text
            )
            # Nothing precedes the first token.
            self._logprobs = writer, writer.take(self.echo.token_ids, [None, *self.echo.logprobs])
        writer, written = self._logprobs
        return copy.copy(writer), written


class _Choice:
    """One choice; either `keep` or `event` is called for each delta.

    Attributes:
        index: in the answer.
    """

    def __init__(self, index: int, request: CompletionRequest, names: TokenNames, envelope: Envelope) -> None:
        self.index = index
        self._request = request
        self._names = names
        self._envelope = envelope
        self._prompt: _Prompt | None = None
        self._began = False
        self._deltas: list[inference_pb2.ChoiceDelta] = []
        self._num_tokens = 0
        self._logprobs: CompletionLogprobs | None = None
        self._is_plain = request.logprobs is None and not (request.return_token_ids or request.continuous_usage)
        self._before, self._after = envelope.event_frame(
            f'{{"index": {index}, "text": ', ', "logprobs": null, "finish_reason": null}'
        )

    @property
    def is_large(self) -> bool:
        """Whether writing it takes long."""
        return self._prompt is not None and len(self._prompt.echo.logprobs) > _MAX_INLINE_LOGPROBS

    def set_prompt(self, prompt: _Prompt) -> None:
        """Comes before the first delta, where the request needs it."""
        self._prompt = prompt

    def keep(self, delta: inference_pb2.ChoiceDelta) -> None:
        """Takes a delta for `whole`."""
        self._deltas.append(delta)

    def whole(self) -> bytes:
        """The choice, all of it, as JSON. Needs a delta that ended it."""
        token_ids = [token_id for delta in self._deltas for token_id in delta.token_ids]
        positions = [position for delta in self._deltas for position in delta.logprobs]
        choice = self._json("".join(delta.text for delta in self._deltas), token_ids, positions, self._deltas[-1])
        if self._request.prompt_logprobs is not None and self._prompt is not None:
            most = self._request.prompt_logprobs
            choice["prompt_logprobs"] = prompt_logprobs(self._names, self._prompt.echo.logprobs, most)
        return json.dumps(choice).encode()

    def token_event(self, text: str, token_id: int) -> bytes:
        """A delta that has one token and nothing more, as an event."""
        if self._is_plain and self._began:
            return self._before + json_string(text) + self._after
        return self.event(inference_pb2.ChoiceDelta(index=self.index, text=text, token_ids=(token_id,)))

    def event(self, delta: inference_pb2.ChoiceDelta) -> bytes:
        """A delta as an event."""
        self._num_tokens += len(delta.token_ids)
        choice = self._json(delta.text, delta.token_ids, delta.logprobs, delta)
        usage = None
        if self._request.continuous_usage:
            usage = usage_json(len(self._prompt.echo.token_ids) if self._prompt else 0, self._num_tokens)
        return self._envelope.event([choice], usage)

    def _json(
        self,
        text: str,
        token_ids: Sequence[int],
        positions: Sequence[inference_pb2.PositionLogprobs],
        last: inference_pb2.ChoiceDelta,
    ) -> Json:
        """These tokens as a choice, behind the prompt if they are the first and it is echoed."""
        is_first, self._began = not self._began, True
        echoed = self._prompt if is_first and self._request.echo else None
        choice: Json = {
            "index": self.index,
            "text": text if echoed is None else echoed.echo.text + text,
            "logprobs": self._logprobs_json(token_ids, positions, echoed),
            "finish_reason": finish_reason(last),
        }
        if last.finish_reason:
            choice["stop_reason"] = stop_reason(last, self._request.stop_token_ids)
        if self._request.return_token_ids:
            choice["token_ids"] = list(token_ids) if echoed is None else [*echoed.echo.token_ids, *token_ids]
            if is_first:
                choice["prompt_token_ids"] = list(self._prompt.echo.token_ids) if self._prompt is not None else []
        return choice

    def _logprobs_json(
        self,
        token_ids: Sequence[int],
        positions: Sequence[inference_pb2.PositionLogprobs],
        echoed: _Prompt | None,
    ) -> dict[str, list[Any]] | None:
        if self._request.logprobs is None:
            return None
        if echoed is not None:
            self._logprobs, of_prompt = echoed.logprobs(self._request.logprobs)
            own = self._logprobs.take(token_ids, positions)
            return {name: of_prompt[name] + own[name] for name in of_prompt}
        if self._logprobs is None:
            self._logprobs = CompletionLogprobs(
                self._names, num_top=self._request.logprobs, skips_special=self._request.skip_special_tokens
            )
        return self._logprobs.take(token_ids, positions)
