"""Tokens on their way to routers: each is kept until its router acknowledges it.

The engine thread publishes a step's tokens; the event loop sends them, one message a step and router, and takes
acknowledgements. A router that lost its stream reattaches with cursors and gets what it has not seen. Memory is bounded
by the loop, which pauses a sequence whose unacknowledged tokens reach its limit; a slow router's messages merge into
one while it is busy, but for prompt logprobs, which may be long.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import threading
from collections.abc import AsyncGenerator, Iterable

from baton.internal.v1 import worker_pb2
from baton.requests import AttemptRef
from baton.wire import ref_from_wire

# Prompt logprobs that travel in one message: beyond this the rest follows in another.
_SCORE_BYTES = 1 << 20


@dataclasses.dataclass(slots=True)
class _Record:
    """One attempt's messages that its router has not acknowledged.

    Attributes:
        scores: the prompt's logprobs; the first token of any choice comes after them and is acknowledged for them too.
        ended: choices that the router has ended; their tokens are dropped.
    """

    router_id: str
    tokens: dict[int, collections.deque[worker_pb2.TokenOut]] = dataclasses.field(default_factory=dict)
    updates: list[worker_pb2.RequestUpdate] = dataclasses.field(default_factory=list)
    scores: list[worker_pb2.PromptLogprobs] = dataclasses.field(default_factory=list)
    ended: set[int] = dataclasses.field(default_factory=set)
    closed: bool = False

    @property
    def is_done(self) -> bool:
        return self.closed and not self.scores and not any(self.tokens.values())


class _Stream:
    """What one attached router is still to be sent. Guarded by the outbox's lock but for the event."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.ready = asyncio.Event()
        self.tokens: list[worker_pb2.TokenOut] = []
        self.updates: list[worker_pb2.RequestUpdate] = []
        self.scores: collections.deque[worker_pb2.PromptLogprobs] = collections.deque()
        self.superseded = False

    def take_scores(self) -> list[worker_pb2.PromptLogprobs]:
        """The next prompt logprobs, as many as fit one message well."""
        taken: list[worker_pb2.PromptLogprobs] = []
        num_bytes = 0
        while self.scores and num_bytes < _SCORE_BYTES:
            num_bytes += self.scores[0].ByteSize()
            taken.append(self.scores.popleft())
        return taken

    def wake(self) -> None:
        self.loop.call_soon_threadsafe(self.ready.set)


class Outbox:
    """All routers' unacknowledged messages. Any thread may call; nothing here blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: dict[AttemptRef, _Record] = {}
        self._streams: dict[str, _Stream] = {}

    # The engine thread

    def open(self, ref: AttemptRef, router_id: str) -> None:
        """An attempt was accepted; its messages go to `router_id`."""
        with self._lock:
            self._records[ref] = _Record(router_id)

    def publish(
        self,
        tokens: Iterable[tuple[AttemptRef, worker_pb2.TokenOut]],
        updates: Iterable[tuple[AttemptRef, worker_pb2.RequestUpdate]],
        scores: Iterable[tuple[AttemptRef, worker_pb2.PromptLogprobs]] = (),
    ) -> None:
        """Keep and send what one step made; what is of attempts that were closed by `forget` is dropped."""
        woken: set[str] = set()
        with self._lock:
            for ref, score in scores:
                if (record := self._records.get(ref)) is not None:
                    record.scores.append(score)
                    if (stream := self._streams.get(record.router_id)) is not None:
                        stream.scores.append(score)
                        woken.add(record.router_id)
            for ref, token in tokens:
                if (record := self._records.get(ref)) is not None and token.choice not in record.ended:
                    record.tokens.setdefault(token.choice, collections.deque()).append(token)
                    if (stream := self._streams.get(record.router_id)) is not None:
                        stream.tokens.append(token)
                        woken.add(record.router_id)
            for ref, update in updates:
                if (record := self._records.get(ref)) is not None:
                    record.updates.append(update)
                    if (stream := self._streams.get(record.router_id)) is not None:
                        stream.updates.append(update)
                        woken.add(record.router_id)
            for router_id in woken:
                self._streams[router_id].wake()

    def close(self, ref: AttemptRef) -> None:
        """Nothing more will be published for `ref`; it is dropped once everything is acknowledged."""
        with self._lock:
            if (record := self._records.get(ref)) is not None:
                record.closed = True
                if record.is_done and not record.updates:
                    del self._records[ref]

    def forget(self, ref: AttemptRef) -> None:
        """Drop an attempt that nobody waits for."""
        with self._lock:
            self._records.pop(ref, None)

    def num_unacked(self, ref: AttemptRef, choice: int) -> int:
        with self._lock:
            record = self._records.get(ref)
            return len(record.tokens.get(choice, ())) if record is not None else 0

    @property
    def num_records(self) -> int:
        """Attempts with something unacknowledged, or still running."""
        return len(self._records)

    # The event loop

    def acknowledge(self, cursors: Iterable[worker_pb2.Cursor]) -> list[AttemptRef]:
        """Drop tokens before each cursor's position; returns the attempts that are done with."""
        done: list[AttemptRef] = []
        with self._lock:
            for cursor in cursors:
                ref = ref_from_wire(cursor.ref)
                record = self._records.get(ref)
                if record is None:
                    continue
                self._trim(record, cursor)
                if record.is_done:
                    del self._records[ref]
                    done.append(ref)
        return done

    def attach(
        self, router_id: str, cursors: Iterable[worker_pb2.Cursor]
    ) -> AsyncGenerator[worker_pb2.StepOutput, None]:
        """The router's stream from its cursors on; an older stream of the same router ends."""
        stream = _Stream(asyncio.get_running_loop())
        with self._lock:
            for cursor in cursors:
                if (record := self._records.get(ref_from_wire(cursor.ref))) is not None:
                    self._trim(record, cursor)
            for record in self._records.values():
                if record.router_id == router_id:
                    stream.scores.extend(record.scores)
                    for tokens in record.tokens.values():
                        stream.tokens.extend(tokens)
                    stream.updates.extend(record.updates)
            if (old := self._streams.get(router_id)) is not None:
                old.superseded = True
                old.wake()
            self._streams[router_id] = stream
            # Even with nothing to say, the first message tells the router that it is attached.
            stream.ready.set()
        return self._send(router_id, stream)

    async def _send(self, router_id: str, stream: _Stream) -> AsyncGenerator[worker_pb2.StepOutput, None]:
        try:
            while True:
                await stream.ready.wait()
                with self._lock:
                    if stream.superseded:
                        return
                    output = worker_pb2.StepOutput(prompt_logprobs=stream.take_scores())
                    if not stream.scores:
                        # What follows the prompt never comes before it.
                        stream.ready.clear()
                        output.tokens.extend(stream.tokens)
                        output.updates.extend(stream.updates)
                        stream.tokens, stream.updates = [], []
                yield output
        finally:
            with self._lock:
                if self._streams.get(router_id) is stream:
                    del self._streams[router_id]

    @staticmethod
    def _trim(record: _Record, cursor: worker_pb2.Cursor) -> None:
        if cursor.position > 0:
            record.scores.clear()
        if cursor.ended:
            record.ended.add(cursor.choice)
            record.tokens.pop(cursor.choice, None)
        tokens = record.tokens.get(cursor.choice)
        while tokens and tokens[0].position < cursor.position:
            tokens.popleft()
