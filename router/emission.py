"""From a request's tokens to what its client is sent: text, stop strings, finish reasons.

One `Emission` for each request; it outlives attempts, so what was delivered stays delivered. Belongs to the
request's own task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton.internal.v1 import worker_pb2
from baton.requests import Delivered, FinishReason, SamplingParams
from baton.v1 import inference_pb2
from router.detokenization import Detokenizer, StopStrings

MakeDelta = Callable[..., inference_pb2.ChoiceDelta]


class ChoiceEmission:
    """One choice and its tokens so far.

    Attributes:
        token_ids: all that were taken; a new attempt forces them.
        finished: whether `finish_reason` says why it ended; told apart, since it is asked for every token.
        ended_by_router: the router ended the choice, and its worker does not know.
    """

    __slots__ = (
        "_detokenizer",
        "_include_stop",
        "_is_plain",
        "_sampling",
        "_stops",
        "ended_by_router",
        "finish_reason",
        "finished",
        "index",
        "token_ids",
    )

    def __init__(
        self,
        index: int,
        sampling: SamplingParams,
        detokenizer: Detokenizer,
        stops: StopStrings | None,
        *,
        include_stop: bool,
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason = FinishReason.NONE
        self.finished = False
        self.ended_by_router = False
        self._sampling = sampling
        self._detokenizer = detokenizer
        self._stops = stops
        self._include_stop = include_stop
        # Until it ends, there is nothing to tell of its tokens but their text.
        self._is_plain = stops is None and sampling.logprobs is None

    def take_plain(self, token: worker_pb2.TokenOut) -> str | None:
        """The text of the next token where that is all to tell of it; None, and nothing is taken, where it is not."""
        if not self._is_plain or self.finished or token.finish_reason:
            return None
        token_id = token.token_id
        self.token_ids.append(token_id)
        return self._detokenizer.push(token_id)

    def take(self, token: worker_pb2.TokenOut, make: MakeDelta) -> inference_pb2.ChoiceDelta:
        """The delta of the next token of a choice that has not finished."""
        token_id = token.token_id
        self.token_ids.append(token_id)
        delta = make(index=self.index, token_ids=(token_id,))
        if token.HasField("logprobs"):
            delta.logprobs.append(token.logprobs)
        self._finish(FinishReason(token.finish_reason))
        is_stop_token = self.finish_reason is FinishReason.STOP and not self._ended_by_grammar(token_id)
        text = "" if is_stop_token and not self._shows(token_id) else self._detokenizer.push(token_id)
        if self.finished:
            text += self._detokenizer.flush()
        delta.text, stop = self._apply_stops(text)
        if stop is not None:
            self._finish(FinishReason.STOP)
            self.ended_by_router = True
            delta.stop_text = stop
        elif is_stop_token:
            delta.stop_token_id = token_id
        delta.finish_reason = inference_pb2.FinishReason.ValueType(int(self.finish_reason))
        return delta

    def end(self) -> inference_pb2.ChoiceDelta:
        """Ends the choice for want of room, whatever its worker makes."""
        self._finish(FinishReason.LENGTH)
        self.ended_by_router = True
        return inference_pb2.ChoiceDelta(index=self.index, finish_reason=inference_pb2.FINISH_REASON_LENGTH)

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self.finished = reason is not FinishReason.NONE

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
        detokenizer: makes one for each choice.
        include_stop: send the text of what ended a choice too, but for EOS.

    Attributes:
        choices: a token of which there may be nothing to tell but its text, as of nearly every one, is offered to the
            choice's `take_plain` first.
        finished: whether every choice is.
    """

    __slots__ = ("choices", "finished")

    def __init__(
        self,
        sampling: SamplingParams,
        stops: Sequence[str],
        detokenizer: Callable[[], Detokenizer],
        *,
        include_stop: bool = False,
    ) -> None:
        self.choices = [
            ChoiceEmission(
                index,
                sampling,
                detokenizer(),
                StopStrings(stops) if stops else None,
                include_stop=include_stop,
            )
            for index in range(sampling.n)
        ]
        self.finished = False

    @property
    def num_tokens(self) -> int:
        """Taken so far, of all choices."""
        return sum(len(choice.token_ids) for choice in self.choices)

    def take(
        self, tokens: Sequence[worker_pb2.TokenOut], make: MakeDelta = inference_pb2.ChoiceDelta
    ) -> list[inference_pb2.ChoiceDelta]:
        """The deltas of these tokens, one for each that is not beyond the end of its choice, in their order.

        Text that may begin a stop string, or a character, comes with a later token of the choice.

        Args:
            make: where deltas are made, such as a response's `choices.add`, which saves copying them into it.
        """
        deltas = []
        for token in tokens:
            choice = self.choices[token.choice]
            if choice.finished:
                continue
            deltas.append(choice.take(token, make))
            if choice.finished:
                self._note_end()
        return deltas

    def end(self) -> list[inference_pb2.ChoiceDelta]:
        """Ends all choices where they stand, by length."""
        deltas = [choice.end() for choice in self.choices]
        self._note_end()
        return deltas

    def delivered(self) -> tuple[Delivered, ...]:
        """What a new attempt must force."""
        return tuple(Delivered(tuple(choice.token_ids), choice.finished) for choice in self.choices)

    def _note_end(self) -> None:
        self.finished = all(choice.finished for choice in self.choices)
