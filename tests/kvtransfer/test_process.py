"""Sender and receiver in two processes, as in a cluster; the sender may be killed at any time."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest

from baton.errors import StaleAttemptError
from kvtransfer.ring import SHM_DIR
from tests.kvtransfer.sending_process import order, sending_process
from tests.kvtransfer.sides import HYBRID, DecodeSide, PrefillSide, random_pages, ref, small

pytestmark = pytest.mark.clusters

# The seed of PrefillSide.
SOURCE_PAGES = random_pages(HYBRID, 64, seed=2)
SOURCE = [3, 4, 5, 6, 9, 8]
TARGET = [20, 22, 21, 30, 31, 32]


@pytest.fixture(params=["cuda_ipc", "shm", "collective", "grpc"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def decode() -> Iterator[DecodeSide]:
    side = DecodeSide(small("loopback", "cuda_ipc", "shm", "collective", "grpc"))
    yield side
    side.close()


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    with sending_process() as process:
        yield process


def test_blocks_travel_between_processes(decode: DecodeSide, child: subprocess.Popen[str], transport: str) -> None:
    ticket = decode.reserve(ref("a"), (0, 0, TARGET))
    assert order(child, ticket, SOURCE, transport) == f"None by {transport}"
    assert child.wait() == 0
    expected = decode.before.copy()
    expected[:, TARGET] = SOURCE_PAGES[:, SOURCE]
    np.testing.assert_array_equal(decode.pages, expected)
    assert decode.events.of(ref("a")) == ["committed"]


def test_a_killed_sender_leaves_nothing_and_harms_nothing(
    decode: DecodeSide, child: subprocess.Popen[str], transport: str
) -> None:
    ticket = decode.reserve(ref("a"), (0, 0, TARGET))
    assert order(child, ticket, SOURCE, transport, hold_at=4) == "holding"
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert list(SHM_DIR.glob(f"baton-kv-{child.pid}-*")) == []

    # The reservation stays until it is released: nobody has said that it is over.
    assert decode.events.of(ref("a")) == []
    outside = np.setdiff1d(np.arange(64), TARGET)
    np.testing.assert_array_equal(decode.pages[:, outside], decode.before[:, outside])
    decode.leader.release(ref("a"))
    decode.events.wait("released", ref("a"))

    successor = PrefillSide(small(transport), worker="prefill-child", epoch=10)
    try:
        with_old_ticket = successor.open(ticket)
        sending = successor.open(decode.reserve(ref("a", attempt=1), (0, 0, TARGET)))
        sending.send_all(0, 0, SOURCE)
        sending.commit()
        assert sending.outcome() is None
        assert isinstance(with_old_ticket.outcome(), StaleAttemptError)
    finally:
        successor.close()
    np.testing.assert_array_equal(decode.pages[:, TARGET], successor.pages[:, SOURCE])
    assert decode.events.log == [("released", ref("a")), ("committed", ref("a", attempt=1))]
    assert list(SHM_DIR.glob(f"baton-kv-{os.getpid()}-*")) == []
