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
    """One choice and its tokens so far.

    Attributes:
        token_ids: all that were taken; a new attempt forces them.
        ended_by_router: the router ended the choice, and its worker does not know.
    """

    def __init__(
        self,
        index: int,
        sampling: SamplingParams,
        detokenizer: IncrementalDetokenizer,
        stops: StopStrings | None,
        *,
        include_stop: bool,
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason = FinishReason.NONE
        self.ended_by_router = False
        self._sampling = sampling
        self._detokenizer = detokenizer
        self._stops = stops
        self._include_stop = include_stop

    @property
    def finished(self) -> bool:
        return self.finish_reason is not FinishReason.NONE

    def take(self, token: worker_pb2.TokenOut) -> inference_pb2.ChoiceDelta | None:
        """The delta of the next token; None for a token after the end."""
        if self.finished:
            return None
        token_id = token.token_id
        self.token_ids.append(token_id)
        delta = inference_pb2.ChoiceDelta(index=self.index, token_ids=(token_id,))
        if token.HasField("logprobs"):
            delta.logprobs.append(token.logprobs)
        if not token.finish_reason and self._stops is None:
            # Nearly every token.
            delta.text = self._detokenizer.push(token_id)
            return delta
        self.finish_reason = FinishReason(token.finish_reason)
        is_stop_token = self.finish_reason is FinishReason.STOP and not self._ended_by_grammar(token_id)
        text = "" if is_stop_token and not self._shows(token_id) else self._detokenizer.push(token_id)
        if self.finished:
            text += self._detokenizer.flush()
        delta.text, stop = self._apply_stops(text)
        if stop is not None:
            self.finish_reason = FinishReason.STOP
            self.ended_by_router = True
            delta.stop_text = stop
        elif is_stop_token:
            delta.stop_token_id = token_id
        delta.finish_reason = inference_pb2.FinishReason.ValueType(int(self.finish_reason))
        return delta

    def end(self) -> inference_pb2.ChoiceDelta:
        """Ends the choice for want of room, whatever its worker makes."""
        self.finish_reason = FinishReason.LENGTH
        self.ended_by_router = True
        return inference_pb2.ChoiceDelta(index=self.index, finish_reason=inference_pb2.FINISH_REASON_LENGTH)

    def _ended_by_grammar(self, token_id: int) -> bool:
        """Whether the choice ended because nothing could follow: its last token is text like any other."""
        return self._sampling.grammar is not None and token_id not in self._sampling.ending_token_ids

    def _shows(self, token_id: int) -> bool:
        """Whether the text of the EOS or stop token that ended the choice is sent: EOS has none worth sending."""
        return self._include_stop and token_id in self._sampling.stop_token_ids

    def _apply_stops(self, text: str) -> tuple[str, str | None]:
        """(text that may be sent, the stop string that ends the choice)."""
        if self._stops is None:
            return text, None
        if len(self.token_ids) < self._sampling.min_tokens:
            return self._stops.flush() + text, None
        safe, stop = self._stops.feed(text)
        if stop is not None and self._include_stop:
            safe += stop
        elif stop is None and self.finished:
            safe += self._stops.flush()
        return safe, stop


class Emission:
    """All choices of a request.

    Args:
        decode: token ids to text, special tokens left out or not.
        prompt: its last tokens give the first generated one its context.
        include_stop: send the text of what ended a choice too, but for EOS.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        stops: Sequence[str],
        decode: Decode,
        prompt: Sequence[int],
        *,
        include_stop: bool = False,
    ) -> None:
        self.choices = [
            ChoiceEmission(
                index,
                sampling,
                IncrementalDetokenizer(decode, prompt),
                StopStrings(stops) if stops else None,
                include_stop=include_stop,
            )
            for index in range(sampling.n)
        ]

    def take(self, tokens: Sequence[worker_pb2.TokenOut]) -> list[inference_pb2.ChoiceDelta]:
        """The deltas of these tokens, one for each that is not beyond the end of its choice, in their order.

        Text that may begin a stop string, or a character, comes with a later token of the choice.
        """
        return [delta for token in tokens if (delta := self.choices[token.choice].take(token)) is not None]

    def end(self) -> list[inference_pb2.ChoiceDelta]:
        """Ends all choices where they stand, by length."""
        return [choice.end() for choice in self.choices]

    @property
    def finished(self) -> bool:
        return all(choice.finished for choice in self.choices)

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices)

    def delivered(self) -> tuple[Delivered, ...]:
        """What a new attempt must force."""
        return tuple(Delivered(tuple(choice.token_ids), choice.finished) for choice in self.choices)
