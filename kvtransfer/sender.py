"""The sending end of KV transfers: pushes of one rank of a prefill worker, over one link for each receiving rank.

The engine loop calls; `on_done` comes from a link's thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

from baton.config import TransferConfig
from baton.errors import UnavailableError
from baton.internal.v1 import transfer_pb2
from baton.metrics import TransferMetrics
from engine.kv.layout import KVLayout
from kvtransfer import transports
from kvtransfer.link import Link
from kvtransfer.pages import HeadRange, PageMemory, check_memory
from kvtransfer.push import OnDone, Push
from kvtransfer.reservation import Origin
from kvtransfer.ticket import check_layouts, check_ticket, shard_heads
from kvtransfer.transports.base import Transport, WireSettings

# One rank of a receiver incarnation and how it is reached.
_Key: TypeAlias = tuple[str, int, str, int]


class Sender:
    """Pushes out of one rank's pool.

    Args:
        memory: the pool's bytes, only read.
        layout: of this rank's pool.
        fingerprint: what a receiver must agree with.
        worker, epoch, rank: this incarnation and its part, which receivers are told.
        load: finds a transport by name; tests inject faults here.
    """

    def __init__(
        self,
        memory: PageMemory,
        layout: KVLayout,
        fingerprint: transfer_pb2.LayoutFingerprint,
        worker: str,
        epoch: int,
        config: TransferConfig,
        metrics: TransferMetrics,
        *,
        rank: int = 0,
        load: Callable[[str], Transport] = transports.load,
    ) -> None:
        check_memory(memory, layout)
        self._memory = memory
        self._layout = layout
        self._fingerprint = fingerprint
        self._origin = Origin(worker, epoch, rank)
        self._config = config
        self._metrics = metrics
        candidates = (load(name) for name in config.transports)
        self._transports = [transport for transport in candidates if transport.carries(memory)]
        self._lock = threading.Lock()
        # The link to each receiving rank; and all whose threads may still run, which may be one that failed as well.
        self._links: dict[_Key, Link] = {}
        self._started: list[Link] = []
        self._closed = False

    def open(self, ticket: transfer_pb2.Ticket, on_done: OnDone) -> Push:
        """Begins a push; pages may be sent at once and leave when the receiver has let it in. Never blocks.

        Args:
            on_done: called exactly once, from a sender thread, perhaps before this returns, when no thread reads the
                pool for this push any more: with None when the receiving ranks have verified all that this rank sends,
                else with what went wrong. It must return soon and must not close the sender.

        Raises (`on_done` is not called then):
            LayoutMismatchError: the pools differ.
            InvalidRequestError: the ticket makes no sense.
            DuplicateRequestError: the ticket's reservation has a push.
            UnavailableError: no transport in common, or the sender is closed.
        """
        check_layouts(self._fingerprint, ticket.layout)
        check_ticket(ticket, self._layout)
        with self._lock:
            if self._closed:
                raise UnavailableError("the sender is closed")
            links = self._links_to(ticket)
            push = Push(ticket, [(link, heads) for _, link, heads in links], on_done)
            push.start()
            self._start(links)
        return push

    def warm(self, ticket: transfer_pb2.Ticket) -> None:
        """Connects to the ticket's receiving ranks, where they are new, so that `open` finds links.

        Never blocks or raises.
        """
        with self._lock:
            if not self._closed:
                # What is wrong with the ticket is for `open` to tell.
                with contextlib.suppress(UnavailableError):
                    self._start(self._links_to(ticket))

    def close(self) -> None:
        """Ends all pushes with UnavailableError and waits for the links' threads. Idempotent."""
        with self._lock:
            self._closed = True
        for link in self._started:
            link.close()

    def _links_to(self, ticket: transfer_pb2.Ticket) -> list[tuple[_Key, Link, HeadRange]]:
        """The link to each rank that receives heads of this one, and which; new ones are not started yet.

        Raises UnavailableError where there is no way. The lock is held.
        """
        links = []
        for rank, shard in enumerate(ticket.shards):
            heads = self._memory.heads.overlap(shard_heads(shard))
            if heads.count:
                key = (ticket.worker, ticket.epoch, ticket.control_address, rank)
                link = self._links.get(key)
                if link is None or link.has_failed:
                    link = self._make_link(ticket, rank)
                links.append((key, link, heads))
        return links

    def _make_link(self, ticket: transfer_pb2.Ticket, rank: int) -> Link:
        offers = ticket.shards[rank].offers
        routes = transports.choose(self._transports, offers)
        if not routes:
            offered = ", ".join(offer.transport for offer in offers)
            raise UnavailableError(
                f"no transport in common with {ticket.worker}: it offers {offered}; "
                f"here are {', '.join(self._config.transports)}, and loopback and shm reach one process and one host"
            )
        max_payload_bytes = max(self._config.frame_bytes, self._memory.page_bytes)
        settings = WireSettings(
            worker=ticket.worker,
            epoch=ticket.epoch,
            memory=self._memory,
            rank=rank,
            control_address=ticket.control_address,
            origin=self._origin,
            max_payload_bytes=max_payload_bytes,
            window_bytes=max(self._config.ring_bytes, 2 * max_payload_bytes),
            timeout_s=self._config.timeout_s,
        )
        return Link(routes, settings, self._memory, self._fingerprint, self._metrics)

    def _start(self, links: Sequence[tuple[_Key, Link, HeadRange]]) -> None:
        """Starts what is new, and forgets links that have come to their end; the lock is held."""
        new = [(key, link) for key, link, _ in links if self._links.get(key) is not link]
        if new:
            self._started = [other for other in self._started if other.is_alive]
            self._links = {key: other for key, other in self._links.items() if other.is_alive}
        for key, link in new:
            self._links[key] = link
            self._started.append(link)
            link.start()
