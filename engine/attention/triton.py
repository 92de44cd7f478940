"""The `triton` backend: kernels that read KV blocks in place on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from engine.attention.base import AttentionContext, GroupMetadata
from engine.dry_run import LayerAttention
from engine.kernels.attention import Batch, attend
from engine.kernels.pages import write
from engine.kv.layout import KVLayout

# More queries than a decode's tile has rows, and so long a context that one sequence's is split.
_CHUNK_TOKENS = 32
_SPLIT_TOKENS = 2048


class TritonAttention:
    """`AttentionBackend` for float32, float16 and bfloat16 pools on a GPU, with heads of at most 256 dimensions."""

    def __init__(self, *, batch_invariant: bool = False) -> None:
        """`batch_invariant`: whether a token's output must not depend on the batch, to the bit."""
        self._batch_invariant = batch_invariant

    def prepare(self, layout: KVLayout, layers: Sequence[LayerAttention]) -> None:
        """Compile the kernels, or load them from disk: for each kind of layer, for decodes and for chunks of a few
        tokens and of many, split or not."""
        for layer, queries, max_seq_len in itertools.product(
            set(layers), (1, 2, _CHUNK_TOKENS), (_CHUNK_TOKENS, _SPLIT_TOKENS)
        ):
            self._try(layout, layer, queries, max_seq_len)

    def _try(self, layout: KVLayout, layer: LayerAttention, queries: int, max_seq_len: int) -> None:
        """Write and attend once: one sequence, in the second block of a small pool and those after it."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        num_blocks = layout.num_blocks(queries)
        pages = torch.zeros(layout.pool_shape(num_blocks + 1)[1:], dtype=layout.dtype, device=device)
        key = torch.zeros((queries, layout.num_kv_heads, layout.head_dim), dtype=layout.dtype, device=device)
        query = key.new_zeros((queries, layer.num_heads, layout.head_dim))
        group = GroupMetadata(
            torch.arange(1, num_blocks + 1, dtype=torch.int32, device=device)[None],
            torch.arange(queries, device=device) + layout.block_size,
        )
        context = AttentionContext(
            kv=pages[None],
            layout=layout,
            cu_seqlens_q=torch.tensor([0, queries], dtype=torch.int32, device=device),
            seq_lens=torch.tensor([queries], dtype=torch.int32, device=device),
            groups=(group,),
            max_query_len=queries,
            max_seq_len=max_seq_len,
        )
        self.write(key, key, pages, group)
        self.attend(
            query,
            pages,
            group,
            context,
            scale=1.0,
            window=layer.window,
            softcap=layer.softcap,
            sinks=key.new_zeros(layer.num_heads) if layer.has_sinks else None,
        )

    def write(self, key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, group: GroupMetadata) -> None:
        write(_with_adjacent_elements(key), _with_adjacent_elements(value), pages, group.slot_mapping)

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
        batch = Batch(
            block_tables=group.block_tables,
            cu_seqlens_q=context.cu_seqlens_q,
            seq_lens=context.seq_lens,
            max_query_len=context.max_query_len,
            max_seq_len=context.max_seq_len,
        )
        out = attend(
            _with_adjacent_elements(query).to(pages.dtype),
            pages,
            batch,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=None if sinks is None else sinks.detach(),
            batch_invariant=self._batch_invariant,
        )
        return out.to(query.dtype)


def _with_adjacent_elements(heads: torch.Tensor) -> torch.Tensor:
    """[T, heads, D] with a head's elements next to each other: copied only if they are not."""
    return heads if heads.stride(2) == 1 else heads.contiguous()
