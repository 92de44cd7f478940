"""A batch as plain arrays, in which form it reaches the other ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.batch import Batch
from engine.staging import Array


def batch_to_arrays(batch: Batch) -> list[Array]:
    """The batch's numbers, then its arrays, whose memory is shared."""
    numbers = np.array([len(batch.tables), batch.max_query_len, batch.max_seq_len], np.int64)
    columns: list[Array] = [batch.token_ids, batch.positions, batch.cu_seqlens_q, batch.seq_lens, batch.logit_rows]
    sources = [] if batch.sources is None else [batch.sources]
    return [numbers, *columns, *batch.tables, *batch.slots, *sources]


def batch_from_arrays(arrays: Sequence[Array]) -> Batch:
    """The batch of `batch_to_arrays`."""
    numbers, token_ids, positions, cu_seqlens_q, seq_lens, logit_rows, *rest = arrays
    num_groups, max_query_len, max_seq_len = numbers.tolist()
    tables, slots, sources = rest[:num_groups], rest[num_groups : 2 * num_groups], rest[2 * num_groups :]
    return Batch(
        token_ids=token_ids,
        positions=positions,
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=seq_lens,
        tables=tuple(tables),
        slots=tuple(slots),
        logit_rows=logit_rows,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        sources=sources[0] if sources else None,
    )
