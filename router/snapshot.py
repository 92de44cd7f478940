"""What the router knows of the cluster at one moment: plain frozen data, made by `membership`, read by `placement`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from baton.hashing import HASH_BYTES

# A worker names a cached block by its hash and its group; prefixes are looked up in the first group.
_FIRST_GROUP = bytes(4)
_COMPACT_AT = 1024


class WorkerKey(NamedTuple):
    """One incarnation of a worker."""

    name: str
    epoch: int


class PrefixView:
    """The hashes of one worker's cached blocks: immutable, and cheap to derive the next one from.

    A large base is shared between versions; only the small difference to it is copied, and folded in when it has grown.
    """

    __slots__ = ("_added", "_base", "_removed")

    def __init__(
        self,
        base: frozenset[bytes] = frozenset(),
        added: frozenset[bytes] = frozenset(),
        removed: frozenset[bytes] = frozenset(),
    ) -> None:
        self._base = base
        self._added = added
        self._removed = removed

    @classmethod
    def of_keys(cls, keys: Iterable[bytes]) -> PrefixView:
        """From the keys (hash || group as 4 bytes, big-endian) of a snapshot."""
        return cls(_first_group(keys))

    def updated(self, stored: Iterable[bytes], removed: Iterable[bytes]) -> PrefixView:
        """The view after these keys were removed and then those stored."""
        came, went = _first_group(stored), _first_group(removed)
        if not came and not went:
            return self
        now_added = (self._added - went) | came
        now_removed = (self._removed | went) - came
        if len(now_added) + len(now_removed) < _COMPACT_AT:
            return PrefixView(self._base, now_added, now_removed)
        return PrefixView((self._base - now_removed) | now_added)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._added or (block_hash in self._base and block_hash not in self._removed)

    @property
    def num_blocks(self) -> int:
        """How many blocks are cached; takes time in proportion to the difference to the base."""
        num_added = sum(block_hash not in self._base for block_hash in self._added)
        return len(self._base) + num_added - sum(block_hash in self._base for block_hash in self._removed)

    def num_leading(self, block_hashes: Sequence[bytes]) -> int:
        """How many of a prompt's blocks are cached, counted from the first up to the first that is not."""
        for index, block_hash in enumerate(block_hashes):
            if block_hash not in self:
                return index
        return len(block_hashes)


def _first_group(keys: Iterable[bytes]) -> frozenset[bytes]:
    return frozenset(key[:HASH_BYTES] for key in keys if key[HASH_BYTES:] == _FIRST_GROUP)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker as placement and status reports see it.

    Attributes:
        num_groups: layer groups of the KV cache, each with blocks of its own.
        connected: all streams to the worker are up.
        queued_tokens: prompt tokens that it has accepted to compute and not computed yet.
        token_credit: prompt tokens that a prefill worker takes before it must be left alone.
    """

    key: WorkerKey
    role: str
    address: str = ""
    metrics_address: str = ""
    rank_metrics_addresses: tuple[str, ...] = ()
    pid: int = 0
    block_size: int = 16
    num_groups: int = 1
    connected: bool = False
    draining: bool = False
    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    queued_tokens: int = 0
    token_credit: int = 0
    cached: PrefixView = dataclasses.field(default_factory=PrefixView)

    @property
    def usable(self) -> bool:
        """Whether new requests may go there."""
        return self.connected and not self.draining

    @property
    def idle(self) -> bool:
        """Whether it holds nothing, and so has nothing new to say."""
        return not self.running and not self.waiting and self.free_blocks == self.total_blocks


@dataclasses.dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """All workers; `version` rises with each change of any of them."""

    version: int = 0
    prefill: tuple[WorkerView, ...] = ()
    decode: tuple[WorkerView, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether a request can be served: a worker of each role is connected."""
        return any(view.connected for view in self.prefill) and any(view.connected for view in self.decode)

    @property
    def idle(self) -> bool:
        """Whether no worker that may be used holds anything, for any router."""
        return all(view.idle for view in (*self.prefill, *self.decode) if view.usable)

    @property
    def has_decode_worker(self) -> bool:
        return any(view.usable for view in self.decode)
