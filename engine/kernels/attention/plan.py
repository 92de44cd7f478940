"""How one launch of attention is cut into programs: decided on the host from shapes, without waiting for the GPU."""

from __future__ import annotations

import dataclasses

from engine.kernels.gpu import Gpu
from engine.kernels.shapes import next_power_of_2
from engine.kernels.tiles import AttentionTile, attention_tile, invariant_tile

# Programs that a processor should have at the least before a context is worth splitting, and the shortest segment:
# merging costs a launch and a pass over the partial results.
_PROGRAMS_PER_PROCESSOR = 2
_MIN_SEGMENT_TOKENS = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """
    Attributes:
        tile: with at least as many rows as a group has query heads.
        query_blocks: programs along the tokens.
        segments: programs along the keys; 1 for no split.
        decode: whether every sequence has exactly one query.
    """

    tile: AttentionTile
    query_blocks: int
    segments: int
    decode: bool


def plan(
    gpu: Gpu,
    *,
    num_tokens: int,
    num_sequences: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    itemsize: int,
    max_query_len: int,
    max_seq_len: int,
    window: int | None,
    batch_invariant: bool,
    tile: AttentionTile | None = None,
) -> Plan:
    """Cut a step's attention in one layer.

    In batch-invariant mode neither the tile nor the order of a row's sums depends on the batch: contexts are not split.

    A CUDA graph keeps the plan that it was captured with. It is right for all batches of the same number of tokens and
    sequences and of the same `max_query_len`, with contexts of any length. `max_seq_len` only decides in how many
    segments contexts are split, so whoever captures gives the longest that is to be served well, such as the model's.

    Args:
        max_query_len: most queries of a sequence; at least that.
        max_seq_len: longest context, or about that.
        group: query heads of a key/value head.
        head_dim: rounded up to a power of two.
        itemsize: bytes of a pool's element.
        tile: instead of the table's.

    Raises:
        ValueError: heads are wider than the kernels are made for.
    """
    if tile is None and batch_invariant:
        tile = invariant_tile(gpu.architecture, head_dim=head_dim, itemsize=itemsize)
    elif tile is None:
        tile = attention_tile(gpu.architecture, rows=max_query_len * group, head_dim=head_dim, itemsize=itemsize)
    tile = dataclasses.replace(tile, rows=max(tile.rows, next_power_of_2(group)))
    tokens = tile.rows // group
    decode = max_query_len == 1 and num_tokens == num_sequences
    query_blocks = num_sequences if decode else num_tokens // tokens + num_sequences
    longest = max_seq_len
    if window is not None:
        # The rows of a block see so many keys together, from the beginning of a tile on.
        longest = min(max_seq_len, window + tokens + tile.keys - 2)
    segments = 1
    if not batch_invariant:
        wanted = gpu.num_processors * _PROGRAMS_PER_PROCESSOR
        segments = max(1, min(wanted // (query_blocks * num_kv_heads), longest // _MIN_SEGMENT_TOKENS))
    return Plan(tile, query_blocks, segments, decode)
