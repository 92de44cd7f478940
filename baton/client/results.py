"""What the client returns: frozen dataclasses, each read from its wire message."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Self

from baton.requests import FinishReason, Logprobs
from baton.stages import StageTimings
from baton.v1 import inference_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; `cached_tokens` are those of the prompt that no worker computed for it."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class PromptEcho:
    """The prompt as the server read it; sent only when `echo` or `prompt_logprobs` was asked for.

    `logprobs` has, if they were asked for, one entry for each of `token_ids` but the first.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()

    @classmethod
    def from_wire(cls, message: inference_pb2.PromptEcho) -> Self:
        return cls(message.text, tuple(message.token_ids), _logprobs(message.logprobs))


@dataclasses.dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """One token of one choice; several of a choice in one message come in order.

    `text` may be empty: it then comes with a later token. `logprobs` has one entry for each of `token_ids` if they were
    asked for. Where nothing was to be generated the only delta of a choice has no token.

    `matched_stop` is the stop string or token id that ended the choice.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    finish_reason: FinishReason = FinishReason.NONE
    matched_stop: str | int | None = None

    @classmethod
    def from_wire(cls, message: inference_pb2.ChoiceDelta) -> Self:
        stop = message.WhichOneof("matched_stop")
        return cls(
            index=message.index,
            text=message.text,
            token_ids=tuple(message.token_ids),
            logprobs=_logprobs(message.logprobs),
            finish_reason=FinishReason(message.finish_reason),
            matched_stop=getattr(message, stop) if stop else None,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Delta:
    """One message of a stream. The first may echo the prompt; only the last has usage and timings."""

    request_id: str
    choices: tuple[ChoiceDelta, ...] = ()
    prompt: PromptEcho | None = None
    usage: Usage | None = None
    timings: StageTimings | None = None

    @property
    def text(self) -> str:
        """The new text of the first choice."""
        return "".join(choice.text for choice in self.choices if choice.index == 0)

    @classmethod
    def from_wire(cls, message: inference_pb2.GenerateResponse) -> Self:
        return cls(
            request_id=message.request_id,
            choices=tuple(ChoiceDelta.from_wire(choice) for choice in message.choices),
            prompt=PromptEcho.from_wire(message.prompt) if message.HasField("prompt") else None,
            usage=Usage(message.usage.prompt_tokens, message.usage.cached_tokens, message.usage.completion_tokens)
            if message.HasField("usage")
            else None,
            timings=timings_from_wire(message.timings) if message.HasField("timings") else None,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """One finished choice, as `ChoiceDelta` without a stream."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    finish_reason: FinishReason
    matched_stop: str | int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer; choices are in the order of their index."""

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage
    timings: StageTimings
    prompt: PromptEcho | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text


@dataclasses.dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model. `max_model_len` bounds prompt plus completion, in tokens."""

    name: str
    architecture: str
    vocab_size: int
    max_model_len: int
    dtype: str
    block_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    max_n: int
    max_logprobs: int

    @classmethod
    def from_wire(cls, message: inference_pb2.GetModelInfoResponse) -> Self:
        return cls(
            name=message.name,
            architecture=message.architecture,
            vocab_size=message.vocab_size,
            max_model_len=message.max_model_len,
            dtype=message.dtype,
            block_size=message.block_size,
            eos_token_ids=tuple(message.eos_token_ids),
            bos_token_id=message.bos_token_id if message.HasField("bos_token_id") else None,
            max_n=message.max_n,
            max_logprobs=message.max_logprobs,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker as the router sees it; blocks are those of its KV pool."""

    role: str
    name: str
    epoch: int
    address: str
    metrics_address: str
    pid: int
    healthy: bool
    running: int
    waiting: int
    free_blocks: int
    total_blocks: int

    @classmethod
    def from_wire(cls, message: inference_pb2.WorkerStatus) -> Self:
        return cls(**{field.name: getattr(message, field.name) for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The router and its workers; `queued` and `running` count requests."""

    version: str
    model: str
    ready: bool
    queued: int
    running: int
    workers: tuple[WorkerStatus, ...]

    @classmethod
    def from_wire(cls, message: inference_pb2.GetClusterStatusResponse) -> Self:
        return cls(
            version=message.version,
            model=message.model,
            ready=message.ready,
            queued=message.queued,
            running=message.running,
            workers=tuple(WorkerStatus.from_wire(worker) for worker in message.workers),
        )


def _logprobs(positions: Iterable[inference_pb2.PositionLogprobs]) -> tuple[Logprobs, ...]:
    return tuple(Logprobs(at.sampled.logprob, tuple((top.token_id, top.logprob) for top in at.top)) for at in positions)


def timings_from_wire(message: inference_pb2.StageTimings) -> StageTimings:
    return StageTimings(**{field.name: getattr(message, field.name) for field in dataclasses.fields(StageTimings)})
