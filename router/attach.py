"""The Attach stream of one decode worker: every request's tokens in, acknowledgements and cancels out.

When the stream breaks it is opened again with a cursor for each choice, and the worker sends what was not acknowledged
once more; only when that fails for `reattach_s` are the requests told that their worker is gone.
Owned by a decode link; all on the router's event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc.aio

from baton.errors import UnavailableError
from baton.internal.v1 import transfer_pb2, worker_pb2, worker_pb2_grpc
from router.backoff import Backoff
from router.recovery import Failure, FailureKind
from router.request_state import Attempt
from router.snapshot import WorkerKey

_log = logging.getLogger(__name__)

# Acknowledgements of this long travel in one message, one for each choice, unless a choice comes near its limit.
_ACK_INTERVAL_S = 0.1

_Call = grpc.aio.StreamStreamCall[worker_pb2.AttachRequest, worker_pb2.StepOutput]


class AttachStream:
    """Keeps one decode worker attached.

    Args:
        on_change: called when the stream comes up or goes down.
        reattach_s: how long a broken stream may take to come back before its requests fail.
        max_unacked_tokens: a choice with this many tokens that were not acknowledged is paused by its worker.
    """

    def __init__(
        self,
        stub: worker_pb2_grpc.DecodeWorkerAsyncStub,
        key: WorkerKey,
        router_id: str,
        on_change: Callable[[], None],
        *,
        reattach_s: float,
        max_unacked_tokens: int = 1024,
    ) -> None:
        self._stub = stub
        self._key = key
        self._router_id = router_id
        self._on_change = on_change
        self._reattach_s = reattach_s
        # Told at once, and so long before the worker would pause.
        self._max_untold = max(max_unacked_tokens // 4, 1)
        self._backoff = Backoff(reattach_s / 4)
        self._call: _Call | None = None
        self._give_up: asyncio.TimerHandle | None = None
        self._attempts: dict[str, Attempt] = {}
        # Attempts with acknowledgements that the worker has not been told.
        self._untold: set[Attempt] = set()
        self._cancels: list[transfer_pb2.AttemptRef] = []
        self._ack_timer: asyncio.TimerHandle | None = None
        self._dirty = asyncio.Event()

    @property
    def up(self) -> bool:
        return self._call is not None

    @property
    def attempts(self) -> list[Attempt]:
        return list(self._attempts.values())

    def add(self, attempt: Attempt) -> None:
        """From now on the attempt hears of its tokens; call it before Reserve, whose answer they may overtake."""
        self._attempts[attempt.ref.request_id] = attempt

    def remove(self, attempt: Attempt) -> None:
        if self._attempts.get(attempt.ref.request_id) is attempt:
            del self._attempts[attempt.ref.request_id]

    def acknowledge(self, attempt: Attempt, choice: int, position: int, *, ended: bool = False) -> None:
        """The client has consumed all tokens of a choice before `position`; told to the worker within 0.1 s.

        Args:
            ended: nothing more of the choice is wanted.
        """
        attempt.cursors[choice] = position
        if ended:
            attempt.ended_choices.add(choice)
        self._untold.add(attempt)
        if ended or position - attempt.told[choice] >= self._max_untold:
            self._dirty.set()
        elif self._ack_timer is None:
            self._ack_timer = asyncio.get_running_loop().call_later(_ACK_INTERVAL_S, self._flush_acks)

    def cancel(self, ref: transfer_pb2.AttemptRef) -> bool:
        """Queues a cancel; False where the stream is down, and the caller must find another way."""
        if not self.up:
            return False
        self._cancels.append(ref)
        self._dirty.set()
        return True

    def fail_all(self, reason: str) -> None:
        """Tells every request that the worker is gone."""
        for attempt in self.attempts:
            attempt.fail(Failure(FailureKind.DECODE_LOST, UnavailableError(reason), self._key))

    def reset(self) -> None:
        """Breaks the stream, so that it is opened again."""
        if self._call is not None:
            self._call.cancel()

    async def run(self) -> None:
        """Runs until cancelled."""
        try:
            while True:
                try:
                    await self._session()
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                    _log.debug("attach to %s broke: %s", self._key.name, error)
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    assert task is not None
                    if task.cancelling():
                        raise
                    _log.debug("attach to %s was reset", self._key.name)
                self._went_down()
                await self._backoff.wait()
        finally:
            for timer in (self._give_up, self._ack_timer):
                if timer is not None:
                    timer.cancel()

    async def _session(self) -> None:
        """One call, from hello to its end. The worker's first message, which may be empty, says that it accepts."""
        call = self._stub.Attach()
        try:
            await call.write(worker_pb2.AttachRequest(hello=self._hello()))
            writer = asyncio.create_task(self._write(call))
            try:
                async for output in call:
                    self._came_up(call)
                    self._dispatch(output)
            finally:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
        finally:
            call.cancel()

    def _hello(self) -> worker_pb2.AttachHello:
        cursors = [
            _cursor(attempt, choice, position)
            for attempt in self._attempts.values()
            for choice, position in enumerate(attempt.cursors)
        ]
        return worker_pb2.AttachHello(router_id=self._router_id, epoch=self._key.epoch, cursors=cursors)

    def _dispatch(self, output: worker_pb2.StepOutput) -> None:
        """One engine step: all that it says of a request is taken in before its tokens are passed on."""
        for scores in output.prompt_logprobs:
            if (attempt := self._attempt_of(scores.ref)) is not None:
                attempt.scored(scores)
        fresh = []
        for token in output.tokens:
            if (attempt := self._attempt_of(token.ref)) is not None:
                attempt.decoded(token)
                fresh.append(attempt)
        for update in output.updates:
            if (attempt := self._attempt_of(update.ref)) is not None:
                attempt.updated(update)
        for attempt in fresh:
            attempt.flush()

    def _attempt_of(self, ref: transfer_pb2.AttemptRef) -> Attempt | None:
        """None where the message comes too late."""
        attempt = self._attempts.get(ref.request_id)
        return attempt if attempt is not None and attempt.number == ref.attempt else None

    async def _write(self, call: _Call) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            untold, self._untold = self._untold, set()
            cancels, self._cancels = self._cancels, []
            cursors = [cursor for attempt in untold for cursor in _news_of(attempt)]
            if not (cursors or cancels):
                continue
            try:
                await call.write(worker_pb2.AttachRequest(acks=cursors, cancels=cancels))
            except BaseException:
                # The next call's hello has what the acks said, and nothing else has the cancels.
                self._cancels[:0] = cancels
                self._dirty.set()
                raise

    def _flush_acks(self) -> None:
        self._ack_timer = None
        self._dirty.set()

    def _came_up(self, call: _Call) -> None:
        if self._call is call:
            return
        self._call = call
        self._backoff.reset()
        if self._give_up is not None:
            self._give_up.cancel()
            self._give_up = None
        self._on_change()

    def _went_down(self) -> None:
        if self._call is None:
            return
        self._call = None
        _log.warning("attach to %s is down; reattaching for %.1f s", self._key.name, self._reattach_s)
        self._give_up = asyncio.get_running_loop().call_later(
            self._reattach_s, self.fail_all, f"{self._key.name} cannot be reached"
        )
        self._on_change()


def _cursor(attempt: Attempt, choice: int, position: int) -> worker_pb2.Cursor:
    return worker_pb2.Cursor(ref=attempt.ref, choice=choice, position=position, ended=choice in attempt.ended_choices)


def _news_of(attempt: Attempt) -> list[worker_pb2.Cursor]:
    """What the worker has not been told yet, which it is from now on: a write that fails is followed by a hello."""
    news = [
        _cursor(attempt, choice, position)
        for choice, (position, told) in enumerate(zip(attempt.cursors, attempt.told, strict=True))
        if position != told
    ]
    attempt.told[:] = attempt.cursors
    return news
