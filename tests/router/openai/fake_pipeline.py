"""A pipeline that says what a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from baton.v1 import inference_pb2
from router.sink import Sink

STOP, LENGTH = inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_LENGTH
Script = Callable[[inference_pb2.GenerateRequest], Sequence[inference_pb2.GenerateResponse | Exception]]


class FakePipeline:
    """Answers every request by its script; an exception in a script is raised where it stands.

    Attributes:
        requests, timeouts: what `generate` was called with.
        closed: how many of the answers have ended, one way or another.
        gate: answers wait for it before each response but the first.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.timeouts: list[float | None] = []
        self.given = 0
        self.closed = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = asyncio.Event()

    async def generate(
        self, request: inference_pb2.GenerateRequest, sink: Sink, timeout_s: float | None = None
    ) -> None:
        self.requests.append(request)
        self.timeouts.append(timeout_s)
        try:
            for index, step in enumerate(self.script(request)):
                if index:
                    self.waiting.set()
                    await self.gate.wait()
                await asyncio.sleep(0)
                if isinstance(step, Exception):
                    raise step
                await sink.drain()
                self.given += 1
                sink.send(step)
            await sink.drain()
        finally:
            self.closed += 1

    @property
    def sampling(self) -> inference_pb2.SamplingParams:
        """Of the only request."""
        (request,) = self.requests
        return request.sampling


def delta(
    text: str,
    token_id: int = 5,
    *,
    index: int = 0,
    finish: int = 0,
    logprobs: inference_pb2.PositionLogprobs | None = None,
    **stop: Any,
) -> inference_pb2.ChoiceDelta:
    """One token."""
    reason = inference_pb2.FinishReason.ValueType(finish)
    made = inference_pb2.ChoiceDelta(index=index, text=text, token_ids=[token_id], finish_reason=reason, **stop)
    if logprobs is not None:
        made.logprobs.append(logprobs)
    return made


def position(token_id: int, logprob: float, top: dict[int, float]) -> inference_pb2.PositionLogprobs:
    """Logprobs at one position."""
    return inference_pb2.PositionLogprobs(
        sampled=inference_pb2.TokenLogprob(token_id=token_id, logprob=logprob),
        top=[inference_pb2.TokenLogprob(token_id=each, logprob=value) for each, value in top.items()],
    )


def answer(
    *deltas: inference_pb2.ChoiceDelta, prompt_tokens: int = 3, cached_tokens: int = 0, **first: Any
) -> list[inference_pb2.GenerateResponse]:
    """A response for each delta, the last one with the usage.

    Args:
        first: fields of the first response.
    """
    responses = [inference_pb2.GenerateResponse(choices=[each]) for each in deltas]
    responses[0].MergeFrom(inference_pb2.GenerateResponse(**first))
    responses[-1].usage.CopyFrom(
        inference_pb2.Usage(prompt_tokens=prompt_tokens, cached_tokens=cached_tokens, completion_tokens=len(deltas))
    )
    return responses


def words(text: str, finish: int = STOP) -> list[inference_pb2.ChoiceDelta]:
    """The text in pieces of three characters, a token each."""
    pieces = [text[start : start + 3] for start in range(0, len(text), 3)]
    return [delta(piece, 40 + i, finish=finish if i == len(pieces) - 1 else 0) for i, piece in enumerate(pieces)]
