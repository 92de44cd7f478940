"""The real thing: pools of one GPU in two processes. Without a GPU `host_device` stands in, in the other tests."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent import futures

import numpy as np
import pytest
import torch

from baton.errors import UnavailableError
from kvtransfer import nccl
from kvtransfer.device_pages import DevicePages
from kvtransfer.pages import PageMemory
from kvtransfer.pair_group import LocalStore
from tests.kvtransfer.gpu import gpu_memory, needs_gpu
from tests.kvtransfer.sending_process import order, sending_process
from tests.kvtransfer.sides import BUFFERED, HYBRID, WAIT_S, DecodeSide, PrefillSide, random_pages, ref, sample, small

pytestmark = [pytest.mark.clusters, needs_gpu]

MakePrefill = Callable[..., PrefillSide]
SOURCE, TARGET = [3, 4, 5, 6, 9, 8], [20, 22, 21, 30, 31, 32]
A = ref("a")


@pytest.fixture
def decode() -> Iterator[DecodeSide]:
    config = small("loopback", "cuda_ipc", "shm", "collective", "grpc")
    side = DecodeSide(config, make_memory=gpu_memory, on_device=False)
    yield side
    side.close()


def content(memory: PageMemory) -> np.ndarray:
    """uint8 [num_slots, num_blocks, page_bytes]."""
    assert isinstance(memory, DevicePages)
    return memory.pages.cpu().numpy().reshape(memory.num_slots, memory.num_blocks, -1)


@pytest.mark.parametrize("transport", ["cuda_ipc", "shm", "collective", "grpc"])
def test_blocks_travel_between_processes(decode: DecodeSide, transport: str) -> None:
    with sending_process() as child:
        ticket = decode.reserve(A, (0, 0, TARGET))
        assert order(child, ticket, SOURCE, transport, on_gpu=True) == f"None by {transport}"
        assert child.wait() == 0
    expected = decode.before.copy()
    expected[:, TARGET] = random_pages(HYBRID, 64, seed=2)[:, SOURCE]
    np.testing.assert_array_equal(content(decode.memory), expected)
    assert decode.events.of(A) == ["committed"]


def test_a_killed_sender_harms_nothing_and_the_next_is_read(decode: DecodeSide) -> None:
    with sending_process() as child:
        ticket = decode.reserve(A, (0, 0, TARGET))
        assert order(child, ticket, SOURCE, "cuda_ipc", hold_at=4, on_gpu=True) == "holding"
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    outside = np.setdiff1d(np.arange(64), TARGET)
    np.testing.assert_array_equal(content(decode.memory)[:, outside], decode.before[:, outside])
    decode.leader.release(A)
    decode.events.wait("released", A)
    with sending_process() as successor:
        # It has the same name and epoch, which the released reservation does not mind.
        ticket = decode.reserve(ref("a", attempt=1), (0, 0, TARGET))
        assert order(successor, ticket, SOURCE, "cuda_ipc", on_gpu=True) == "None by cuda_ipc"
    expected = random_pages(HYBRID, 64, seed=2)[:, SOURCE]
    np.testing.assert_array_equal(content(decode.memory)[:, TARGET], expected)


def test_a_process_that_cannot_map_its_own_pool_takes_the_next_way(
    decode: DecodeSide, make_prefill: MakePrefill
) -> None:
    prefill = make_prefill(small("cuda_ipc", "shm"), make_memory=gpu_memory, on_device=False)
    sending = prefill.open(decode.reserve(A, (0, 0, TARGET)))
    sending.send_all(0, 0, SOURCE)
    sending.commit()
    assert sending.outcome() is None
    assert sending.push.transport == "shm"
    assert sample(prefill.registry, "baton_kv_transport_fallbacks_total", transport="cuda_ipc") == 1


@pytest.mark.parametrize("transport", BUFFERED)
def test_pages_are_read_when_they_have_been_computed(
    decode: DecodeSide, make_prefill: MakePrefill, transport: str
) -> None:
    """Each slot is written behind some milliseconds of other work, and sent at once."""
    prefill = make_prefill(small(transport), make_memory=gpu_memory, on_device=False)
    assert isinstance(prefill.memory, DevicePages)
    pages = prefill.memory.pages.view(HYBRID.num_slots, 64, -1)
    sending = prefill.open(decode.reserve(A, (0, 0, TARGET)))
    source = torch.tensor(SOURCE, device="cuda")
    for slot in range(HYBRID.num_slots):
        torch.cuda._sleep(20_000_000)
        pages[slot, source] = slot + 1
        sending.push.send(0, slot, 0, SOURCE)
    sending.commit()
    assert sending.outcome() is None
    for slot in range(HYBRID.num_slots):
        assert (content(decode.memory)[slot, TARGET] == slot + 1).all()


def test_a_payload_passes_through_nccl_to_oneself() -> None:
    """Which is all that one GPU can: NCCL refuses two processes on it."""
    assert nccl.is_available()
    group = nccl.NcclGroup(LocalStore(WAIT_S), 0, torch.device("cuda", 0), WAIT_S, size=1)
    payload = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, device="cuda")
    into = torch.zeros_like(payload)
    torch.cuda.synchronize()
    group.exchange(payload, into)
    assert into.equal(payload)
    group.close()
    group.close()


def test_who_joins_alone_by_nccl_waits_no_longer_than_it_is_told() -> None:
    with pytest.raises(UnavailableError, match=r"did not join within 0\.5 s"):
        nccl.NcclGroup(LocalStore(WAIT_S), 0, torch.device("cuda", 0), 0.5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_payloads_pass_between_two_gpus_by_nccl() -> None:
    store = LocalStore(WAIT_S)
    devices = [torch.device("cuda", index) for index in range(2)]
    with futures.ThreadPoolExecutor(1) as threads:
        joining = threads.submit(nccl.NcclGroup, store, 1, devices[1], WAIT_S)
        sender = nccl.NcclGroup(store, 0, devices[0], WAIT_S)
        receiver = joining.result()
    payload = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, device=devices[0])
    into = torch.zeros_like(payload, device=devices[1])
    for device in devices:
        torch.cuda.synchronize(device)
    sender.send(payload)
    receiver.receive(into)
    assert into.cpu().equal(payload.cpu())
    sender.close()
    with pytest.raises(UnavailableError):
        receiver.receive(into)
    receiver.close()
