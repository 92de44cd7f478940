"""Numba kernels: attention over KV blocks in place, through the block table, and what else a decoder layer computes.

Called by `engine.attention.cpu` and `engine.fused` on the engine's thread; they release the GIL. Pages are float32, or
bfloat16 seen as uint16 and widened by a shift. Blocks that no query of the step sees are not read, since NaN may lie
there.

Legend: T tokens of the step, S sequences, Hq query heads, Hkv key/value heads, D head dimension, B block size. The
query heads that share a key/value head are rows of one small matrix, so keys and values are never expanded.
"""

from __future__ import annotations

from engine.cpu_kernels.arithmetic import LOWEST
from engine.cpu_kernels.rule import Rule
from engine.cpu_kernels.work import Work, attend, plan, write

__all__ = ["LOWEST", "Rule", "Work", "attend", "plan", "write"]
