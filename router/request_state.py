"""One attempt at a request, as its streams report it: tokens in order of position, progress, and failure.

Written by the readers of worker streams, which also pass the tokens on; the request's own task waits until there is
something else to do. Both run on the router's event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence

from baton.errors import BatonError, UnavailableError, from_status
from baton.internal.v1 import transfer_pb2, worker_pb2
from baton.v1 import inference_pb2
from router.ledger import Charge
from router.recovery import Failure, FailureKind
from router.sink import Sink
from router.snapshot import WorkerKey

# Takes tokens of an attempt, at least one; whether it wants no more.
Take = Callable[[list[worker_pb2.TokenOut]], bool]


class TokenMerge:
    """Brings the tokens of two workers into order: by position in each choice, each position once.

    The decode worker's tokens wait here until the prefill worker's first token of their choice has come.

    Args:
        next_positions: for each choice the first position that is expected.

    Attributes:
        ready: the tokens whose turn has come since the last call of `take`.
    """

    __slots__ = ("_early", "_next", "ready")

    def __init__(self, next_positions: Sequence[int]) -> None:
        self._next = list(next_positions)
        self._early: list[dict[int, worker_pb2.TokenOut]] = [{} for _ in next_positions]
        self.ready: list[worker_pb2.TokenOut] = []

    def offer(self, token: worker_pb2.TokenOut) -> None:
        """Takes a token from either worker; one that came before is dropped."""
        choice, position = token.choice, token.position
        expected = self._next[choice]
        if position != expected:
            if position > expected:
                self._early[choice][position] = token
            return
        self.ready.append(token)
        expected += 1
        early = self._early[choice]
        while early and (follower := early.pop(expected, None)) is not None:
            self.ready.append(follower)
            expected += 1
        self._next[choice] = expected

    def take(self) -> list[worker_pb2.TokenOut]:
        """Hands `ready` over."""
        ready, self.ready = self.ready, []
        return ready


@dataclasses.dataclass(slots=True)
class Progress:
    """How an attempt went, beside its tokens; durations in seconds, moments in monotonic seconds.

    Attributes:
        decode_cached_tokens: what the decode worker had in its cache when it reserved.
        sent_bytes, sending_s, transport: what the prefill worker sent, in which time and how; known from `sent_at` on.
    """

    queue_s: float = 0.0
    reserve_s: float = 0.0
    decode_cached_tokens: int = 0
    cached_tokens: int | None = None
    prefill_s: float = 0.0
    transfer_s: float | None = None
    first_decode_step_s: float = 0.0
    decode_s: float | None = None
    first_tokens_at: float | None = None
    decoding_at: float | None = None
    sent_bytes: int = 0
    sending_s: float = 0.0
    transport: str = ""
    sent_at: float | None = None

    def exposed_transfer_s(self) -> float:
        """From the end of prefill to the commit: what the prefill worker measured, else as seen from here.

        A short request may be over before the prefill worker's last message comes.
        """
        if self.transfer_s is not None:
            return self.transfer_s
        if self.first_tokens_at is None or self.decoding_at is None:
            return 0.0
        return max(self.decoding_at - self.first_tokens_at - self.first_decode_step_s, 0.0)

    def decode_time_s(self, now: float) -> float:
        """What the decode worker measured, else the time since it began."""
        if self.decode_s is not None:
            return self.decode_s
        return 0.0 if self.decoding_at is None else now - self.decoding_at


class Attempt:
    """One try at a request on one placement.

    Attributes:
        cursors: for each choice the next position that the client has not consumed; where a reattach resumes.
        told: the cursors that the decode worker has been sent.
        committed: the decode worker holds the KV and decodes.
        reserved: the decode worker has granted the reservation, so its lease needs renewing.
        ended_on_worker: the decode worker has said that it is through.
        delivers: the client has been sent tokens of this attempt.
        ended_choices: choices that the router has ended, as the decode worker is told.
        prompt_logprobs: of the prompt's tokens from the second on, where asked for; whole before the first token comes.
    """

    __slots__ = (
        "_expired",
        "_is_through",
        "_sink",
        "_take",
        "_waiter",
        "charge",
        "committed",
        "cursors",
        "delivers",
        "ended_choices",
        "ended_on_worker",
        "failure",
        "merge",
        "number",
        "placement",
        "progress",
        "prompt_logprobs",
        "ref",
        "reserved",
        "told",
    )

    def __init__(self, ref: transfer_pb2.AttemptRef, charge: Charge, next_positions: Sequence[int]) -> None:
        self.ref = ref
        self.number = ref.attempt
        self.charge = charge
        self.placement = charge.placement
        self.merge = TokenMerge(next_positions)
        self.cursors = list(next_positions)
        self.told = list(next_positions)
        self.progress = Progress()
        self.committed = False
        self.reserved = False
        self.ended_on_worker = False
        self.delivers = False
        self.ended_choices: set[int] = set()
        self.prompt_logprobs: list[inference_pb2.PositionLogprobs] = []
        self.failure: Failure | None = None
        self._expired = False
        self._sink: Sink | None = None
        self._take: Take | None = None
        self._is_through = False
        # Of the request's task, while it waits.
        self._waiter: asyncio.Future[None] | None = None

    async def deliver(self, sink: Sink, take: Take) -> None:
        """Has `take` called with the tokens in order, by whoever brings them, while the sink is ready.

        Returns when it wants no more, or none are left and the attempt has failed.

        Raises:
            TimeoutError: none are left, and the attempt has expired.
            BaseException: whatever `take` raised.
        """
        self._sink, self._take = sink, take
        try:
            while not self._is_through:
                if not self._pass_on():
                    self._waiter = asyncio.get_running_loop().create_future()
                    await self._waiter
                elif self.merge.ready:
                    await sink.drain()
                elif self.failure is not None:
                    return
                elif self._expired:
                    raise TimeoutError
        finally:
            # They refer to the attempt, and would keep it alive until the garbage collector comes.
            self._sink = self._take = self._waiter = None

    def flush(self) -> None:
        """Passes on the tokens whose turn has come; called by a stream's reader after each message that it took."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        try:
            if self._pass_on():
                waiter.set_result(None)
        except BaseException as error:
            # It is the request's own, and no other's on the stream.
            waiter.set_exception(error)

    def expire(self) -> None:
        """The client's deadline has passed."""
        self._expired = True
        self.flush()

    def decoded(self, token: worker_pb2.TokenOut) -> None:
        """The decode worker has sent a token; `flush` passes it on."""
        if not self.committed:
            self._commit()
        self.merge.offer(token)

    def scored(self, message: worker_pb2.PromptLogprobs) -> None:
        """Either worker has sent the logprobs of more of the prompt; what came before is sent again on a reattach."""
        if message.start == len(self.prompt_logprobs) + 1:
            self.prompt_logprobs.extend(message.positions)

    def updated(self, update: worker_pb2.RequestUpdate) -> None:
        """The decode worker has changed the request's state."""
        if update.state == worker_pb2.REQUEST_STATE_DECODING:
            self._commit()
            self.progress.first_decode_step_s = update.first_decode_step_s
            self._note_local_prefill(update)
        elif update.state == worker_pb2.REQUEST_STATE_FINISHED:
            self.ended_on_worker = True
            self.progress.decode_s = update.decode_s
            self._note_local_prefill(update)
        elif update.state == worker_pb2.REQUEST_STATE_PREEMPTED:
            self.fail(Failure(FailureKind.PREEMPTED, UnavailableError("preempted by the decode worker")))
        elif update.state == worker_pb2.REQUEST_STATE_FAILED:
            self.fail(Failure(FailureKind.DECODE_FAILED, from_status(update.status, update.message)))

    def prefilled(self, event: worker_pb2.PrefillEvent) -> None:
        """The prefill worker has sent an event."""
        kind = event.WhichOneof("event")
        if kind == "started":
            self.progress.cached_tokens = event.started.cached_tokens
        elif kind == "first_tokens":
            self.progress.prefill_s = event.first_tokens.prefill_s
            self.progress.first_tokens_at = time.monotonic()
            for token in event.first_tokens.tokens:
                self.merge.offer(token)
            self.flush()
        elif kind == "prompt_logprobs":
            self.scored(event.prompt_logprobs)
        elif kind == "done":
            self.progress.transfer_s = event.done.transfer_s
            self._note_sent(event.done)
            if event.done.committed:
                self._commit()

    def prefill_failed(self, error: BatonError, worker: WorkerKey) -> None:
        """The prefill worker has ended early; no harm where it had sent its tokens and the decode worker decodes."""
        if not self.committed or self.progress.first_tokens_at is None:
            self.fail(Failure(FailureKind.PREFILL_FAILED, error, worker))

    def fail(self, failure: Failure) -> None:
        """Ends the attempt; the first failure counts."""
        if self.failure is None:
            self.failure = failure
            self.flush()

    def _note_local_prefill(self, update: worker_pb2.RequestUpdate) -> None:
        """From the first update of a local prefill: FINISHED where its first token ended the request, else DECODING."""
        if self.placement.prefill is None and self.progress.cached_tokens is None:
            self.progress.cached_tokens = update.cached_tokens
            self.progress.prefill_s = update.local_prefill_s

    def _note_sent(self, done: worker_pb2.PrefillDone) -> None:
        if done.committed:
            self.progress.sent_bytes, self.progress.sending_s = done.bytes, done.sending_s
            self.progress.transport = done.transport
            self.progress.sent_at = time.monotonic()

    def _pass_on(self) -> bool:
        """Calls `take` as far as the client keeps up; whether the request's task has something to do."""
        assert self._sink is not None
        assert self._take is not None
        while self.merge.ready:
            if not self._sink.ready:
                return True
            if self._take(self.merge.take()):
                self._is_through = True
                return True
        return self.failure is not None or self._expired

    def _commit(self) -> None:
        self.committed = True
        if self.progress.decoding_at is None:
            self.progress.decoding_at = time.monotonic()
