"""Counter-based random numbers: what is drawn depends on a key and a counter only, never on what was drawn before.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC'11), over numpy
arrays. The sampler calls it on the engine thread; it holds no state.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)


def philox4x32(counter: tuple[UInt64s, UInt64s, UInt64s, UInt64s], key: tuple[UInt64s, UInt64s]) -> tuple[UInt64s, ...]:
    """Four random 32-bit words for each element.

    Args:
        counter, key: 32-bit words in uint64 arrays that broadcast against each other.

    Returns:
        Four uint64 arrays of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _WORD_BITS) ^ c1 ^ k0,
            product1 & _LOW_WORD,
            (product0 >> _WORD_BITS) ^ c3 ^ k1,
            product0 & _LOW_WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW_WORD, (k1 + _KEY_STEPS[1]) & _LOW_WORD
    return c0, c1, c2, c3


def uniforms(seeds: UInt64s, streams: UInt64s, positions: UInt64s) -> npt.NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits for each (seed, stream, position).

    Args:
        seeds: any 64 bits; streams, positions: below 2**32. All of one shape.
    """
    zeros = np.zeros_like(positions)
    words = philox4x32((positions, streams, zeros, zeros), (seeds & _LOW_WORD, seeds >> _WORD_BITS))
    mantissa = ((words[0] >> np.uint64(5)) << np.uint64(26)) | (words[1] >> np.uint64(6))
    return mantissa.astype(np.float64) * 2.0**-53
