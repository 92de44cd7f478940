"""The `cpu` backend: numba kernels that read KV blocks in place, on as many threads as torch uses at the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch

from engine import cpu_kernels
from engine.attention.base import AttentionContext, GroupMetadata
from engine.cpu_kernels.threads import use_threads
from engine.cpu_kernels.views import elements
from engine.dry_run import LayerAttention
from engine.kv.layout import KVLayout

_UNBOUNDED = 1 << 30


class CpuAttention:
    """`AttentionBackend` for float32 and bfloat16 pools in host memory."""

    def prepare(self, layout: KVLayout, layers: Sequence[LayerAttention]) -> None:
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
        self.attend(tokens, pages, group, context, scale=1.0, window=None, softcap=None, sinks=None)

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
        work = step_work(context, group, query.shape[1] // pages.shape[2])
        rule = make_rule(query.shape[1], scale=scale, window=window, softcap=softcap, sinks=sinks)
        out = torch.empty(query.shape, dtype=torch.float32)
        arguments = (work, query.float().contiguous().numpy(), elements(pages), rule, out.numpy())
        use_threads()
        cpu_kernels.attend(*arguments)
        return out.to(query.dtype)


def step_work(context: AttentionContext, group: GroupMetadata, group_size: int) -> cpu_kernels.Work:
    """The step's attention as work items, the same for all layers of a group; `group_size` is Hq / Hkv."""
    key = (id(group), group_size)
    if (work := context.derived.get(key)) is None:
        cu_seqlens_q = context.cu_seqlens_q.numpy()
        work = context.derived[key] = cpu_kernels.Work(
            items=cpu_kernels.plan(cu_seqlens_q, group_size),
            tables=group.block_tables.numpy(),
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=context.seq_lens.numpy(),
        )
    return cast(cpu_kernels.Work, work)


def make_rule(
    num_heads: int, *, scale: float, window: int | None, softcap: float | None, sinks: torch.Tensor | None
) -> cpu_kernels.Rule:
    """A layer's rule as kernels take it; arguments as of `AttentionBackend.attend`."""
    if sinks is None:
        finite = np.full(num_heads, cpu_kernels.LOWEST, np.float32)
    else:
        finite = np.maximum(sinks.detach().float().numpy(), cpu_kernels.LOWEST)
    return cpu_kernels.Rule(
        scale=np.float32(scale),
        window=_UNBOUNDED if window is None else window,
        softcap=np.float32(softcap or 0.0),
        sinks=finite,
    )
