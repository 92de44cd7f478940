"""KV between workers of different degrees: every rank gets its heads of every page, from whichever ranks have them."""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from baton.errors import LayoutMismatchError, StaleAttemptError, TransferError, UnavailableError
from baton.internal.v1 import transfer_pb2
from baton.requests import AttemptRef
from engine.kv.layout import KVGroup, KVLayout
from kvtransfer.pages import HeadRange
from kvtransfer.ranks import LackingBlocks
from kvtransfer.receiver import Receiver
from kvtransfer.reservation import Origin
from tests.kvtransfer import faults
from tests.kvtransfer.faults import FaultyTransports
from tests.kvtransfer.frames import open_request
from tests.kvtransfer.sides import WAIT_S, ref, sample, small
from tests.kvtransfer.worker_ranks import DecodeRanks, PrefillRanks, RanksSending

A, B = ref("a"), ref("b")
LAYOUT = KVLayout(
    groups=(KVGroup((0, 2, 4)), KVGroup((1, 3), window=32)),
    num_kv_heads=4,
    head_dim=4,
    block_size=4,
    dtype=torch.float32,
)
LOOPBACK = small("loopback")
DEGREES = (1, 2, 4)


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    """Makes workers that end with the test."""
    sides: list[DecodeRanks | PrefillRanks] = []

    def make(kind: type[DecodeRanks] | type[PrefillRanks], *args: Any, **kwargs: Any) -> DecodeRanks | PrefillRanks:
        sides.append(kind(*args, **kwargs))
        return sides[-1]

    yield make
    for side in reversed(sides):
        side.close()


@pytest.mark.parametrize(("prefill_degree", "decode_degree"), list(itertools.product(DEGREES, DEGREES)))
@pytest.mark.parametrize(("transport", "num_kv_heads"), [("loopback", 4), ("loopback", 8), ("shm", 4), ("cuda_ipc", 4)])
def test_any_degree_sends_to_any_degree(
    make: Callable[..., Any], transport: str, num_kv_heads: int, prefill_degree: int, decode_degree: int
) -> None:
    rng = random.Random(f"{num_kv_heads} {prefill_degree} {decode_degree}")
    layout = dataclasses.replace(LAYOUT, num_kv_heads=num_kv_heads, head_dim=rng.choice([1, 4, 64]))
    config = small(transport)
    decode = make(DecodeRanks, config, layout, decode_degree)
    prefill = make(PrefillRanks, config, layout, prefill_degree)
    expected, whole = decode.pools.before.copy(), prefill.pools.joined()
    # Two requests beside each other, of which the receiver has some leading blocks.
    sources, targets = (iter(rng.sample(range(1, 32), 28)) for _ in range(2))
    sendings: dict[AttemptRef, RanksSending] = {}
    runs: list[tuple[AttemptRef, tuple[int, int, int, list[int]]]] = []
    for name in (A, B):
        num_blocks = rng.randint(2, 7)
        cached = rng.randint(0, num_blocks)
        blocks = []
        for group, layers in enumerate(layout.groups):
            source = list(itertools.islice(sources, num_blocks))
            target = list(itertools.islice(targets, num_blocks - cached))
            blocks.append((group, cached, target))
            for slot in range(len(layers.layers)):
                expected[slot, target] = whole[slot, source[cached:]]
                cut = rng.randint(1, num_blocks - 1)
                runs += [(name, (group, slot, 0, source[:cut])), (name, (group, slot, cut, source[cut:]))]
        sendings[name] = prefill.open(decode.reserve(name, *blocks, num_blocks=num_blocks))
    rng.shuffle(runs)
    for name, run in runs:
        sendings[name].send(*run)
    for sending in sendings.values():
        sending.commit()
    assert [sending.outcome() for sending in sendings.values()] == [None, None]
    np.testing.assert_array_equal(decode.pools.joined(), expected)

    for name, sending in sendings.items():
        assert sending.push.transport == transport
        decode.leader.release(name)
        decode.events.wait("released", name)
        assert decode.events.of(name) == ["committed", "released"]
        assert [token.token_id for token in decode.events.first_tokens[name]] == [7]
    assert sample(decode.registry, "baton_kv_reservations") == 0
    num_bytes = sum(sending.push.bytes_sent for sending in sendings.values())
    assert sample(decode.registry, "baton_kv_received_bytes_total", transport=transport) == num_bytes
    assert sample(prefill.registry, "baton_kv_sent_bytes_total", transport=transport) == num_bytes


@pytest.mark.parametrize(("prefill_degree", "decode_degree"), [(1, 4), (4, 1), (2, 2), (2, 4)])
def test_each_pair_of_ranks_that_share_heads_has_one_link_and_no_other(
    make: Callable[..., Any], prefill_degree: int, decode_degree: int
) -> None:
    decode = make(DecodeRanks, LOOPBACK, LAYOUT, decode_degree)
    prefill = make(PrefillRanks, LOOPBACK, LAYOUT, prefill_degree)
    ticket = decode.reserve(A)
    prefill.leader.warm(ticket)
    sending = prefill.open(ticket)
    sending.commit()
    assert sending.outcome() is None
    links = [key[-1] for sender in prefill.senders for key in sender._links]
    ways = max(prefill_degree, decode_degree)
    assert links == [way * decode_degree // ways for way in range(ways)]


# What one rank does wrong


@pytest.mark.parametrize(
    ("prefill_degree", "decode_degree", "rank"), [(1, 2, 0), (2, 1, 0), (2, 1, 1), (2, 2, 1), (4, 2, 3)]
)
def test_a_rank_whose_stream_breaks_fails_the_push_of_all(
    make: Callable[..., Any], prefill_degree: int, decode_degree: int, rank: int
) -> None:
    decode = make(DecodeRanks, LOOPBACK, LAYOUT, decode_degree)
    breaks = {rank: FaultyTransports(faults.at(1, faults.break_stream))}
    prefill = make(PrefillRanks, LOOPBACK, LAYOUT, prefill_degree, faults=breaks)
    sending = prefill.open(decode.reserve(A, (0, 0, [5, 6])))
    sending.send_all(0, 0, [1, 2])
    sending.commit()
    assert isinstance(sending.outcome(), UnavailableError)
    decode.events.wait("aborted", A)
    decode.leader.release(A)
    decode.events.wait("released", A)
    assert decode.events.of(A) == ["aborted", "released"]
    outside = np.setdiff1d(np.arange(32), [5, 6])
    np.testing.assert_array_equal(decode.pools.joined()[:, outside], decode.pools.before[:, outside])


def test_a_late_rank_leaves_the_blocks_of_their_new_owner_alone(make: Callable[..., Any]) -> None:
    reading, go_on = threading.Event(), threading.Event()
    slow = {1: FaultyTransports(faults.at(1, faults.hold(reading, go_on)))}
    decode = make(DecodeRanks, LOOPBACK, LAYOUT, 1)
    prefill = make(PrefillRanks, LOOPBACK, LAYOUT, 2, faults=slow)
    other = make(PrefillRanks, LOOPBACK, LAYOUT, 4, worker="prefill-1")
    late = prefill.open(decode.reserve(A, (0, 0, [5, 6])))
    late.send_all(0, 0, [1, 2])
    assert reading.wait(WAIT_S)
    decode.leader.release(A)
    decode.events.wait("released", A)
    owner = other.open(decode.reserve(B, (0, 0, [5, 6])))
    owner.send_all(0, 0, [3, 4])
    owner.commit()
    assert owner.outcome() is None
    owned = decode.pools.joined()

    go_on.set()
    late.commit()
    assert isinstance(late.outcome(), StaleAttemptError)
    np.testing.assert_array_equal(decode.pools.joined(), owned)
    np.testing.assert_array_equal(owned[:, [5, 6]], other.pools.joined()[:, [3, 4]])
    assert decode.events.log == [("released", A), ("committed", B)]


@pytest.mark.parametrize(("prefill_degree", "decode_degree"), [(2, 1), (2, 2), (2, 4)])
def test_a_rank_that_gives_up_fails_the_push_of_all(
    make: Callable[..., Any], prefill_degree: int, decode_degree: int
) -> None:
    decode = make(DecodeRanks, LOOPBACK, LAYOUT, decode_degree)
    prefill = make(PrefillRanks, LOOPBACK, LAYOUT, prefill_degree)
    sending = prefill.open(decode.reserve(A, (0, 0, [5, 6])))
    sending.send_all(0, 0, [1, 2])
    prefill.followers[0].abort(sending.push.number, "enough")
    error = sending.outcome()
    assert isinstance(error, TransferError)
    assert "enough" in error.message
    decode.events.wait("aborted", A)
    assert sending.outcomes == [error]
    # The leader's word that all was sent may still be under way.
    sending.commit()


@pytest.mark.parametrize("decode_degree", [1, 2])
def test_a_page_that_one_rank_does_not_send_fails_the_commit(make: Callable[..., Any], decode_degree: int) -> None:
    decode = make(DecodeRanks, LOOPBACK, LAYOUT, decode_degree)
    prefill = make(PrefillRanks, LOOPBACK, LAYOUT, 2)
    sending = prefill.open(decode.reserve(A, (1, 0, [5, 6])))
    sending.send(1, 0, 0, [1, 2])
    sending.send(1, 1, 0, [1, 2], without=1)
    sending.commit()
    error = sending.outcome()
    assert isinstance(error, TransferError)
    assert "2 pages are missing" in error.message
    decode.events.wait("aborted", A)
    decode.leader.release(A)
    decode.events.wait("released", A)
    assert decode.events.of(A) == ["aborted", "released"]


@pytest.mark.parametrize("decode_degree", [1, 2])
def test_two_ranks_with_the_same_heads_fail_the_push(make: Callable[..., Any], decode_degree: int) -> None:
    decode = make(DecodeRanks, LOOPBACK, LAYOUT, decode_degree)
    prefill = make(PrefillRanks, LOOPBACK, LAYOUT, 2, heads={1: HeadRange(0, 2)})
    sending = prefill.open(decode.reserve(A, (0, 0, [5, 6])))
    sending.send_all(0, 0, [1, 2])
    sending.commit()
    error = sending.outcome()
    assert isinstance(error, StaleAttemptError)
    assert "open for prefill-0, rank" in error.message
    assert "committed" not in decode.events.of(A)


def test_a_worker_without_some_heads_never_commits(make: Callable[..., Any]) -> None:
    decode = make(DecodeRanks, LOOPBACK, LAYOUT, 1)
    half = make(PrefillRanks, LOOPBACK, dataclasses.replace(LAYOUT, num_kv_heads=4), 2)
    sending = half.open(decode.reserve(A, (0, 0, [5])))
    sending.send(0, 0, 0, [1])
    sending.send(0, 1, 0, [1])
    sending.send(0, 2, 0, [1])
    sending.push._own.commit([])
    # The rank that has sent all is done, and the other is waited for.
    assert decode.events.of(A) == []
    sending.push.abort("the follower is gone")
    assert isinstance(sending.outcome(), TransferError)
    decode.events.wait("aborted", A)


def test_degrees_may_differ_and_heads_may_not(make: Callable[..., Any]) -> None:
    decode = make(DecodeRanks, LOOPBACK, LAYOUT, 2)
    prefill = make(PrefillRanks, LOOPBACK, dataclasses.replace(LAYOUT, num_kv_heads=8), 2)
    with pytest.raises(LayoutMismatchError, match="num_kv_heads is 8 here and 4 at the peer"):
        prefill.open(decode.reserve(A, (0, 0, [5])))


def test_a_push_to_a_released_reservation_is_stale_in_every_rank(make: Callable[..., Any]) -> None:
    decode = make(DecodeRanks, LOOPBACK, LAYOUT, 4)
    prefill = make(PrefillRanks, LOOPBACK, LAYOUT, 2)
    ticket = decode.reserve(A, (0, 0, [5, 6]))
    decode.leader.release(A)
    assert isinstance(prefill.open(ticket).outcome(), StaleAttemptError)
    assert decode.events.of(A) == ["released"]


# The ticket may overtake the leader's word to its followers


class SlowChannel:
    """The leader's word to a follower waits until `arrive`."""

    def __init__(self, receiver: Receiver) -> None:
        self.shard = receiver.shard
        self.release = receiver.release
        self.abort = receiver.abort
        self._receiver = receiver
        self._held: list[tuple[int, Any, LackingBlocks]] = []

    def reserve(self, reservation: int, ref: Any, blocks: LackingBlocks) -> None:
        if self._receiver.rank:
            self._held.append((reservation, ref, blocks))
        else:
            self._receiver.reserve(reservation, ref, blocks)

    def arrive(self) -> None:
        for message in self._held:
            self._receiver.reserve(*message)


@pytest.fixture
def channels() -> list[SlowChannel]:
    return []


@pytest.fixture
def behind(make: Callable[..., Any], channels: list[SlowChannel]) -> DecodeRanks:
    """A decode worker of two ranks, of which the second has not heard of any reservation yet."""

    def channel(receiver: Receiver) -> SlowChannel:
        channels.append(SlowChannel(receiver))
        return channels[-1]

    decode = make(DecodeRanks, LOOPBACK, LAYOUT, 2, channel=channel)
    assert isinstance(decode, DecodeRanks)
    return decode


def test_an_open_that_overtakes_the_leader_waits_for_it(
    make: Callable[..., Any], behind: DecodeRanks, channels: list[SlowChannel], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()
    open_it = behind.receivers[1].open

    def tell_and_open(request: transfer_pb2.OpenRequest, origin: Origin) -> None:
        asked.set()
        open_it(request, origin)

    monkeypatch.setattr(behind.receivers[1], "open", tell_and_open)
    prefill = make(PrefillRanks, LOOPBACK, LAYOUT, 1)
    sending = prefill.open(behind.reserve(A, (0, 0, [5, 6])))
    sending.send_all(0, 0, [1, 2])
    sending.commit()
    assert asked.wait(WAIT_S)
    assert behind.events.of(A) == []
    channels[1].arrive()
    assert sending.outcome() is None
    np.testing.assert_array_equal(behind.pools.joined()[:, [5, 6]], prefill.pools.joined()[:, [1, 2]])
    assert behind.events.of(A) == ["committed"]


def test_an_open_that_waits_ends_with_the_receiver(behind: DecodeRanks) -> None:
    follower = behind.receivers[1]
    ticket = behind.reserve(A)
    closing = threading.Thread(target=follower.close)
    closing.start()
    with pytest.raises(UnavailableError):
        follower.open(open_request(ticket, first_head=2, num_heads=2), Origin("prefill-0", 2))
    closing.join()


def test_a_leaders_receiver_waits_for_nobody(behind: DecodeRanks) -> None:
    ticket = behind.reserve(A)
    with pytest.raises(StaleAttemptError):
        behind.receivers[0].open(open_request(ticket, reservation=ticket.reservation + 1), Origin("prefill-0", 2))
