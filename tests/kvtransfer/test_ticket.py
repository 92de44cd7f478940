from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import pytest
import torch

from baton.errors import InvalidRequestError, LayoutMismatchError
from baton.internal.v1 import transfer_pb2
from engine.kv.layout import KVGroup
from kvtransfer.ticket import check_layouts, check_ticket, layout_fingerprint, overlaps
from tests.kvtransfer.sides import HYBRID

OURS = layout_fingerprint(HYBRID, model="llama", revision="main")


def test_equal_layouts_agree() -> None:
    check_layouts(OURS, layout_fingerprint(dataclasses.replace(HYBRID), model="llama", revision="main"))


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        (layout_fingerprint(HYBRID, model="qwen", revision="main"), "model is 'llama' here and 'qwen' at the peer"),
        (layout_fingerprint(HYBRID, model="llama", revision="dev"), "revision"),
        (layout_fingerprint(HYBRID, model="llama", revision="main", codec="fp8"), "codec is 'raw' here and 'fp8'"),
        (
            layout_fingerprint(dataclasses.replace(HYBRID, dtype=torch.bfloat16), model="llama", revision="main"),
            "dtype is 'float32' here and 'bfloat16' at the peer",
        ),
        (
            layout_fingerprint(dataclasses.replace(HYBRID, block_size=16), model="llama", revision="main"),
            "block_size is 8 here and 16 at the peer",
        ),
        (
            layout_fingerprint(dataclasses.replace(HYBRID, num_kv_heads=2), model="llama", revision="main"),
            "num_kv_heads",
        ),
        (layout_fingerprint(dataclasses.replace(HYBRID, head_dim=8), model="llama", revision="main"), "head_dim"),
    ],
)
def test_a_difference_is_named(theirs: transfer_pb2.LayoutFingerprint, named: str) -> None:
    with pytest.raises(LayoutMismatchError, match=named):
        check_layouts(OURS, theirs)


def test_every_difference_is_named() -> None:
    other = dataclasses.replace(HYBRID, groups=(KVGroup((0, 1)),), block_size=16)
    with pytest.raises(LayoutMismatchError) as raised:
        check_layouts(OURS, layout_fingerprint(other, model="qwen"))
    for name in ("model", "revision", "block_size", "num_layers", "groups"):
        assert f"{name} is " in raised.value.message
    assert "['full:0,2,4', 'sliding(32):1,3'] here and ['full:0,1'] at the peer" in raised.value.message
    for name in ("dtype", "codec", "num_kv_heads", "head_dim"):
        assert f"{name} is " not in raised.value.message


# (first_head, num_heads, number of offers) of each rank.
Shards: TypeAlias = Sequence[tuple[int, int, int]]
WHOLE: Shards = ((0, 4, 1),)


def ticket(*ranges: tuple[int, int, int], reservation: int = 1, shards: Shards = WHOLE) -> transfer_pb2.Ticket:
    return transfer_pb2.Ticket(
        reservation=reservation,
        num_tokens=75,
        layout=transfer_pb2.LayoutFingerprint(num_kv_heads=4),
        shards=[
            transfer_pb2.Shard(
                first_head=first, num_heads=count, offers=[transfer_pb2.TransportOffer(transport="grpc")] * num_offers
            )
            for first, count, num_offers in shards
        ],
        ranges=[transfer_pb2.BlockRange(group=g, first_block=f, num_blocks=n) for g, f, n in ranges],
    )


def test_a_ticket_may_ask_for_any_blocks_of_its_tokens() -> None:
    check_ticket(ticket(), HYBRID)
    check_ticket(ticket(shards=[(0, 2, 1), (2, 2, 2)]), HYBRID)
    check_ticket(ticket((0, 0, 10), (1, 4, 2), (1, 6, 4), (1, 0, 3)), HYBRID)


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (ticket(reservation=0), "ticket.reservation: is missing"),
        (ticket(shards=[]), "ticket.shards: 0 ranks hold 0 of 4 heads"),
        (ticket(shards=[(0, 4, 0)]), "ticket.shards: rank 0 makes no offer"),
        (ticket(shards=[(0, 2, 1), (2, 2, 0)]), "ticket.shards: rank 1 makes no offer"),
        (ticket(shards=[(0, 2, 1)]), "ticket.shards: 1 ranks hold 2 of 4 heads"),
        (ticket(shards=[(0, 2, 1), (2, 4, 1)]), "ticket.shards: 2 ranks hold 6 of 4 heads"),
        (ticket(shards=[(0, 2, 1), (1, 3, 1)]), r"rank 1 holds heads \[1, 4\), where head 2 comes next"),
        (ticket(shards=[(0, 2, 1), (3, 1, 1)]), r"rank 1 holds heads \[3, 4\), where head 2 comes next"),
        (ticket(shards=[(2, 2, 1), (0, 2, 1)]), r"rank 0 holds heads \[2, 4\), where head 0 comes next"),
        (ticket(shards=[(0, 4, 1), (4, 0, 1)]), r"rank 1 holds heads \[4, 4\), where head 4 comes next"),
        (ticket((2, 0, 1)), "the layout has 2 groups"),
        (ticket((0, 3, 8)), "8 blocks do not fit in 10"),
        (ticket((0, 3, 0)), "0 blocks do not fit"),
        (ticket((0, 3, 4), (0, 6, 1)), "overlaps another range"),
    ],
)
def test_a_ticket_that_makes_no_sense_is_refused(broken: transfer_pb2.Ticket, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        check_ticket(broken, HYBRID)


def test_overlaps_are_what_the_ranges_ask_for() -> None:
    ranges = ticket((0, 2, 3), (1, 0, 9), (0, 7, 2)).ranges
    assert overlaps(ranges, 0, 0, 10) == [(2, 5), (7, 9)]
    assert overlaps(ranges, 0, 3, 5) == [(3, 5), (7, 8)]
    assert overlaps(ranges, 0, 5, 2) == []
    assert overlaps(ranges, 2, 0, 10) == []
