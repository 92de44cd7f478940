"""What is measured: decodes and prompts of a layer with 32 query and 8 key/value heads of 128 dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from bench.kernels import Shape
from engine.kv.layout import KVGroup, KVLayout

NUM_HEADS = 32
NUM_KV_HEADS = 8
CONTEXTS = (1024, 4096, 16384, 65536, 131072)
BATCHES = (1, 4, 16, 64, 256)
PROMPTS = (2048, 8192, 32768)
# A chunk of a long prompt, after what was computed before.
CHUNK = Shape(1, 2048, 32768)


def layout(block_size: int, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> KVLayout:
    """One layer's pool."""
    return KVLayout((KVGroup((0,)),), NUM_KV_HEADS, head_dim, block_size, dtype)


def decodes(pool: KVLayout, memory_bytes: int) -> Iterator[Shape]:
    """Batches of decodes whose keys and values take at most `memory_bytes`."""
    for context, batch in itertools.product(CONTEXTS, BATCHES):
        if batch * pool.num_blocks(context) * pool.block_bytes <= memory_bytes:
            yield Shape(batch, 1, context)


def prefills() -> Iterator[Shape]:
    """Whole prompts, and a chunk."""
    for tokens in PROMPTS:
        yield Shape(1, tokens, tokens)
    yield CHUNK
