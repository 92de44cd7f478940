"""Calls of attention that are measured: decodes, prompts, and a chunk of a long prompt after all before it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch

from bench.kernels import Shape
from engine.kv.layout import KVGroup, KVLayout

NUM_HEADS = 32
NUM_KV_HEADS = 8
DECODES = tuple(
    Shape(batch, 1, context)
    for context, batch in itertools.product((1024, 4096, 16384, 65536, 131072), (1, 4, 16, 64, 256))
)
PREFILLS = (*(Shape(1, tokens, tokens) for tokens in (2048, 8192, 32768)), Shape(1, 2048, 32768))


def layout(
    block_size: int, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16, num_kv_heads: int = NUM_KV_HEADS
) -> KVLayout:
    """One layer's pool."""
    return KVLayout((KVGroup((0,)),), num_kv_heads, head_dim, block_size, dtype)


def fitting(shapes: Iterable[Shape], pool: KVLayout, memory_bytes: int) -> Iterator[Shape]:
    """Those whose keys and values take at most `memory_bytes`."""
    for shape in shapes:
        if shape.sequences * pool.num_blocks(shape.context) * pool.block_bytes <= memory_bytes:
            yield shape
