"""Kernels draw the numbers of `engine.philox`."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from engine.kernels.philox import uniform
from engine.philox import uniforms
from tests.engine.kernels.interpreter import DEVICE

NUMBERS = 64


@triton.jit
def draw(numbers, seeds, streams, positions, COUNT: tl.constexpr):
    each = tl.arange(0, COUNT)
    drawn = uniform(tl.load(seeds + each), tl.load(streams + each), tl.load(positions + each))
    tl.store(numbers + each, drawn)


def test_numbers_are_equal_bit_for_bit() -> None:
    generator = np.random.default_rng(0)
    seeds = generator.integers(0, 2**64, NUMBERS, np.uint64)
    seeds[:3] = 0, 1, 2**64 - 1
    streams, positions = (generator.integers(0, 2**32, NUMBERS, np.uint64) for _ in range(2))
    numbers = torch.zeros(NUMBERS, dtype=torch.float64, device=DEVICE)
    words = (torch.from_numpy(word.astype(np.int64)).to(DEVICE) for word in (seeds, streams, positions))
    draw[(1,)](numbers, *words, COUNT=NUMBERS)
    assert np.array_equal(numbers.cpu().numpy(), uniforms(seeds, streams, positions))
