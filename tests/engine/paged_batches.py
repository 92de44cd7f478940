"""Random ragged batches over a paged pool, with NaN wherever attention must not look, and their dense answer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from engine.attention import AttentionBackend, AttentionContext, GroupMetadata
from engine.kv.layout import NULL_BLOCK, KVGroup, KVLayout


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Heads, blocks and masking of a batch."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    sinks: tuple[float, ...] | None = None

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


class PagedBatch:
    """Sequences of (cached tokens, query tokens), whose cached tokens lie in shuffled blocks of a pool already.

    Blocks that the window has passed are freed: their table entries are null, and the pool there, as everywhere that no
    visible token lies, is NaN.
    """

    def __init__(self, shape: Shape, sequences: Sequence[tuple[int, int]], seed: int = 0) -> None:
        self.shape = shape
        self.sequences = sequences
        generator = torch.Generator().manual_seed(seed)
        lengths = [cached + new for cached, new in sequences]
        self.query, self.key, self.value = (
            [torch.randn(length, heads, shape.head_dim, generator=generator).to(shape.dtype) for length in lengths]
            for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        )
        counts = [-(-length // shape.block_size) for length in lengths]
        free = (torch.randperm(sum(counts) + 3, generator=generator) + 1).tolist()
        layout = KVLayout(
            (KVGroup((0,), shape.window),), shape.num_kv_heads, shape.head_dim, shape.block_size, shape.dtype
        )
        self.kv = torch.full(layout.pool_shape(len(free) + 1), float("nan"), dtype=shape.dtype)
        tables = torch.full((len(sequences), max(counts)), NULL_BLOCK, dtype=torch.int32)
        slots = []
        for index, (cached, _) in enumerate(sequences):
            first = layout.groups[0].first_visible(cached)
            for ordinal in range(first // shape.block_size, counts[index]):
                tables[index, ordinal] = free.pop()
            for position in range(first, lengths[index]):
                block, offset = int(tables[index, position // shape.block_size]), position % shape.block_size
                if position < cached:
                    self.kv[0, block, 0, :, offset] = self.key[index][position]
                    self.kv[0, block, 1, :, offset] = self.value[index][position]
                else:
                    slots.append(block * shape.block_size + offset)
        self.group = GroupMetadata(tables, torch.tensor(slots))
        new = [count for _, count in sequences]
        self.context = AttentionContext(
            kv=self.kv,
            layout=layout,
            cu_seqlens_q=torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            groups=(self.group,),
            max_query_len=max(new),
            max_seq_len=max(lengths),
        )

    def run(self, backend: AttentionBackend) -> torch.Tensor:
        """Write the new tokens and attend: [T, Hq, D]."""
        shape = self.shape
        backend.write(self._new(self.key), self._new(self.value), self.kv[0], self.group)
        return backend.attend(
            self._new(self.query),
            self.kv[0],
            self.group,
            self.context,
            scale=shape.scale,
            window=shape.window,
            softcap=shape.softcap,
            sinks=None if shape.sinks is None else torch.tensor(shape.sinks),
        )

    def expected(self) -> torch.Tensor:
        """The same in float64, one head and query at a time: [T, Hq, D]."""
        rows = []
        for (cached, new), query, key, value in zip(self.sequences, self.query, self.key, self.value, strict=True):
            rows += [self._expected_row(query, key, value, position) for position in range(cached, cached + new)]
        return torch.stack(rows)

    def _expected_row(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: int) -> torch.Tensor:
        shape = self.shape
        first = 0 if shape.window is None else max(0, position - shape.window + 1)
        heads = []
        for head in range(shape.num_heads):
            kv_head = head * shape.num_kv_heads // shape.num_heads
            keys, values = (side[first : position + 1, kv_head].double() for side in (key, value))
            logits = keys @ query[position, head].double() * shape.scale
            if shape.softcap is not None:
                logits = shape.softcap * torch.tanh(logits / shape.softcap)
            sink = torch.tensor([-torch.inf if shape.sinks is None else shape.sinks[head]], dtype=torch.float64)
            heads.append(torch.softmax(torch.cat([logits, sink]), 0)[:-1] @ values)
        return torch.stack(heads)

    def _new(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The step's tokens, flattened, with the strides that models give: [1, heads, T, D] transposed."""
        flat = torch.cat([tensor[cached:] for tensor, (cached, _) in zip(tensors, self.sequences, strict=True)])
        return flat.transpose(0, 1).contiguous().transpose(0, 1)
