"""The collectives of a worker's ranks: NCCL among GPUs, Gloo among CPU processes, without a default group."""

from __future__ import annotations

import datetime
import socket
from typing import Any

import torch
from torch import distributed
from torch._C._distributed_c10d import Store, TCPStore

_HOST = "127.0.0.1"


class RankGroup:
    """One rank's end of the group; all ranks call the same collectives in the same order, one thread each.

    Blocks until every rank has joined. A collective that another rank does not take part in ends with RuntimeError, on
    a CPU as soon as that process is dead, else after the time limit.

    Args:
        store: of `lead` or `follow`.
        rank: in [0, size); rank 0 leads.
        device: what this rank computes on.
        timeout_s: longest wait for the others, in making the group and in each collective.
    """

    def __init__(self, store: Store, *, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        # More than torch's annotations know of it.
        self._backend: Any = _make_backend(store, rank, size, device, datetime.timedelta(seconds=timeout_s))
        # NCCL connects with the first collective.
        self.smallest(0)

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors of one shape, the same to the bit on all of them; written in place."""
        tensor = tensor.contiguous()
        self._backend.allreduce([tensor]).wait()
        return tensor

    def join(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors, [..., n] each, side by side: [..., size * n]."""
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._backend.allgather([parts], [tensor]).wait()
        return torch.cat(parts, dim=-1)

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor on all ranks; written in place."""
        options = distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._backend.broadcast([tensor], options).wait()
        return tensor

    def smallest(self, value: int) -> int:
        """The least of the ranks' values."""
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        self._backend.allreduce([tensor], distributed.ReduceOp.MIN).wait()
        return int(tensor.item())

    def close(self) -> None:
        """Hangs up. Nothing may be called any more. Idempotent."""
        self._backend = None


def lead(timeout_s: float) -> TCPStore:
    """The store through which the ranks find each other, in rank 0's process; its `port` is for the others."""
    # By itself a store listens to the whole network.
    listener = socket.create_server((_HOST, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        _HOST,
        port,
        is_master=True,
        timeout=datetime.timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def follow(port: int, timeout_s: float) -> TCPStore:
    """The same store from another rank's process."""
    timeout = datetime.timedelta(seconds=timeout_s)
    return TCPStore(_HOST, port, is_master=False, timeout=timeout, wait_for_workers=False)


def _make_backend(store: Store, rank: int, size: int, device: torch.device, timeout: datetime.timedelta) -> Any:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        nccl: Any = distributed.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = timeout
        return nccl(store, rank, size, options)
    gloo: Any = distributed.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    options._devices = [gloo.create_device(hostname=_HOST)]
    return gloo(store, rank, size, options)
