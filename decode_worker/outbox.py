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
from baton.requests import AttemptRef, RequestSpec
from baton.wire import ref_from_wire, ref_to_wire

# Prompt logprobs that travel in one message: beyond this the rest follows in another.
_SCORE_BYTES = 1 << 20


@dataclasses.dataclass(slots=True, eq=False)
class Lane:
    """The tokens of one choice that its router has not acknowledged.

    Attributes:
        template: what all messages of the choice have in common.
        max_tokens: with so many tokens it is full.
        is_open: whether the router wants the choice's tokens.
    """

    router_id: str
    template: worker_pb2.TokenOut
    max_tokens: int
    tokens: collections.deque[worker_pb2.TokenOut] = dataclasses.field(default_factory=collections.deque)
    is_open: bool = True

    @property
    def is_full(self) -> bool:
        """Whether the choice should pause. Any thread may ask, without the lock."""
        return len(self.tokens) >= self.max_tokens

    def close(self) -> None:
        """Nobody wants more of the choice."""
        self.is_open = False
        self.tokens.clear()


@dataclasses.dataclass(slots=True, eq=False)
class Mailbox:
    """One attempt's messages that its router has not acknowledged. Guarded by the outbox's lock.

    Attributes:
        lanes: one for each choice.
        scores: the prompt's logprobs; the first token of any choice comes after them and is acknowledged for them too.
        is_open: whether its router wants anything; what else is published is dropped.
        is_complete: whether nothing more will be published.
    """

    router_id: str
    lanes: list[Lane]
    updates: list[worker_pb2.RequestUpdate] = dataclasses.field(default_factory=list)
    scores: list[worker_pb2.PromptLogprobs] = dataclasses.field(default_factory=list)
    is_open: bool = True
    is_complete: bool = False

    @property
    def is_done(self) -> bool:
        return self.is_complete and not self.scores and not any(lane.tokens for lane in self.lanes)


class _Stream:
    """What one attached router is still to be sent. Guarded by the outbox's lock but for the event."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.ready = asyncio.Event()
        self.tokens: list[worker_pb2.TokenOut] = []
        self.updates: list[worker_pb2.RequestUpdate] = []
        self.scores: collections.deque[worker_pb2.PromptLogprobs] = collections.deque()
        self.superseded = False
        self._is_woken = False

    def take_scores(self) -> list[worker_pb2.PromptLogprobs]:
        """The next prompt logprobs, as many as fit one message well."""
        taken: list[worker_pb2.PromptLogprobs] = []
        num_bytes = 0
        while self.scores and num_bytes < _SCORE_BYTES:
            num_bytes += self.scores[0].ByteSize()
            taken.append(self.scores.popleft())
        return taken

    def wake(self) -> None:
        """There is something to send. Waking another thread's loop costs a system call, so once is enough."""
        if not self._is_woken:
            self._is_woken = True
            self.loop.call_soon_threadsafe(self.ready.set)

    def rest(self) -> None:
        """There is nothing more to send."""
        self._is_woken = False
        self.ready.clear()


class Outbox:
    """All routers' unacknowledged messages. Any thread may call; nothing here blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mailboxes: dict[AttemptRef, Mailbox] = {}
        self._streams: dict[str, _Stream] = {}

    # The engine thread

    def open(self, spec: RequestSpec) -> Mailbox:
        """An attempt was accepted: where its messages are put."""
        ref = ref_to_wire(spec.ref)
        lanes = [
            Lane(spec.router_id, worker_pb2.TokenOut(ref=ref, choice=choice), spec.max_unacked_tokens)
            for choice in range(spec.sampling.n)
        ]
        mailbox = Mailbox(spec.router_id, lanes)
        with self._lock:
            self._mailboxes[spec.ref] = mailbox
        return mailbox

    def publish(
        self,
        tokens: Iterable[tuple[Lane, worker_pb2.TokenOut]],
        updates: Iterable[tuple[Mailbox, worker_pb2.RequestUpdate]],
        scores: Iterable[tuple[Mailbox, worker_pb2.PromptLogprobs]] = (),
    ) -> None:
        """Keep and send what one step made."""
        woken: set[_Stream] = set()
        with self._lock:
            streams = self._streams
            for lane, token in tokens:
                if lane.is_open:
                    lane.tokens.append(token)
                    if (stream := streams.get(lane.router_id)) is not None:
                        stream.tokens.append(token)
                        woken.add(stream)
            for mailbox, score in scores:
                if mailbox.is_open:
                    mailbox.scores.append(score)
                    if (stream := streams.get(mailbox.router_id)) is not None:
                        stream.scores.append(score)
                        woken.add(stream)
            for mailbox, update in updates:
                if mailbox.is_open:
                    mailbox.updates.append(update)
                    if (stream := streams.get(mailbox.router_id)) is not None:
                        stream.updates.append(update)
                        woken.add(stream)
            for stream in woken:
                stream.wake()

    def complete(self, ref: AttemptRef) -> None:
        """Nothing more will be published for `ref`; it is dropped once everything is acknowledged."""
        with self._lock:
            if (mailbox := self._mailboxes.get(ref)) is not None:
                mailbox.is_complete = True
                if mailbox.is_done and not mailbox.updates:
                    del self._mailboxes[ref]

    def forget(self, ref: AttemptRef) -> None:
        """Drop an attempt that nobody waits for."""
        with self._lock:
            if (mailbox := self._mailboxes.pop(ref, None)) is not None:
                mailbox.is_open = False
                for lane in mailbox.lanes:
                    lane.close()

    @property
    def num_records(self) -> int:
        """Attempts with something unacknowledged, or still running."""
        return len(self._mailboxes)

    # The event loop

    def acknowledge(self, cursors: Iterable[worker_pb2.Cursor]) -> list[AttemptRef]:
        """Drop tokens before each cursor's position; returns the attempts that are done with."""
        done: list[AttemptRef] = []
        with self._lock:
            for cursor in cursors:
                ref = ref_from_wire(cursor.ref)
                mailbox = self._mailboxes.get(ref)
                if mailbox is None:
                    continue
                self._trim(mailbox, cursor)
                if mailbox.is_done:
                    del self._mailboxes[ref]
                    done.append(ref)
        return done

    def attach(
        self, router_id: str, cursors: Iterable[worker_pb2.Cursor]
    ) -> AsyncGenerator[worker_pb2.StepOutput, None]:
        """The router's stream from its cursors on; an older stream of the same router ends."""
        stream = _Stream(asyncio.get_running_loop())
        with self._lock:
            for cursor in cursors:
                if (mailbox := self._mailboxes.get(ref_from_wire(cursor.ref))) is not None:
                    self._trim(mailbox, cursor)
            for mailbox in self._mailboxes.values():
                if mailbox.router_id == router_id:
                    stream.scores.extend(mailbox.scores)
                    for lane in mailbox.lanes:
                        stream.tokens.extend(lane.tokens)
                    stream.updates.extend(mailbox.updates)
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
                        stream.rest()
                        output.tokens.extend(stream.tokens)
                        output.updates.extend(stream.updates)
                        stream.tokens, stream.updates = [], []
                yield output
        finally:
            with self._lock:
                if self._streams.get(router_id) is stream:
                    del self._streams[router_id]

    @staticmethod
    def _trim(mailbox: Mailbox, cursor: worker_pb2.Cursor) -> None:
        if cursor.position > 0:
            mailbox.scores.clear()
        if cursor.choice >= len(mailbox.lanes):
            return
        lane = mailbox.lanes[cursor.choice]
        if cursor.ended:
            lane.close()
        while lane.tokens and lane.tokens[0].position < cursor.position:
            lane.tokens.popleft()
