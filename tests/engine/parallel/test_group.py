"""The ranks' group, both ends on threads of this process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from engine.parallel.group import RankGroup, follow, lead

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[RankGroup]]:
    store = lead(TIMEOUT_S)
    cpu = torch.device("cpu")
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(
            lambda: RankGroup(follow(store.port, TIMEOUT_S), rank=1, size=2, device=cpu, timeout_s=TIMEOUT_S)
        )
        groups = [RankGroup(store, rank=0, size=2, device=cpu, timeout_s=TIMEOUT_S), second.result()]
    yield groups
    for group in groups:
        group.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_have_the_same_of_each_others_tensors(ranks: list[RankGroup], dtype: torch.dtype) -> None:
    own = [torch.randn(3, 5, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in (0, 1)]
    columns = torch.cat(own, dim=-1)

    def exchange(group: RankGroup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        mine = own[group.rank]
        # Not contiguous: as a slice of activations may come.
        total = group.add(mine.t().clone().t())
        return total, group.join(mine), group.share(mine.clone()), group.smallest(7 - group.rank)

    with ThreadPoolExecutor(2) as pool:
        for total, joined, shared, smallest in pool.map(exchange, ranks):
            assert torch.equal(total, own[0] + own[1])
            assert torch.equal(joined, columns)
            assert torch.equal(shared, own[0])
            assert smallest == 6


def test_the_store_listens_to_this_host_alone() -> None:
    store = lead(TIMEOUT_S)
    connections = psutil.Process().net_connections("tcp")
    assert {each.laddr.ip for each in connections if each.laddr.port == store.port} == {"127.0.0.1"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nccls_collectives_can_be_captured_in_a_graph() -> None:
    """A group of one, which is what there is on one GPU: its sums are copies, by the same calls."""
    device = torch.device("cuda", 0)
    group = RankGroup(lead(TIMEOUT_S), rank=0, size=1, device=device, timeout_s=TIMEOUT_S)
    own = torch.arange(12.0, device=device).view(3, 4)

    def exchange() -> torch.Tensor:
        return group.join(group.add(own.clone()) + group.share(own.clone()))

    assert group.smallest(5) == 5
    assert torch.equal(exchange(), 2 * own)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = exchange()
    own += 1
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, 2 * own)
    group.close()
