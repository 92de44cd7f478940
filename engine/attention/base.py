"""What attention over a paged pool needs, and what a backend must do.

One `AttentionContext` describes one step of one ragged batch and serves all layers; it is built by the model runner and
read by backends, on the engine's thread only.

Shape legend: T tokens of the step, S sequences, Hq query heads, Hkv key/value heads, D head dimension, B block size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from engine.dry_run import LayerAttention
from engine.kv.layout import KVLayout


@dataclasses.dataclass(frozen=True, slots=True)
class GroupMetadata:
    """Where the tokens of the batch live in the blocks of one layer group.

    Attributes:
        block_tables: int32 [S, max_blocks]; entry [s, p // B] is the block of position p of sequence s. Entries that a
            window has passed, and those past the sequence's end, are the null block, whose content must never matter.
        slot_mapping: int64 [T]; block * B + offset of each token of the step; below 0 for the padding of a step that is
            replayed on a GPU, which has no context either.
    """

    block_tables: torch.Tensor
    slot_mapping: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionContext:
    """One step of a ragged batch: sequence s has the tokens cu_seqlens_q[s] : cu_seqlens_q[s + 1] of the flattened row.

    Attributes:
        kv: the pool, [num_slots, num_blocks, 2, Hkv, B, D].
        layout: how the pool is laid out.
        cu_seqlens_q: int32 [S + 1].
        seq_lens: int32 [S]; context of each sequence, this step's tokens included.
        groups: one for each of `layout.groups`.
        max_query_len: most query tokens of one sequence; 1 means that every sequence decodes.
        max_seq_len: longest context.
        on_layer: called with a layer's index once its keys and values lie in the pool and its attention is done.
        derived: what a backend works out from all this at the step's first layer and keeps for the others.
    """

    kv: torch.Tensor
    layout: KVLayout
    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    groups: tuple[GroupMetadata, ...]
    max_query_len: int
    max_seq_len: int
    on_layer: Callable[[int], None] | None = None
    derived: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False)


class AttentionBackend(Protocol):
    """Writes keys and values into pages and attends over them. All methods are called by the engine's thread."""

    def prepare(self, layout: KVLayout, layers: Sequence[LayerAttention]) -> None:
        """Do once what the first step would otherwise wait for, such as compiling.

        Args:
            layers: what the model's decoder layers ask of attention.
        """

    def write(self, key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, group: GroupMetadata) -> None:
        """Store the step's tokens at the group's slot mapping.

        Args:
            key, value: [T, Hkv, D], any strides.
            pages: one slot of the pool, [num_blocks, 2, Hkv, B, D]; values are converted to its dtype.
        """

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
        """Causal attention of the step's queries over their sequences' pages, the step's own tokens included.

        With l_j = scale * q.k_j, passed through softcap * tanh(l / softcap) if given, a query at position i weighs keys
        j in (i - window, i] by exp(l_j) / (sum_k exp(l_k) + exp(sink of the head)). Query heads are grouped: head h
        reads key/value head h // (Hq / Hkv). Accumulates in float32; no other token of the pool matters, be it NaN.

        Args:
            query: [T, Hq, D], any strides.
            sinks: [Hq] learned logits that take probability but have no value (gpt-oss), or None.

        Returns:
            [T, Hq, D] in the query's dtype, contiguous.
        """
