"""Every test of this package must leave no thread and no shared memory behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from baton.config import TransferConfig
from kvtransfer.ring import SHM_DIR
from kvtransfer.transports import TRANSPORTS, cuda_ipc
from tests.kvtransfer.frames import CONFIG, GatedMemory
from tests.kvtransfer.grpc_stream import Stream
from tests.kvtransfer.sides import DecodeSide, PrefillSide, ref, small


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith(("kv-", "control-server"))]
    assert threads == []
    assert [path.name for path in SHM_DIR.glob(f"baton-*-{os.getpid()}-*")] == []


@pytest.fixture
def decode() -> Iterator[DecodeSide]:
    """A receiver whose copies tests can hold up."""
    side = DecodeSide(CONFIG, make_memory=GatedMemory)
    yield side
    side.close()


@pytest.fixture
def memory(decode: DecodeSide) -> GatedMemory:
    assert isinstance(decode.memory, GatedMemory)
    return decode.memory


@pytest.fixture
def stream(decode: DecodeSide) -> Iterator[Stream]:
    """To the receiver that the module's `decode` has, at the first address that it offers."""
    with grpc.insecure_channel(decode.reserve(ref("probe")).shards[0].offers[0].address) as channel:
        stream = Stream(channel)
        yield stream
        stream.close()


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no config tells how much is in a frame: as much as `small` does where it tells."""
    monkeypatch.setattr(cuda_ipc, "MAX_HEADS", 4)


@pytest.fixture(params=list(TRANSPORTS))
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(transport: str) -> TransferConfig:
    return small(transport)


@pytest.fixture
def make_decode() -> Iterator[Callable[..., DecodeSide]]:
    sides: list[DecodeSide] = []

    def make(*args: Any, **kwargs: Any) -> DecodeSide:
        sides.append(DecodeSide(*args, **kwargs))
        return sides[-1]

    yield make
    for side in sides:
        side.close()


@pytest.fixture
def make_prefill() -> Iterator[Callable[..., PrefillSide]]:
    sides: list[PrefillSide] = []

    def make(*args: Any, **kwargs: Any) -> PrefillSide:
        sides.append(PrefillSide(*args, **kwargs))
        return sides[-1]

    yield make
    for side in sides:
        side.close()
