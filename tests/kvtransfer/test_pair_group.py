"""A group of two, and a receiver whose sender does not keep to it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import numpy as np
import pytest
import torch
import torch.distributed as dist

from baton.errors import UnavailableError
from baton.internal.v1 import transfer_pb2
from kvtransfer import group_source
from kvtransfer.device_pages import DevicePages
from kvtransfer.pair_group import RECEIVER, SENDER, LocalStore, PairGroup, RemoteStore, own_address
from kvtransfer.session import CALL_MAGIC
from tests.kvtransfer.frames import A, frame_of, in_thread, opened, payload_of
from tests.kvtransfer.grpc_stream import Stream
from tests.kvtransfer.host_device import HostDevice, HostGroup
from tests.kvtransfer.sides import WAIT_S, DecodeSide, PrefillSide, small

MakeDecode = Callable[..., DecodeSide]
MakePrefill = Callable[..., PrefillSide]

HOST = "127.0.0.1"


@pytest.fixture
def pair() -> tuple[PairGroup, PairGroup]:
    store = LocalStore(WAIT_S)

    def ask(key: str, value: bytes | None) -> bytes:
        if value is not None:
            store.set(key, value)
        return store.get(key)

    with futures.ThreadPoolExecutor(1) as threads:
        receiver = threads.submit(PairGroup, store, RECEIVER, host=HOST, timeout_s=WAIT_S)
        sender = PairGroup(RemoteStore(ask), SENDER, host=HOST, timeout_s=WAIT_S)
        return sender, receiver.result(WAIT_S)


def test_payloads_pass_in_order(pair: tuple[PairGroup, PairGroup]) -> None:
    sender, receiver = pair
    payloads = [payload_of(num_pages) for num_pages in (3, 1, 2)]
    held = [sender.send(payload) for payload in payloads]
    for payload in payloads:
        into = np.zeros_like(payload)
        receiver.receive(into)
        np.testing.assert_array_equal(into, payload)
    assert len(held) == 3


def test_a_peer_that_is_gone_is_told(pair: tuple[PairGroup, PairGroup]) -> None:
    into = np.empty(8, dtype=np.uint8)
    receiver = pair[RECEIVER]
    pair[SENDER].close()
    with pytest.raises(UnavailableError, match="a payload did not come"):
        receiver.receive(into)


def test_who_joins_alone_waits_no_longer_than_it_is_told() -> None:
    with pytest.raises(UnavailableError, match=r"did not say '0/0' within 0\.1 s"):
        PairGroup(LocalStore(0.1), RECEIVER, host=HOST, timeout_s=0.1)


def test_the_address_towards_a_peer_is_this_hosts_own() -> None:
    assert own_address("127.0.0.1:80") == "127.0.0.1"
    assert own_address("[::1]:80") == "::1"


def test_a_torch_without_groups_has_all_other_transports(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("kvtransfer.pair_group", "kvtransfer.transports.collective"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "torch._C._distributed_c10d", None)
    monkeypatch.delattr(torch._C, "_distributed_c10d")
    monkeypatch.setattr(dist, "is_available", lambda: False)
    side = DecodeSide(small("collective", "grpc"))
    (shard,) = side.reserve(A).shards
    assert [offer.transport for offer in shard.offers] == ["grpc"]
    side.close()


def ask_in_vain(stream: Stream) -> None:
    with pytest.raises(grpc.RpcError):
        stream.send(store_call(key="nobody's"))


def test_a_receiver_that_closes_does_not_wait_for_a_sender_that_joins() -> None:
    """It would for longer than a test may take."""
    side = DecodeSide(small("collective", timeout_s=3600.0))
    with grpc.insecure_channel(side.reserve(A).shards[0].offers[0].address) as channel:
        stream = Stream(channel)
        stream.hello(group=True)
        asking = in_thread(lambda: ask_in_vain(stream))
        side.close()
        asking.join()
        stream.close()


@pytest.fixture
def decode() -> Iterator[DecodeSide]:
    side = DecodeSide(small("collective", timeout_s=0.2))
    yield side
    side.close()


def store_call(**fields: object) -> bytes:
    call = transfer_pb2.StoreCall(**fields)  # type: ignore[arg-type]
    return CALL_MAGIC + transfer_pb2.StreamCall(id=1, store=call).SerializeToString()


def test_the_store_tells_what_both_have_set(stream: Stream) -> None:
    assert stream.hello(group=True).payload_error == ""
    (own,) = stream.send(store_call(key="mine", value=b"x")).answers
    assert (own.status, own.value) == ("", b"x")
    (theirs,) = stream.send(store_call(key="0/1")).answers
    assert (theirs.status, theirs.value != b"") == ("", True)
    (nobodys,) = stream.send(store_call(key="nobody's")).answers
    assert (nobodys.status, nobodys.message) == ("UNAVAILABLE", 'the peer did not say "nobody\'s" within 0.2 s')


def test_a_stream_without_a_group_has_no_store(stream: Stream) -> None:
    stream.hello()
    (answer,) = stream.send(store_call(key="a")).answers
    assert (answer.status, answer.message) == ("ABORTED", "this stream has no group")


def test_a_store_takes_few_keys(stream: Stream) -> None:
    stream.hello(group=True)
    statuses = [stream.send(store_call(key=str(index), value=b"")).answers[0].status for index in range(17)]
    assert statuses[-1] == "ABORTED"


def test_a_frame_whose_sender_never_joined_ends_the_stream(decode: DecodeSide, stream: Stream) -> None:
    stream.hello(group=True)
    ticket = opened(decode, (0, 0, [5]))
    with pytest.raises(grpc.RpcError) as raised:
        stream.send(frame_of(ticket, 0, 0, 0, 0, payload_of(1)).pack())
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    np.testing.assert_array_equal(decode.pages, decode.before)
    assert decode.events.of(A) == []


def test_a_receiver_that_cannot_join_ends_the_stream(
    decode: DecodeSide, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def join(*arguments: object, **settings: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(group_source, "join_sender", join)
    stream.hello(group=True)
    with pytest.raises(grpc.RpcError, match="cannot join the group") as raised:
        stream.send(frame_of(opened(decode, (0, 0, [5])), 0, 0, 0, 0, payload_of(1)).pack())
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


# Between devices


@pytest.mark.parametrize(
    ("devices", "num_ends"), [(("GPU-a", "GPU-b"), 2), (("GPU-a", "GPU-a"), 0), (("", "GPU-b"), 0), (("GPU-a", ""), 0)]
)
def test_two_devices_have_a_group_of_their_own(
    make_decode: MakeDecode, make_prefill: MakePrefill, devices: tuple[str, str], num_ends: int
) -> None:
    """All others pass their payloads through the hosts."""
    prefill = make_prefill(small("collective"), on_device=devices[0] != "")
    decode = make_decode(small("collective"), on_device=devices[1] != "")
    for memory, uuid in zip((prefill.memory, decode.memory), devices, strict=True):
        if isinstance(memory, DevicePages):
            assert isinstance(memory.device, HostDevice)
            memory.device.uuid = uuid
    before = HostGroup.num_made
    sending = prefill.open(decode.reserve(A, (0, 0, [9, 5, 6, 7, 8])))
    sending.send_all(0, 0, [1, 2, 5, 4, 3])
    sending.commit()
    assert sending.outcome() is None
    assert HostGroup.num_made - before == num_ends
    np.testing.assert_array_equal(decode.pages[:, [9, 5, 6, 7, 8]], prefill.pages[:, [1, 2, 5, 4, 3]])


def test_a_group_of_devices_that_breaks_fails_its_pushes(
    make_decode: MakeDecode, make_prefill: MakePrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send_nothing(self: HostGroup, payload: torch.Tensor) -> None:
        self.close()

    monkeypatch.setattr(HostGroup, "send", send_nothing)
    decode = make_decode(small("collective"), on_device=True)
    prefill = make_prefill(small("collective"), on_device=True)
    assert isinstance(prefill.memory, DevicePages)
    prefill.memory.device.uuid = "GPU-a"
    sending = prefill.open(decode.reserve(A, (0, 0, [5])))
    sending.send_all(0, 0, [1])
    sending.commit()
    error = sending.outcome()
    assert isinstance(error, UnavailableError)
    assert "the other end is gone" in error.message
    np.testing.assert_array_equal(decode.pages, decode.before)
