"""Pages that are read where they lie: on a device of the host, by the real protocol between sender and receiver."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from baton.errors import StaleAttemptError, TransferError, UnavailableError
from baton.internal.v1 import transfer_pb2
from kvtransfer.arrival import Arrival
from kvtransfer.device_pages import DevicePages
from kvtransfer.frame import Frame
from kvtransfer.pages import HeadRange, HostPages
from kvtransfer.pool_source import GENERATION, PoolSource
from kvtransfer.ring import create_ring, unlink_ring
from kvtransfer.transports import TRANSPORTS, cuda_ipc
from kvtransfer.transports.cuda_ipc import CudaIpcTransport, PoolPayloads
from kvtransfer.transports.stream import MAX_FRAMES
from tests.kvtransfer.faults import FaultyTransports
from tests.kvtransfer.frames import frame_of, payload_of
from tests.kvtransfer.host_device import HostDevice, HostMapping, device_pages
from tests.kvtransfer.sides import HYBRID, WAIT_S, DecodeSide, PrefillSide, random_pages, ref, sample, small

MakeDecode = Callable[..., DecodeSide]
MakePrefill = Callable[..., PrefillSide]
A, B = ref("a"), ref("b")


@pytest.fixture(autouse=True)
def everything_is_unmapped() -> Iterator[None]:
    yield
    assert HostMapping.num_open == 0


def device_of(side: DecodeSide | PrefillSide) -> HostDevice:
    assert isinstance(side.memory, DevicePages)
    assert isinstance(side.memory.device, HostDevice)
    return side.memory.device


# Frames


@pytest.fixture
def receiving(make_decode: MakeDecode) -> tuple[DecodeSide, HostDevice]:
    decode = make_decode(small("cuda_ipc"))
    return decode, device_of(decode)


def test_what_comes_during_a_copy_is_copied_together(
    receiving: tuple[DecodeSide, HostDevice], make_prefill: MakePrefill
) -> None:
    decode, device = receiving
    before = device.num_launches
    sent = threading.Semaphore(0)
    prefill = make_prefill(small("cuda_ipc"), load=FaultyTransports(lambda frame: sent.release()))
    device.gate.clear()
    first = prefill.open(decode.reserve(A, (1, 0, [5])))
    first.push.send(1, 0, 0, [1])
    assert device.entered.acquire(timeout=WAIT_S)
    second = prefill.open(decode.reserve(B, (0, 0, [6, 7, 8, 9, 10, 11])))
    second.send_all(0, 0, [6, 5, 4, 3, 2, 1])
    first.push.send(1, 1, 0, [1])
    first.commit()
    second.commit()
    for _ in range(8):
        assert sent.acquire(timeout=WAIT_S)
    device.gate.set()
    assert (first.outcome(), second.outcome()) == (None, None)
    assert second.push.num_frames == 6
    # The last frame may still have been on its way.
    assert device.num_launches - before <= 3
    np.testing.assert_array_equal(decode.pages[:, 6:12], prefill.pages[:, 6:0:-1])
    np.testing.assert_array_equal(decode.pages[:2, 5], prefill.pages[:2, 1])


def test_pages_that_were_taken_back_during_a_copy_are_refused(
    receiving: tuple[DecodeSide, HostDevice], make_prefill: MakePrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The push is aborted beside its commit, and its blocks go to another request before they have been read."""
    decode, device = receiving
    prefill = make_prefill(small("cuda_ipc"))
    # The receiver does not hear of it in any other way.
    monkeypatch.setattr(decode.leader, "abort", lambda *arguments: None)
    device.gate.clear()
    sending = prefill.open(decode.reserve(A, (1, 0, [5])))
    sending.send_all(1, 0, [1])
    sending.commit()
    assert device.entered.acquire(timeout=WAIT_S)
    sending.push.abort("cancelled")
    assert isinstance(sending.outcome(), TransferError)
    prefill.pages[:, 1] = 0
    device.gate.set()
    decode.events.wait("aborted", A)
    assert decode.events.of(A) == ["aborted"]
    assert decode.events.reasons[A] == "frame 0 was taken back by its sender"
    assert sample(decode.registry, "baton_kv_stale_frames_total") >= 1
    assert sample(decode.registry, "baton_kv_transfer_failures_total", reason="checksum") == 0
    next_one = prefill.open(decode.reserve(B, (1, 0, [6])))
    next_one.send_all(1, 0, [2])
    next_one.commit()
    assert next_one.outcome() is None


def test_a_sender_that_stops_takes_all_back(
    receiving: tuple[DecodeSide, HostDevice], make_prefill: MakePrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, device = receiving
    prefill = make_prefill(small("cuda_ipc"))
    # The receiver cannot hang up before the gate opens.
    monkeypatch.setattr(cuda_ipc, "_LINGER_S", 0.0)
    device.gate.clear()
    sending = prefill.open(decode.reserve(A, (1, 0, [5])))
    sending.push.send(1, 0, 0, [1])
    assert device.entered.acquire(timeout=WAIT_S)
    prefill.close()
    assert isinstance(sending.outcome(), UnavailableError)
    prefill.pages[:, 1] = 0
    device.gate.set()
    decode.events.wait("aborted", A)
    np.testing.assert_array_equal(decode.pages[2:], decode.before[2:])


# Ways that cannot be gone


@pytest.mark.parametrize("fault", ["the pool cannot be exported", "another device"])
def test_the_next_transport_is_taken_where_a_pool_cannot_be_read(
    make_decode: MakeDecode, make_prefill: MakePrefill, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    config = small("cuda_ipc", "shm")
    decode, prefill = make_decode(config), make_prefill(config)
    if fault == "the pool cannot be exported":
        monkeypatch.setattr(device_of(prefill), "export", refuse)
    else:
        device_of(prefill).uuid = "GPU-of-another"
    sending = prefill.open(decode.reserve(A, (0, 0, [5, 6])))
    sending.send_all(0, 0, [1, 2])
    sending.commit()
    assert sending.outcome() is None
    assert sending.push.transport == "shm"
    np.testing.assert_array_equal(decode.pages[:, [5, 6]], prefill.pages[:, [1, 2]])
    assert sample(prefill.registry, "baton_kv_transport_fallbacks_total", transport="cuda_ipc") == 1


def refuse(memory: object) -> bytes:
    raise OSError("memory of this kind is not shared")


def test_a_pool_in_host_memory_is_neither_offered_nor_sent_this_way(make_decode: MakeDecode) -> None:
    assert not CudaIpcTransport().carries(HostPages(np.zeros((1, 2, 256), dtype=np.uint8), HeadRange(0, 1)))
    (shard,) = make_decode(small("cuda_ipc", "grpc"), on_device=False).reserve(A).shards
    assert [offer.transport for offer in shard.offers] == ["grpc"]


# Pools on a device


@pytest.mark.parametrize("transport", list(TRANSPORTS))
def test_every_transport_works_from_and_to_a_device(
    transport: str, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    config = small(transport)
    decode, prefill = make_decode(config, on_device=True), make_prefill(config, on_device=True)
    sending = prefill.open(decode.reserve(A, (0, 0, [9, 5, 6, 7, 8])))
    sending.send_all(0, 0, [1, 2, 5, 4, 3])
    sending.commit()
    assert sending.outcome() is None
    assert sending.push.transport == transport
    np.testing.assert_array_equal(decode.pages[:, [9, 5, 6, 7, 8]], prefill.pages[:, [1, 2, 5, 4, 3]])


@pytest.mark.parametrize("transport", list(TRANSPORTS))
def test_pages_are_read_when_they_have_been_computed(
    transport: str, make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    config = small(transport)
    decode, prefill = make_decode(config), make_prefill(config, on_device=True)
    device = device_of(prefill)
    sending = prefill.open(decode.reserve(A, (1, 0, [5])))
    sending.push.send(1, 0, 0, [1])
    device.computes = True
    sending.push.send(1, 1, 0, [1])
    sending.commit()
    late = device.marks[-1]
    try:
        assert late.waited_for.wait(WAIT_S)
        # What was computed has left, and is told of without what is not.
        assert sending.push.num_frames == 1
        prefill.pages[1, 1] = 7
    finally:
        late.done.set()
    assert sending.outcome() is None
    assert (decode.pages[1, 5] == 7).all()


def test_blocks_are_written_when_the_steps_launched_before_they_were_reserved_are_through(
    make_decode: MakeDecode, make_prefill: MakePrefill
) -> None:
    """Such a step may still read or write them, for who had them before."""
    config = small("shm")
    decode, prefill = make_decode(config, on_device=True), make_prefill(config)
    device = device_of(decode)
    device.computes = True
    sending = prefill.open(decode.reserve(A, (1, 0, [5])))
    before = decode.pages[:2, 5].copy()
    sending.push.send(1, 0, 0, [1])
    sending.push.send(1, 1, 0, [1])
    sending.commit()
    step = device.marks[-1]
    try:
        assert step.waited_for.wait(WAIT_S)
        np.testing.assert_array_equal(decode.pages[:2, 5], before)
    finally:
        step.done.set()
    assert sending.outcome() is None
    np.testing.assert_array_equal(decode.pages[:2, 5], prefill.pages[:2, 1])


# What a sender says


@pytest.fixture
def ring_name() -> Iterator[str]:
    name, ring = create_ring(MAX_FRAMES * 8)
    ring.view(0, 8 * 8)[:] = np.arange(8, dtype=np.uint64).view(np.uint8)
    yield name
    unlink_ring(name)


def hello_of(ring_name: str, memory: DevicePages, **changes: object) -> transfer_pb2.StreamHello:
    fields = {
        "handle": memory.device.export(memory.pages),
        "num_slots": memory.num_slots,
        "num_blocks": memory.num_blocks,
        "first_head": memory.heads.first,
        "num_heads": memory.heads.count,
        "head_bytes": memory.head_bytes,
    }
    pool = transfer_pb2.DevicePool(**fields | changes)  # type: ignore[arg-type]
    return transfer_pb2.StreamHello(ring_name=ring_name, ring_bytes=MAX_FRAMES * 8, pool=pool)


@pytest.fixture
def memory() -> DevicePages:
    device = HostDevice()
    return device_pages(device.share(random_pages(HYBRID, 16, seed=3)), HeadRange(0, 1), device)


@pytest.fixture
def source(ring_name: str, memory: DevicePages) -> Iterator[PoolSource]:
    source = PoolSource(hello_of(ring_name, memory), memory)
    yield source
    source.close()


def names(generation: int, *block_ids: int) -> bytes:
    return GENERATION.pack(generation) + np.array(block_ids, dtype="<u4").tobytes()


def frame(**changes: Any) -> Frame:
    ticket = transfer_pb2.Ticket(ref=transfer_pb2.AttemptRef(request_id="a"), reservation=1)
    return frame_of(ticket, 0, 0, 2, 0, payload_of(2))._replace(**changes)


def test_a_frame_names_its_generation_and_blocks(source: PoolSource, memory: DevicePages) -> None:
    message = b"header" + names(3, 9, 4) + b"next"
    payload, end = source.payload(frame(), message, len(b"header"))
    assert (payload.generation, payload.numbers.tolist(), message[end:]) == (3, [2 * 16 + 9, 2 * 16 + 4], b"next")
    arrivals = [Arrival(frame(), np.array([5, 6]), payload)]
    before = memory.pages.clone()
    assert source.copy_in(memory, arrivals) == [None]
    assert memory.pages[2 * 16 + 5].equal(before[2 * 16 + 9])
    assert memory.pages[2 * 16 + 6].equal(before[2 * 16 + 4])


@pytest.mark.parametrize("generation", [8, 3 + MAX_FRAMES])
def test_a_frame_of_another_generation_is_stale(source: PoolSource, memory: DevicePages, generation: int) -> None:
    payload, _ = source.payload(frame(), names(generation, 9, 4), 0)
    (failure,) = source.copy_in(memory, [Arrival(frame(), np.array([5, 6]), payload)])
    assert isinstance(failure, StaleAttemptError)


@pytest.mark.parametrize(
    ("changes", "message", "problem"),
    [
        ({}, names(1, 9), "cut off"),
        ({}, names(1)[:-1], "cut off"),
        ({}, names(1, 16, 4), "pages or heads"),
        ({"slot": 3}, names(1, 9, 4), "pages or heads"),
        ({"first_head": 1}, names(1, 9, 4), "pages or heads"),
        ({"num_blocks": 2**32 - 1}, names(1, 9, 4), "cut off"),
    ],
)
def test_a_frame_that_names_what_is_not_there_ends_the_stream(
    source: PoolSource, changes: dict[str, int], message: bytes, problem: str
) -> None:
    with pytest.raises(TransferError, match=problem):
        source.payload(frame(**changes), message, 0)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"handle": b"none"}, "no handle"),
        ({"num_slots": 2}, "a block has 2 pages"),
        ({"head_bytes": 128}, "128 bytes for each head, not 3 with 256"),
        ({"num_blocks": 17}, "do not lie in what was mapped"),
        ({"num_heads": 0}, "no heads"),
        ({"num_blocks": 0}, "no heads or blocks"),
    ],
)
def test_a_pool_of_another_kind_is_refused(
    ring_name: str, memory: DevicePages, changes: dict[str, object], problem: str
) -> None:
    with pytest.raises((OSError, ValueError), match=problem):
        PoolSource(hello_of(ring_name, memory, **changes), memory)


def test_a_pool_in_host_memory_reads_no_other(ring_name: str, memory: DevicePages) -> None:
    host = HostPages(random_pages(HYBRID, 16, seed=3), HeadRange(0, 1))
    with pytest.raises(ValueError, match="not on a GPU"):
        PoolSource(hello_of(ring_name, memory), host)


def test_only_frames_of_the_push_that_ended_are_taken_back(memory: DevicePages) -> None:
    payloads = PoolPayloads(memory, 1024)
    hello = transfer_pb2.StreamHello()
    payloads.announce(hello)
    source = PoolSource(hello, memory)
    payloads.settle()
    for reservation in (1, 2, 1):
        payloads.put(frame(reservation=reservation), memory, np.array([1, 2]), 0)
    payloads.withdraw(1)
    arrived = [source.payload(frame(), names(generation, 9, 4), 0)[0] for generation in (1, 2, 3)]
    failures = source.copy_in(memory, [Arrival(frame(), np.array([5, 6]), each) for each in arrived])
    assert [failure is None for failure in failures] == [False, True, False]
    source.close()
