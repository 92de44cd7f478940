"""What every row of the transports table must do."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from baton.config import TransferConfig
from baton.errors import StaleAttemptError, TransferError, UnavailableError
from engine.kv.layout import NULL_BLOCK, KVGroup, KVLayout
from kvtransfer.transports import cuda_ipc
from tests.kvtransfer.sides import DecodeSide, PrefillSide, Sending, ref, sample, small

MakeDecode = Callable[..., DecodeSide]
MakePrefill = Callable[..., PrefillSide]
Blocks = list[tuple[int, int, list[int]]]


def random_layout(rng: random.Random) -> KVLayout:
    num_groups = rng.randint(1, 3)
    groups = []
    layer = 0
    for index in range(num_groups):
        size = rng.randint(1, 4)
        groups.append(KVGroup(tuple(range(layer, layer + size)), window=None if index == 0 else 16 * index))
        layer += size
    return KVLayout(
        groups=tuple(groups),
        num_kv_heads=rng.randint(1, 3),
        head_dim=rng.choice([1, 3, 8]),
        block_size=rng.choice([1, 4, 8]),
        dtype=rng.choice([torch.float32, torch.bfloat16]),
    )


class Request:
    """Blocks of one request in both pools: the receiver wants a part of what the sender sends."""

    def __init__(self, rng: random.Random, layout: KVLayout, free: tuple[list[int], list[int]]) -> None:
        self.num_blocks = rng.randint(1, 12)
        self.sent: Blocks = []
        self.wanted: Blocks = []
        for group in range(len(layout.groups)):
            source = [free[0].pop() for _ in range(self.num_blocks)]
            self.sent.append((group, 0, source))
            first = rng.randint(0, self.num_blocks)
            if first < self.num_blocks:
                self.wanted.append((group, first, [free[1].pop() for _ in range(self.num_blocks - first)]))

    def send(self, rng: random.Random, layout: KVLayout, sending: Sending) -> None:
        """Sends every page in pieces of random size, groups and slots in random order."""
        pieces = []
        for group, _, block_ids in self.sent:
            for slot in range(len(layout.groups[group].layers)):
                start = 0
                while start < self.num_blocks:
                    stop = rng.randint(start + 1, self.num_blocks)
                    pieces.append((group, slot, start, block_ids[start:stop]))
                    start = stop
        rng.shuffle(pieces)
        for piece in pieces:
            sending.push.send(*piece)

    def copy(self, layout: KVLayout, source: np.ndarray, target: np.ndarray) -> None:
        """What the transfer is to do."""
        sent = {group: block_ids for group, _, block_ids in self.sent}
        for group, first, block_ids in self.wanted:
            for slot in range(len(layout.groups[group].layers)):
                target[slot, block_ids] = source[slot, sent[group][first:]]


@pytest.mark.parametrize("seed", range(6))
def test_interleaved_pushes_fill_exactly_the_reserved_blocks(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill, seed: int
) -> None:
    rng = random.Random(seed)
    layout = random_layout(rng)
    num_blocks = 8 * 12 * len(layout.groups) + 1
    decode = make_decode(config, layout, num_blocks)
    prefill = make_prefill(config, layout, num_blocks)
    free = (list(range(1, num_blocks)), list(range(1, num_blocks)))
    for ids in free:
        # Half scattered, half in runs.
        head = ids[: num_blocks // 2]
        rng.shuffle(head)
        ids[: num_blocks // 2] = head
    requests = {ref(f"r{index}"): Request(rng, layout, free) for index in range(8)}

    sendings = {
        name: prefill.open(decode.reserve(name, *request.wanted, num_blocks=request.num_blocks))
        for name, request in requests.items()
    }
    for name, request in requests.items():
        request.send(rng, layout, sendings[name])
    order = list(requests)
    rng.shuffle(order)
    for name in order:
        sendings[name].commit()
    assert [sendings[name].outcome() for name in order] == [None] * len(order)

    expected = decode.before.copy()
    for request in requests.values():
        request.copy(layout, prefill.pages, expected)
    np.testing.assert_array_equal(decode.pages, expected)
    np.testing.assert_array_equal(decode.pages[:, NULL_BLOCK], decode.before[:, NULL_BLOCK])

    rng.shuffle(order)
    for name in order:
        decode.leader.release(name)
        decode.events.wait("released", name)
        assert decode.events.of(name) == ["committed", "released"]
        assert [token.token_id for token in decode.events.first_tokens[name]] == [7]
    assert sample(decode.registry, "baton_kv_reservations") == 0


def test_what_was_moved_is_counted_under_the_transport(
    transport: str, config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    decode, prefill = make_decode(config), make_prefill(config)
    sending = prefill.open(decode.reserve(ref("a"), (0, 0, [5, 6]), (1, 1, [9])))
    sending.send_all(0, 0, [1, 2])
    sending.send_all(1, 0, [3, 4])
    sending.commit()
    assert sending.outcome() is None

    num_bytes = (2 * 3 + 1 * 2) * decode.layout.page_bytes
    assert sending.push.transport == transport
    assert sending.push.bytes_sent == num_bytes
    assert sending.push.transfer_s >= sending.push.sending_s > 0
    assert sample(prefill.registry, "baton_kv_sent_bytes_total", transport=transport) == num_bytes
    assert sample(decode.registry, "baton_kv_received_bytes_total", transport=transport) == num_bytes
    assert sample(prefill.registry, "baton_kv_transfer_seconds_count", transport=transport) == 1
    assert sample(prefill.registry, "baton_kv_transfer_bytes_per_second_count", transport=transport) == 1


def test_a_full_cache_hit_needs_only_a_commit(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    decode, prefill = make_decode(config), make_prefill(config)
    sending = prefill.open(decode.reserve(ref("a")))
    sending.send_all(0, 0, [1, 2])
    sending.commit()
    assert sending.outcome() is None
    assert sending.push.bytes_sent == 0
    assert decode.events.of(ref("a")) == ["committed"]
    np.testing.assert_array_equal(decode.pages, decode.before)


def test_pages_larger_than_a_frame_travel_one_by_one(
    transport: str, make_decode: MakeDecode, make_prefill: MakePrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_ipc, "MAX_HEADS", 1)
    config = small(transport, frame_bytes=1, ring_bytes=1)
    decode, prefill = make_decode(config), make_prefill(config)
    sending = prefill.open(decode.reserve(ref("a"), (0, 0, [5, 6, 7, 8])))
    sending.send_all(0, 0, [1, 2, 4, 3])
    sending.commit()
    assert sending.outcome() is None
    assert sending.push.num_frames == 4 * 3
    np.testing.assert_array_equal(decode.pages[:, [5, 6, 7, 8]], prefill.pages[:, [1, 2, 4, 3]])


def test_consecutive_pages_share_a_frame(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    decode, prefill = make_decode(config), make_prefill(config)
    sending = prefill.open(decode.reserve(ref("a"), (1, 0, list(range(1, 11)))))
    sending.send_all(1, 0, list(range(1, 11)))
    sending.commit()
    assert sending.outcome() is None
    pages_per_frame = config.frame_bytes // decode.layout.page_bytes
    assert sending.push.num_frames == 2 * -(-10 // pages_per_frame)


def test_an_uncovered_page_fails_the_commit(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    decode, prefill = make_decode(config), make_prefill(config)
    sending = prefill.open(decode.reserve(ref("a"), (0, 0, [5, 6])))
    sending.push.send(0, 0, 0, [1, 2])
    sending.push.send(0, 1, 0, [1, 2])
    sending.push.send(0, 2, 0, [1])
    sending.commit()
    error = sending.outcome()
    assert isinstance(error, TransferError)
    assert "1 pages are missing" in error.message
    assert decode.events.of(ref("a")) == ["aborted"]


def test_an_abort_reaches_the_receiver(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    decode, prefill = make_decode(config), make_prefill(config)
    sending = prefill.open(decode.reserve(ref("a"), (0, 0, [5, 6])))
    sending.send_all(0, 0, [1, 2])
    sending.push.abort("the first token ended the choice")
    sending.push.abort("again")
    assert isinstance(sending.outcome(), TransferError)
    decode.events.wait("aborted", ref("a"))
    assert decode.events.reasons[ref("a")].endswith("the first token ended the choice")
    decode.leader.release(ref("a"))
    decode.events.wait("released", ref("a"))
    assert decode.events.of(ref("a")) == ["aborted", "released"]
    assert len(sending.outcomes) == 1


def test_a_push_to_a_released_reservation_is_stale(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    decode, prefill = make_decode(config), make_prefill(config)
    ticket = decode.reserve(ref("a"), (0, 0, [5, 6]))
    decode.leader.release(ref("a"))
    assert isinstance(prefill.open(ticket).outcome(), StaleAttemptError)
    assert decode.events.of(ref("a")) == ["released"]


def test_the_same_link_serves_one_push_after_another(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    decode, prefill = make_decode(config), make_prefill(config)
    for index in range(20):
        name = ref(f"r{index}")
        sending = prefill.open(decode.reserve(name, (0, 0, [5, 6, 7])))
        sending.send_all(0, 0, [index + 1, index + 2, index + 3])
        sending.commit()
        assert sending.outcome() is None
        np.testing.assert_array_equal(decode.pages[:, 5:8], prefill.pages[:, index + 1 : index + 4])
        decode.leader.release(name)


def test_a_receiver_that_went_away_fails_the_push_and_its_successor_is_reached(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    first = make_decode(config, epoch=1)
    prefill = make_prefill(config)
    under_way = prefill.open(first.reserve(ref("a"), (0, 0, [5, 6])))
    under_way.send_all(0, 0, [1, 2])
    later = first.reserve(ref("b"), (0, 0, [7, 8]))
    first.close()
    under_way.commit()
    assert isinstance(under_way.outcome(), UnavailableError)
    assert isinstance(prefill.open(later).outcome(), UnavailableError)

    second = make_decode(config, epoch=2)
    sending = prefill.open(second.reserve(ref("a", attempt=1), (0, 0, [5, 6])))
    sending.send_all(0, 0, [1, 2])
    sending.commit()
    assert sending.outcome() is None


def test_closing_the_sender_ends_its_pushes(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    decode, prefill = make_decode(config), make_prefill(config)
    ticket = decode.reserve(ref("a"), (0, 0, [5, 6]))
    sending = prefill.open(ticket)
    sending.send_all(0, 0, [1, 2])
    prefill.close()
    assert isinstance(sending.outcome(), UnavailableError)
    with pytest.raises(UnavailableError):
        prefill.open(ticket)
    decode.leader.release(ref("a"))
    decode.events.wait("released", ref("a"))
