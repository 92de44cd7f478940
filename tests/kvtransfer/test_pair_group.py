"""A group of two, and a receiver whose sender does not keep to it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures

import grpc
import numpy as np
import pytest

from baton.errors import UnavailableError
from baton.internal.v1 import transfer_pb2
from kvtransfer.pair_group import RECEIVER, SENDER, LocalStore, PairGroup, RemoteStore, own_address
from kvtransfer.session import CALL_MAGIC
from tests.kvtransfer.frames import A, frame_of, opened, payload_of
from tests.kvtransfer.grpc_stream import Stream
from tests.kvtransfer.sides import WAIT_S, DecodeSide, small

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
