"""What the sender makes of faults on the way, and what it refuses to begin with."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from baton.config import TransferConfig
from baton.errors import (
    BatonError,
    DuplicateRequestError,
    InvalidRequestError,
    LayoutMismatchError,
    StaleAttemptError,
    TransferError,
    UnavailableError,
)
from baton.requests import AttemptRef
from engine.kv.layout import KVGroup, KVLayout
from kvtransfer import pair_group, sources
from kvtransfer.group_source import GroupSource
from kvtransfer.link import Link
from kvtransfer.ring import SHM_DIR
from kvtransfer.transports.loopback import LoopbackControl
from tests.kvtransfer import faults
from tests.kvtransfer.faults import FaultyTransports
from tests.kvtransfer.sides import BUFFERED, HYBRID, WAIT_S, DecodeSide, PrefillSide, Sending, ref, sample, small

MakeDecode = Callable[..., DecodeSide]
MakePrefill = Callable[..., PrefillSide]
A, B, C = ref("a"), ref("b"), ref("c")


def push_blocks(
    prefill: PrefillSide, decode: DecodeSide, name: AttemptRef, target: list[int], source: list[int]
) -> Sending:
    """Three frames: one for each slot of group 0."""
    sending = prefill.open(decode.reserve(name, (0, 0, target)))
    sending.send_all(0, 0, source)
    return sending


# Faults on the way


def test_warming_connects_once_and_pushes_take_that_link(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Link] = []
    start = Link.start

    def start_and_tell(link: Link) -> None:
        started.append(link)
        start(link)

    monkeypatch.setattr(Link, "start", start_and_tell)
    decode, prefill = make_decode(config), make_prefill(config)
    ticket = decode.reserve(A, (0, 0, [5]))
    prefill.sender.warm(ticket)
    prefill.sender.warm(ticket)
    sending = prefill.open(ticket)
    sending.send_all(0, 0, [1])
    sending.commit()
    assert sending.outcome() is None
    assert len(started) == 1


def test_what_is_wrong_with_a_receiver_is_told_by_open_and_not_by_warming(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    decode, prefill = make_decode(config), make_prefill(config)
    ticket = decode.reserve(A, (0, 0, [5]))
    decode.close()
    prefill.sender.warm(ticket)
    sending = prefill.open(ticket)
    sending.commit()
    assert isinstance(sending.outcome(), UnavailableError)
    del ticket.shards[:]
    ticket.worker = "decode-1"
    prefill.sender.warm(ticket)
    with pytest.raises(InvalidRequestError):
        prefill.open(ticket)


@pytest.mark.parametrize("transport", BUFFERED)
def test_a_corrupt_frame_fails_its_push_and_no_other(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    decode = make_decode(config)
    bad: set[int] = set()
    prefill = make_prefill(
        config, load=FaultyTransports(lambda frame: faults.corrupt if frame.reservation in bad else None)
    )
    tickets = [decode.reserve(name, (0, 0, [10 + index])) for index, name in enumerate((A, B, C))]
    bad.add(tickets[1].reservation)
    sendings = [prefill.open(ticket) for ticket in tickets]
    for index, sending in enumerate(sendings):
        sending.send_all(0, 0, [1 + index])
    for sending in sendings:
        sending.commit()
    first, second, third = (sending.outcome() for sending in sendings)
    assert (first, third) == (None, None)
    assert isinstance(second, TransferError)
    assert "corrupt" in second.message
    assert decode.events.of(B) == ["aborted"]
    assert sample(decode.registry, "baton_kv_transfer_failures_total", reason="checksum") == 1
    assert sample(prefill.registry, "baton_kv_transfer_failures_total", reason="aborted") == 1


def test_a_lost_frame_fails_the_commit_in_time(
    transport: str, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    config = small(transport, timeout_s=0.3)
    decode, prefill = make_decode(config), make_prefill(config, load=FaultyTransports(faults.at(1, faults.drop)))
    sending = push_blocks(prefill, decode, A, [5, 6], [1, 2])
    sending.commit()
    assert isinstance(sending.outcome(), TransferError)
    decode.events.wait("aborted", A)
    assert decode.events.of(A) == ["aborted"]


def test_a_duplicate_frame_fails_the_push(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    decode, prefill = make_decode(config), make_prefill(config, load=FaultyTransports(faults.at(0, faults.duplicate)))
    sending = push_blocks(prefill, decode, A, [5, 6], [1, 2])
    error = sending.outcome()
    assert isinstance(error, TransferError)
    assert "came twice" in error.message
    assert decode.events.of(A) == ["aborted"]


def test_a_broken_stream_fails_all_pushes_of_the_link_and_the_next_has_a_new_one(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    decode = make_decode(config)
    healed = threading.Event()
    breaks = faults.at(1, faults.break_stream)
    prefill = make_prefill(config, load=FaultyTransports(lambda frame: None if healed.is_set() else breaks(frame)))
    sendings = [push_blocks(prefill, decode, name, [5 + index], [index + 1]) for index, name in enumerate((A, B))]
    assert all(isinstance(sending.outcome(), UnavailableError) for sending in sendings)
    for name in (A, B):
        # The receiver hears of it over the control path, and does not wait for the lease.
        decode.events.wait("aborted", name)
        decode.leader.release(name)
        decode.events.wait("released", name)
    healed.set()
    again = push_blocks(prefill, decode, C, [5, 6], [1, 2])
    again.commit()
    assert again.outcome() is None
    np.testing.assert_array_equal(decode.pages[:, [5, 6]], prefill.pages[:, [1, 2]])
    assert [len(sending.outcomes) for sending in (*sendings, again)] == [1, 1, 1]


def test_blocks_are_not_read_any_more_once_a_push_is_told_to_be_done(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    reading, go_on = threading.Event(), threading.Event()
    hold = faults.at(1, faults.hold(reading, go_on))
    decode, prefill = make_decode(config), make_prefill(config, load=FaultyTransports(hold))
    sending = push_blocks(prefill, decode, A, [5, 6], [1, 2])
    assert reading.wait(WAIT_S)
    sending.push.abort("cancelled")
    assert sending.outcomes == []
    go_on.set()
    assert isinstance(sending.outcome(), TransferError)
    assert sending.push.num_frames == 2


def test_a_delayed_frame_after_the_release_does_not_touch_the_new_owner(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on, refused = threading.Event(), threading.Event(), threading.Event()
    hold = faults.at(1, faults.hold(reading, go_on))
    decode = make_decode(config)
    write = decode.receiver.write

    def write_and_tell(*arguments: Any) -> list[BatonError | None]:
        refusals = write(*arguments)
        if any(isinstance(refusal, StaleAttemptError) for refusal in refusals):
            refused.set()
        return refusals

    monkeypatch.setattr(decode.receiver, "write", write_and_tell)
    slow = make_prefill(config, load=FaultyTransports(hold))
    fast = make_prefill(config, worker="prefill-1")
    late = push_blocks(slow, decode, A, [5, 6], [1, 2])
    assert reading.wait(WAIT_S)
    decode.leader.release(A)
    decode.events.wait("released", A)
    owner = push_blocks(fast, decode, B, [5, 6], [3, 4])
    owner.commit()
    assert owner.outcome() is None

    go_on.set()
    late.commit()
    assert late.outcome() is not None
    # The refused Commit may come back before the frame is looked at.
    assert refused.wait(WAIT_S)
    np.testing.assert_array_equal(decode.pages[:, [5, 6]], fast.pages[:, [3, 4]])
    assert sample(decode.registry, "baton_kv_stale_frames_total") >= 1
    assert decode.events.log == [("released", A), ("committed", B)]


def test_a_receiver_that_stops_acknowledging_breaks_the_link(
    make_decode: MakeDecode, make_prefill: MakePrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small("grpc", timeout_s=0.5)
    decode, prefill = make_decode(config), make_prefill(config)
    go_on = threading.Event()
    monkeypatch.setattr(decode.receiver, "write", lambda *args: None if go_on.wait(WAIT_S) else args)
    sending = push_blocks(prefill, decode, A, [5, 6], [1, 2])
    error = sending.outcome()
    go_on.set()
    assert isinstance(error, TransferError)
    assert "acknowledged nothing for 0.5 s" in error.message


def test_pages_do_not_wait_for_the_answer_to_open(
    make_decode: MakeDecode, make_prefill: MakePrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_it = LoopbackControl.open
    monkeypatch.setattr(LoopbackControl, "open", lambda control, request, _: open_it(control, request, lambda _: None))
    config = small("loopback")
    decode, prefill = make_decode(config), make_prefill(config)
    sending = push_blocks(prefill, decode, A, [5, 6], [1, 2])
    sending.commit()
    assert sending.outcome() is None
    np.testing.assert_array_equal(decode.pages[:, [5, 6]], prefill.pages[:, [1, 2]])


def test_an_aborted_push_is_no_failure_in_the_metrics(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    decode, prefill = make_decode(config), make_prefill(config)
    sending = push_blocks(prefill, decode, A, [5, 6], [1, 2])
    sending.push.abort("every choice ended with its first token")
    assert isinstance(sending.outcome(), TransferError)
    assert sample(prefill.registry, "baton_kv_transfer_failures_total", reason="aborted") == 0


def test_an_on_done_that_raises_harms_no_other_push(
    config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill, caplog: pytest.LogCaptureFixture
) -> None:
    decode, prefill = make_decode(config), make_prefill(config)

    def fail(push: object, error: object) -> None:
        raise RuntimeError("a fault of the worker")

    prefill.sender.open(decode.reserve(A), fail).commit([])
    good = push_blocks(prefill, decode, B, [5, 6], [1, 2])
    good.commit()
    assert good.outcome() is None
    prefill.close()
    assert "on_done of" in caplog.text


# Choosing a way


def test_the_first_transport_that_both_sides_offer_and_reach_is_taken(
    make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    for offered, preferred, chosen in [
        (("loopback", "shm", "grpc"), ("loopback", "shm", "grpc"), "loopback"),
        (("grpc", "shm"), ("shm", "grpc"), "shm"),
        (("loopback", "grpc"), ("shm", "grpc"), "grpc"),
    ]:
        decode = make_decode(small(*offered))
        prefill = make_prefill(small(*preferred))
        sending = push_blocks(prefill, decode, A, [5], [1])
        sending.commit()
        assert sending.outcome() is None
        assert sending.push.transport == chosen


def test_another_process_and_another_host_are_reached_by_grpc(
    make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    config = small("loopback", "shm", "grpc")
    decode, prefill = make_decode(config), make_prefill(config)
    ticket = decode.reserve(A, (0, 0, [5]))
    for offer in ticket.shards[0].offers:
        if offer.domain:
            offer.domain += "elsewhere"
    sending = prefill.open(ticket)
    sending.send_all(0, 0, [1])
    sending.commit()
    assert sending.outcome() is None
    assert sending.push.transport == "grpc"


def test_without_a_way_in_common_the_push_is_refused(make_decode: MakeDecode, make_prefill: MakePrefill) -> None:
    decode = make_decode(TransferConfig(transports=("loopback",)))
    prefill = make_prefill(TransferConfig(transports=("grpc",)))
    with pytest.raises(UnavailableError, match="it offers loopback; here are grpc"):
        prefill.open(decode.reserve(A))


def test_where_the_shared_memory_is_too_small_grpc_takes_over(
    make_decode: MakeDecode, make_prefill: MakePrefill, caplog: pytest.LogCaptureFixture
) -> None:
    size = os.statvfs(SHM_DIR)
    config = TransferConfig(transports=("shm", "grpc"), ring_bytes=size.f_blocks * size.f_frsize + 4096)
    decode, prefill = make_decode(config), make_prefill(config)
    with caplog.at_level(logging.WARNING):
        for name in (A, B):
            sending = push_blocks(prefill, decode, name, [5], [1])
            sending.commit()
            assert sending.outcome() is None
            assert sending.push.transport == "grpc"
    assert [record.levelname for record in caplog.records if "cannot go by shm" in record.message] == ["WARNING"]


def assert_grpc_takes_over(make_decode: MakeDecode, make_prefill: MakePrefill, first: str) -> None:
    config = small(first, "grpc")
    decode, prefill = make_decode(config), make_prefill(config)
    sending = push_blocks(prefill, decode, A, [5], [1])
    sending.commit()
    assert sending.outcome() is None
    assert sending.push.transport == "grpc"


def test_where_the_receiver_cannot_map_the_ring_grpc_takes_over(
    make_decode: MakeDecode, make_prefill: MakePrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, num_bytes: int) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(sources, "open_ring", refuse)
    assert_grpc_takes_over(make_decode, make_prefill, "shm")


def test_where_the_two_cannot_make_a_group_grpc_takes_over(
    make_decode: MakeDecode, make_prefill: MakePrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another host's address, at which this process cannot listen.
    monkeypatch.setattr(pair_group, "own_address", lambda peer: "192.0.2.1")
    assert_grpc_takes_over(make_decode, make_prefill, "collective")


def test_a_stream_that_breaks_while_the_group_is_made_leaves_the_way_to_grpc(
    make_decode: MakeDecode, make_prefill: MakePrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_stream(self: object, call: object) -> bytes:
        raise RuntimeError("a fault of the receiver's")

    monkeypatch.setattr(GroupSource, "store", break_stream)
    assert_grpc_takes_over(make_decode, make_prefill, "collective")


@pytest.mark.parametrize("transport", BUFFERED)
def test_a_receiver_with_smaller_frames_is_obeyed(
    transport: str, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    decode = make_decode(small(transport, frame_bytes=512))
    prefill = make_prefill(small(transport, frame_bytes=1 << 20, ring_bytes=1 << 20))
    sending = push_blocks(prefill, decode, A, [5, 6, 7, 8], [1, 2, 3, 4])
    sending.commit()
    assert sending.outcome() is None
    assert sending.push.num_frames == 3 * 4 * HYBRID.page_bytes // 512


@pytest.mark.parametrize("transport", BUFFERED)
def test_small_frames_share_messages_within_the_receivers_limit(
    transport: str, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    # A page has 64 KiB, and two of them are the receiver's largest frame.
    layout = KVLayout((KVGroup((0,)),), num_kv_heads=8, head_dim=64, block_size=16, dtype=torch.float32)
    decode = make_decode(TransferConfig.model_validate({"transports": (transport,), "frame_bytes": 128 << 10}), layout)
    prefill = make_prefill(TransferConfig.model_validate({"transports": (transport,)}), layout)
    sending = prefill.open(decode.reserve(A, (0, 0, list(range(1, 25))), num_blocks=24))
    for first in range(0, 24, 3):
        sending.push.send(0, 0, first, [first + 1])
        sending.push.send(0, 0, first + 1, [first + 2, first + 3])
    sending.commit()
    assert sending.outcome() is None
    assert sending.push.num_frames == 16


# Refused at once


def test_a_different_layout_is_refused_by_name(make_decode: MakeDecode, make_prefill: MakePrefill) -> None:
    config = TransferConfig(transports=("grpc",))
    decode = make_decode(config)
    prefill = make_prefill(config, dataclasses.replace(HYBRID, block_size=16), model="other")
    with pytest.raises(LayoutMismatchError, match=r"model is 'other' here .*; block_size is 16 here and 8 at the peer"):
        prefill.open(decode.reserve(A))


def test_a_ticket_that_makes_no_sense_is_refused(make_decode: MakeDecode, make_prefill: MakePrefill) -> None:
    config = TransferConfig(transports=("grpc",))
    decode, prefill = make_decode(config), make_prefill(config)
    ticket = decode.reserve(A, (0, 0, [5]))
    ticket.ranges[0].num_blocks = 99
    with pytest.raises(InvalidRequestError):
        prefill.open(ticket)


def test_a_reservation_has_one_push(config: TransferConfig, make_decode: MakeDecode, make_prefill: MakePrefill) -> None:
    decode, prefill = make_decode(config), make_prefill(config)
    ticket = decode.reserve(A, (0, 0, [5]))
    sending = prefill.open(ticket)
    with pytest.raises(DuplicateRequestError):
        prefill.open(ticket)
    sending.send_all(0, 0, [1])
    sending.commit()
    assert sending.outcome() is None


def test_the_pool_must_have_the_shape_of_the_layout(make_prefill: MakePrefill, make_decode: MakeDecode) -> None:
    config = TransferConfig()
    wider = dataclasses.replace(HYBRID, head_dim=8)
    side = make_prefill(config)
    with pytest.raises(ValueError, match="shape"):
        type(side.sender)(
            side.sender._memory, wider, side.sender._fingerprint, "prefill-1", 1, config, side.sender._metrics
        )
