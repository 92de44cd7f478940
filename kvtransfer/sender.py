"""The sending end of KV transfers: pushes of a prefill worker, over one link for each receiver.

The engine loop calls; `on_done` comes from a link's thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TypeAlias

from baton.config import TransferConfig
from baton.errors import UnavailableError
from baton.internal.v1 import transfer_pb2
from baton.metrics import TransferMetrics
from engine.kv.layout import KVLayout
from kvtransfer import transports
from kvtransfer.link import Link
from kvtransfer.pages import PageMemory
from kvtransfer.push import OnDone, Push
from kvtransfer.reservation import Origin
from kvtransfer.ticket import check_layouts, check_ticket
from kvtransfer.transports.base import Transport, WireSettings

# One receiver incarnation and how it is reached.
_Key: TypeAlias = tuple[str, int, str]


class Sender:
    """Pushes out of one worker's pool.

    Args:
        memory: the pool's bytes, only read.
        fingerprint: what a receiver must agree with.
        worker, epoch: this incarnation.
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
        load: Callable[[str], Transport] = transports.load,
    ) -> None:
        if (memory.num_slots, memory.page_bytes) != (layout.num_slots, layout.page_bytes):
            raise ValueError("the pool's shape is not that of the layout")
        self._memory = memory
        self._layout = layout
        self._fingerprint = fingerprint
        self._origin = Origin(worker, epoch)
        self._config = config
        self._metrics = metrics
        self._transports = [load(name) for name in config.transports]
        self._lock = threading.Lock()
        # The link of each receiver; and all whose threads may still run, which may be one that failed as well.
        self._links: dict[_Key, Link] = {}
        self._started: list[Link] = []
        self._closed = False

    def open(self, ticket: transfer_pb2.Ticket, on_done: OnDone) -> Push:
        """Begins a push; pages may be sent at once and leave when the receiver has let it in. Never blocks.

        Args:
            on_done: called exactly once, from a sender thread, perhaps before this returns, when no thread reads the
                pool for this push any more: with None when the receiver has committed, else with what went wrong. It
                must return soon and must not close the sender.

        Raises (`on_done` is not called then):
            LayoutMismatchError: the pools differ.
            InvalidRequestError: the ticket makes no sense.
            DuplicateRequestError: the ticket's reservation has a push.
            UnavailableError: no transport in common, or the sender is closed.
        """
        check_layouts(self._fingerprint, ticket.layout)
        check_ticket(ticket, self._layout)
        key = (ticket.worker, ticket.epoch, ticket.control_address)
        with self._lock:
            if self._closed:
                raise UnavailableError("the sender is closed")
            link = self._links.get(key)
            if link is not None:
                push = Push(ticket, link, on_done)
                if link.add(push):
                    return push
            link = self._make_link(ticket)
            push = Push(ticket, link, on_done)
            link.add(push)
            self._start(key, link)
        return push

    def warm(self, ticket: transfer_pb2.Ticket) -> None:
        """Connects to the ticket's receiver, if it is new, so that `open` finds a link. Never blocks or raises."""
        key = (ticket.worker, ticket.epoch, ticket.control_address)
        with self._lock:
            if not self._closed and key not in self._links:
                # What is wrong with the ticket is for `open` to tell.
                with contextlib.suppress(UnavailableError):
                    self._start(key, self._make_link(ticket))

    def close(self) -> None:
        """Ends all pushes with UnavailableError and waits for the links' threads. Idempotent."""
        with self._lock:
            self._closed = True
        for link in self._started:
            link.close()

    def _make_link(self, ticket: transfer_pb2.Ticket) -> Link:
        routes = transports.choose(self._transports, ticket.offers)
        if not routes:
            offered = ", ".join(offer.transport for offer in ticket.offers)
            raise UnavailableError(
                f"no transport in common with {ticket.worker}: it offers {offered}; "
                f"here are {', '.join(self._config.transports)}, and loopback and shm reach one process and one host"
            )
        max_payload_bytes = max(self._config.frame_bytes, self._memory.page_bytes)
        settings = WireSettings(
            worker=ticket.worker,
            epoch=ticket.epoch,
            control_address=ticket.control_address,
            origin=self._origin,
            max_payload_bytes=max_payload_bytes,
            window_bytes=max(self._config.ring_bytes, 2 * max_payload_bytes),
            timeout_s=self._config.timeout_s,
        )
        return Link(routes, settings, self._memory, self._fingerprint, self._metrics)

    def _start(self, key: _Key, link: Link) -> None:
        """Makes a link the one of its receiver, and forgets those that have come to their end; the lock is held."""
        self._started = [other for other in self._started if other.is_alive]
        self._links = {other_key: other for other_key, other in self._links.items() if other.is_alive}
        self._links[key] = link
        self._started.append(link)
        link.start()
