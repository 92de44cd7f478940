"""Joins the deltas of a stream into the whole answer."""

from __future__ import annotations

import dataclasses

from baton.client.results import Choice, ChoiceDelta, Completion, Delta, PromptEcho, Usage
from baton.errors import InternalError
from baton.requests import FinishReason, Logprobs
from baton.stages import StageTimings


@dataclasses.dataclass(slots=True)
class _GrowingChoice:
    text: list[str] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[Logprobs] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason = FinishReason.NONE
    matched_stop: str | int | None = None

    def add(self, delta: ChoiceDelta) -> None:
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        if delta.finish_reason is not FinishReason.NONE:
            self.finish_reason = delta.finish_reason
            self.matched_stop = delta.matched_stop

    def finished(self, index: int) -> Choice:
        return Choice(
            index=index,
            text="".join(self.text),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            matched_stop=self.matched_stop,
        )


class CompletionBuilder:
    """Takes every delta of one stream in order, then gives the completion."""

    def __init__(self) -> None:
        self._choices: dict[int, _GrowingChoice] = {}
        self._request_id = ""
        self._prompt: PromptEcho | None = None
        self._usage: Usage | None = None
        self._timings: StageTimings | None = None

    def add(self, delta: Delta) -> None:
        self._request_id = delta.request_id or self._request_id
        self._prompt = delta.prompt or self._prompt
        self._usage = delta.usage or self._usage
        self._timings = delta.timings or self._timings
        for choice in delta.choices:
            self._choices.setdefault(choice.index, _GrowingChoice()).add(choice)

    def build(self) -> Completion:
        """The whole answer.

        Raises:
            InternalError: the stream ended without its last message.
        """
        if self._usage is None or self._timings is None:
            raise InternalError("the stream ended without usage and timings")
        return Completion(
            request_id=self._request_id,
            choices=tuple(choice.finished(index) for index, choice in sorted(self._choices.items())),
            usage=self._usage,
            timings=self._timings,
            prompt=self._prompt,
        )
