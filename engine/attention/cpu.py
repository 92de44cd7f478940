"""The `cpu` backend: numba kernels that read KV blocks in place, on as many threads as torch uses at the time.

One engine's thread calls it. With one thread no thread pool is involved; with more, numba's OpenMP layer is used, which
unlike its work queue may be entered by several threads (two engines in one process), and whose pool is torch's own
(see `engine`).
"""

from __future__ import annotations

import importlib

import numba
import numpy as np
import numpy.typing as npt
import torch

from engine import cpu_kernels
from engine.attention.base import AttentionContext, GroupMetadata
from engine.cpu_kernels.views import elements
from engine.kv.layout import KVLayout

_UNBOUNDED = 1 << 30


class CpuAttention:
    """`AttentionBackend` for float32 and bfloat16 pools in host memory."""

    def __init__(self) -> None:
        self._max_threads: int = numba.config.NUMBA_NUM_THREADS if _has_openmp() else 1
        if self._max_threads > 1:
            numba.config.THREADING_LAYER = "omp"

    def prepare(self, layout: KVLayout) -> None:
        """Compile the kernels, or load them from disk, by attending once over a small pool of the layout's kind."""
        pages = torch.zeros((2, 2, layout.num_kv_heads, layout.block_size, layout.head_dim), dtype=layout.dtype)
        tokens = torch.zeros((3, layout.num_kv_heads, layout.head_dim), dtype=layout.dtype)
        group = GroupMetadata(
            torch.ones((2, 1), dtype=torch.int32), torch.full((3,), layout.block_size, dtype=torch.int64)
        )
        context = AttentionContext(
            kv=pages[None],
            layout=layout,
            cu_seqlens_q=torch.tensor([0, 1, 3], dtype=torch.int32),
            seq_lens=torch.tensor([1, 2], dtype=torch.int32),
            groups=(group,),
            max_query_len=2,
            max_seq_len=2,
        )
        self.write(tokens, tokens, pages, group)
        num_threads = torch.get_num_threads()
        for count in {1, min(2, self._max_threads)}:
            torch.set_num_threads(count)
            self.attend(tokens, pages, group, context, scale=1.0, window=None, softcap=None, sinks=None)
        torch.set_num_threads(num_threads)

    def write(self, key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, group: GroupMetadata) -> None:
        cpu_kernels.write(
            elements(key.to(pages.dtype).contiguous()),
            elements(value.to(pages.dtype).contiguous()),
            elements(pages),
            group.slot_mapping.numpy(),
        )

    def attend(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        group: GroupMetadata,
        context: AttentionContext,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        cu_seqlens_q = context.cu_seqlens_q.numpy()
        work = cpu_kernels.Work(
            items=cpu_kernels.plan(cu_seqlens_q, query.shape[1] // pages.shape[2]),
            tables=group.block_tables.numpy(),
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=context.seq_lens.numpy(),
        )
        rule = cpu_kernels.Rule(
            scale=np.float32(scale),
            window=_UNBOUNDED if window is None else window,
            softcap=np.float32(softcap or 0.0),
            sinks=_finite_sinks(sinks, query.shape[1]),
        )
        out = torch.empty(query.shape, dtype=torch.float32)
        arguments = (work, query.float().contiguous().numpy(), elements(pages), rule, out.numpy())
        num_threads = min(torch.get_num_threads(), self._max_threads)
        if num_threads == 1:
            cpu_kernels.attend(*arguments)
        else:
            numba.set_num_threads(num_threads)
            cpu_kernels.attend_parallel(*arguments)
        return out.to(query.dtype)


def _finite_sinks(sinks: torch.Tensor | None, num_heads: int) -> npt.NDArray[np.float32]:
    if sinks is None:
        return np.full(num_heads, cpu_kernels.LOWEST, np.float32)
    finite: npt.NDArray[np.float32] = np.maximum(sinks.detach().float().numpy(), cpu_kernels.LOWEST)
    return finite


def _has_openmp() -> bool:
    """Whether numba's OpenMP layer loads: it needs the system's libgomp."""
    try:
        importlib.import_module("numba.np.ufunc.omppool")
    except ImportError:
        return False
    return True
