"""How the KV bytes of a model lie in a pool.

Layers are split into groups: all layers of a group attend over the same positions (everything, or a sliding window), so
they share block tables. A block of a group is one page in each of the group's layers; the i-th layer of *every* group
lives in slot i of the pool, so that one pool of equal blocks serves whatever the mix (Jenga; vLLM's hybrid KV cache
manager).

    pool tensor: [num_slots, num_blocks, 2 (K, V), num_kv_heads, block_size, head_dim]
    page:        pool[slot, block], one contiguous run of bytes, [K|V][kv head][token][dim]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

NULL_BLOCK = 0


@dataclasses.dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share block tables.

    Attributes:
        layers: model layer indices; the i-th lives in slot i.
        window: a query at position p sees keys in (p - window, p]; None sees all of [0, p].
    """

    layers: tuple[int, ...]
    window: int | None = None

    def first_visible(self, position: int) -> int:
        """First key position that a query at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def describe(self) -> str:
        kind = "full" if self.window is None else f"sliding({self.window})"
        return f"{kind}:{','.join(map(str, self.layers))}"


@dataclasses.dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape and grouping of a pool; equal layouts can exchange pages byte for byte."""

    groups: tuple[KVGroup, ...]
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def num_layers(self) -> int:
        return sum(len(group.layers) for group in self.groups)

    @property
    def num_slots(self) -> int:
        """Pages in one block: the layers of the largest group."""
        return max(len(group.layers) for group in self.groups)

    @property
    def page_bytes(self) -> int:
        """Bytes of one (slot, block)."""
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all slots: what one more block costs."""
        return self.page_bytes * self.num_slots

    def pool_shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        return (self.num_slots, num_blocks, 2, self.num_kv_heads, self.block_size, self.head_dim)

    def location(self, layer: int) -> tuple[int, int]:
        """(group, slot) of a model layer."""
        for group_index, group in enumerate(self.groups):
            if layer in group.layers:
                return group_index, group.layers.index(layer)
        raise AssertionError(f"layer {layer} is in no group")

    def num_blocks(self, num_tokens: int) -> int:
        """Logical blocks that `num_tokens` tokens span."""
        return -(-num_tokens // self.block_size)


def group_layers(windows: Sequence[int | None]) -> tuple[KVGroup, ...]:
    """Groups for a model whose i-th layer has `windows[i]` (None: full attention).

    With one kind of layer, one group. Else the group size is the smallest count of a kind, or the largest where it is
    less than 1.5 times the smallest (a few padded pages beat many groups), and each kind is cut into groups of at most
    that size.
    """
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(window, []).append(layer)
    counts = [len(layers) for layers in kinds.values()]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    ordered = sorted(kinds.items(), key=lambda item: (item[0] is not None, item[0] or 0))
    return tuple(
        KVGroup(tuple(layers[start : start + size]), window)
        for window, layers in ordered
        for start in range(0, len(layers), size)
    )
