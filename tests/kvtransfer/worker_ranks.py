"""Workers of any degree, all ranks in this process: their pools together are one whole pool, split by heads."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from prometheus_client import CollectorRegistry

from baton.config import TransferConfig
from baton.errors import BatonError
from baton.internal.v1 import transfer_pb2
from baton.metrics import TransferMetrics
from baton.requests import AttemptRef
from engine.kv.layout import KVLayout
from kvtransfer import transports
from kvtransfer.following_sender import FollowingSender
from kvtransfer.leading_receiver import LeadingReceiver
from kvtransfer.leading_sender import LeadingPush, LeadingSender
from kvtransfer.pages import HeadRange, HostPages, PageMemory
from kvtransfer.ranks import ReceivingRank
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.ticket import layout_fingerprint
from kvtransfer.transports.base import Transport
from tests.kvtransfer.sides import WAIT_S, ControlServer, Recorder, is_on_device, pool_of, random_pages


class Pools:
    """The pools of a worker's ranks.

    Args:
        layout: of the whole pool.
        heads: of single ranks, where they are not what they should be.

    Attributes:
        layout: of one rank's pool.
        memories: of each rank.
        before: what `joined` was at first.
    """

    def __init__(
        self,
        config: TransferConfig,
        layout: KVLayout,
        degree: int,
        num_blocks: int,
        seed: int,
        heads: Mapping[int, HeadRange] | None = None,
    ) -> None:
        self._whole = layout
        share = layout.num_kv_heads // degree
        self.layout = dataclasses.replace(layout, num_kv_heads=share)
        self.fingerprint = layout_fingerprint(self.layout, model="model", degree=degree)
        self.before = self._by_head(random_pages(layout, num_blocks, seed))
        self._pages: list[np.ndarray] = []
        self.memories: list[PageMemory] = []
        for rank in range(degree):
            held = HeadRange(rank * share, share)
            content = self.before[:, :, :, held.first : held.stop].reshape(*self.before.shape[:2], -1)
            pages, memory = pool_of(content, (heads or {}).get(rank, held), HostPages, is_on_device(config, None))
            self._pages.append(pages)
            self.memories.append(memory)

    def joined(self) -> np.ndarray:
        """The whole pool, uint8 [num_slots, num_blocks, K|V, kv head, bytes of a head's K]."""
        return np.concatenate([self._by_head(pages) for pages in self._pages], axis=3)

    def _by_head(self, pages: np.ndarray) -> np.ndarray:
        layout = self._whole
        value_bytes = layout.page_bytes // (2 * layout.num_kv_heads)
        return pages.reshape(*pages.shape[:2], 2, -1, value_bytes)


class DecodeRanks:
    """A decode worker.

    Args:
        channel: how the leader reaches each receiver.
    """

    def __init__(
        self,
        config: TransferConfig,
        layout: KVLayout,
        degree: int,
        num_blocks: int = 32,
        *,
        channel: Callable[[Receiver], ReceivingRank] = lambda receiver: receiver,
    ) -> None:
        self.pools = Pools(config, layout, degree, num_blocks, seed=1)
        self.events = Recorder()
        self.registry = CollectorRegistry()
        fingerprint = self.pools.fingerprint
        self.leader = LeadingReceiver(fingerprint, "decode-0", 1, config, self.events)
        metrics = TransferMetrics(self.registry)
        self.receivers = [
            Receiver(
                self.pools.memories[rank],
                self.pools.layout,
                fingerprint,
                "decode-0",
                1,
                config,
                metrics,
                self.leader,
                rank=rank,
            )
            for rank in range(degree)
        ]
        self._control = ControlServer(self.leader)
        for receiver in self.receivers:
            receiver.listen("127.0.0.1")
        self.leader.lead([channel(receiver) for receiver in self.receivers], self._control.address)

    def reserve(
        self, ref: AttemptRef, *blocks: tuple[int, int, Sequence[int]], num_blocks: int = 16
    ) -> transfer_pb2.Ticket:
        return self.leader.reserve(ref, num_blocks * self.pools.layout.block_size, 0, blocks)

    def close(self) -> None:
        for receiver in self.receivers:
            receiver.close()
        self._control.close()


class PrefillRanks:
    """A prefill worker.

    Args:
        faults: the `load` of single ranks.
        heads: of single ranks, where they are not what they should be.
    """

    def __init__(
        self,
        config: TransferConfig,
        layout: KVLayout,
        degree: int,
        num_blocks: int = 32,
        *,
        worker: str = "prefill-0",
        faults: Mapping[int, Callable[[str], Transport]] | None = None,
        heads: Mapping[int, HeadRange] | None = None,
    ) -> None:
        self.pools = Pools(config, layout, degree, num_blocks, seed=2, heads=heads)
        self.registry = CollectorRegistry()
        metrics = TransferMetrics(self.registry)
        self.senders = [
            Sender(
                self.pools.memories[rank],
                self.pools.layout,
                self.pools.fingerprint,
                worker,
                2,
                config,
                metrics,
                rank=rank,
                load=(faults or {}).get(rank, transports.load),
            )
            for rank in range(degree)
        ]
        self.leader = LeadingSender(self.senders[0])
        self.followers = [FollowingSender(sender, self.leader) for sender in self.senders[1:]]
        self.leader.lead(self.followers)

    def open(self, ticket: transfer_pb2.Ticket) -> RanksSending:
        return RanksSending(self, ticket)

    def close(self) -> None:
        self.leader.close()
        for sender in self.senders[1:]:
            sender.close()


class RanksSending:
    """A push of all ranks and its outcome."""

    def __init__(self, side: PrefillRanks, ticket: transfer_pb2.Ticket) -> None:
        self._side = side
        self._done = threading.Event()
        self.outcomes: list[BatonError | None] = []
        self.push = side.leader.open(ticket, self._on_done)

    def send(self, group: int, slot: int, first_block: int, block_ids: Sequence[int], *, without: int = -1) -> None:
        """What a step does in every rank, but in rank `without`."""
        if without != 0:
            self.push.send(group, slot, first_block, block_ids)
        for rank, follower in enumerate(self._side.followers, start=1):
            if rank != without:
                follower.send(self.push.number, group, slot, first_block, block_ids)

    def send_all(self, group: int, first_block: int, block_ids: Sequence[int]) -> None:
        for slot in range(len(self._side.pools.layout.groups[group].layers)):
            self.send(group, slot, first_block, block_ids)

    def commit(self) -> None:
        self.push.commit([transfer_pb2.FirstToken(choice=0, token_id=7)])

    def outcome(self) -> BatonError | None:
        """Waits for `on_done`, which comes once."""
        assert self._done.wait(WAIT_S), "on_done was not called"
        assert len(self.outcomes) == 1
        return self.outcomes[0]

    def _on_done(self, push: LeadingPush, error: BatonError | None) -> None:
        self.outcomes.append(error)
        self._done.set()
