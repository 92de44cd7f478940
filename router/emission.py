"""From a request's tokens to what its client is sent: text, stop strings, finish reasons.

One `Emission` for each request; it outlives attempts, so what was delivered stays delivered. Belongs to the
request's own task.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.internal.v1 import worker_pb2
from baton.requests import Delivered, FinishReason, SamplingParams
from baton.v1 import inference_pb2
from router.detokenization import Decode, IncrementalDetokenizer, StopStrings


class ChoiceEmission:
    """One choice: its tokens so far, and the delta that is being made.

    Attributes:
        token_ids: all that were taken; a new attempt forces them.
        ended_by_string: the router ended the choice, and its worker does not know.
    """

    def __init__(
        self, index: int, detokenizer: IncrementalDetokenizer, stops: StopStrings | None, min_tokens: int
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason = FinishReason.NONE
        self.ended_by_string = False
        self._detokenizer = detokenizer
        self._stops = stops
        self._min_tokens = min_tokens
        self._delta: inference_pb2.ChoiceDelta | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not FinishReason.NONE

    def take(self, token: worker_pb2.TokenOut) -> None:
        """Adds the next token to the delta; tokens after the end are dropped."""
        if self.finished:
            return
        token_id = token.token_id
        self.token_ids.append(token_id)
        if self._delta is None:
            self._delta = inference_pb2.ChoiceDelta(index=self.index)
        self._delta.token_ids.append(token_id)
        if token.HasField("logprobs"):
            self._delta.logprobs.append(token.logprobs)
        self.finish_reason = FinishReason(token.finish_reason)
        # The token that ends a choice by being EOS or a stop token is no part of its text.
        text = "" if self.finish_reason is FinishReason.STOP else self._detokenizer.push(token_id)
        if self.finished:
            text += self._detokenizer.flush()
        text, stop = self._apply_stops(text)
        self._delta.text += text
        self._finish(self._delta, token_id, stop)

    def take_delta(self) -> inference_pb2.ChoiceDelta | None:
        """What is new since the last call, if anything."""
        delta, self._delta = self._delta, None
        return delta

    def _apply_stops(self, text: str) -> tuple[str, str | None]:
        """(text that may be sent, the stop string that ends the choice)."""
        if self._stops is None:
            return text, None
        if len(self.token_ids) < self._min_tokens:
            return self._stops.flush() + text, None
        safe, stop = self._stops.feed(text)
        if stop is None and self.finished:
            safe += self._stops.flush()
        return safe, stop

    def _finish(self, delta: inference_pb2.ChoiceDelta, token_id: int, stop: str | None) -> None:
        if stop is not None:
            self.finish_reason = FinishReason.STOP
            self.ended_by_string = True
            delta.stop_text = stop
        elif self.finish_reason is FinishReason.STOP:
            delta.stop_token_id = token_id
        if self.finished:
            delta.finish_reason = inference_pb2.FinishReason.ValueType(int(self.finish_reason))


class Emission:
    """All choices of a request.

    Args:
        decode: token ids to text, special tokens left out.
        prompt: its last tokens give the first generated one its context.
    """

    def __init__(self, sampling: SamplingParams, stops: Sequence[str], decode: Decode, prompt: Sequence[int]) -> None:
        self.choices = [
            ChoiceEmission(
                index,
                IncrementalDetokenizer(decode, prompt),
                StopStrings(stops) if stops else None,
                sampling.min_tokens,
            )
            for index in range(sampling.n)
        ]

    def take(self, tokens: Sequence[worker_pb2.TokenOut]) -> list[inference_pb2.ChoiceDelta]:
        """The deltas that these tokens, in order, make: at most one for each choice."""
        touched = dict.fromkeys(token.choice for token in tokens)
        for token in tokens:
            self.choices[token.choice].take(token)
        return [delta for index in touched if (delta := self.choices[index].take_delta()) is not None]

    @property
    def finished(self) -> bool:
        return all(choice.finished for choice in self.choices)

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices)

    def delivered(self) -> tuple[Delivered, ...]:
        """What a new attempt must force."""
        return tuple(Delivered(tuple(choice.token_ids), choice.finished) for choice in self.choices)
