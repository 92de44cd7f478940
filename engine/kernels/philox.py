"""Counter-based random numbers in kernels: those of `engine.philox`, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def uniform(seed, stream, position):
    """One number in [0, 1) with 53 random bits: float64; seed of 64 bits, stream and position below 2**32."""
    zero = tl.full((), 0, tl.uint32)
    first, second, _, _ = tl.philox(seed, position.to(tl.uint32), stream.to(tl.uint32), zero, zero)
    mantissa = ((first >> 5).to(tl.uint64) << 26) | (second >> 6).to(tl.uint64)
    return mantissa.to(tl.float64) * (1.0 / (1 << 53))
