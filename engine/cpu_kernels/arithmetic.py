"""Scalars and rows: widening, exp, tanh, and a step of an online softmax, written so that loops over them vectorise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.core import types
from numba.extending import overload

from engine.cpu_kernels.compiling import kernel

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
PageArray = npt.NDArray[Any]

# Stands for minus infinity: exp(LOWEST - x) vanishes for every logit x.
LOWEST = np.float32(-1e30)
ZERO = np.float32(0.0)
ONE = np.float32(1.0)


def widen(element: Any) -> Any:
    """float32 of a page's element; only ever compiled."""


def widen_by_type(element: Any) -> Callable[[Any], Any]:
    def shift(element: Any) -> Any:
        return np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)

    def keep(element: Any) -> Any:
        return element

    return shift if element == types.uint16 else keep


overload(widen, inline="always", strict=False)(widen_by_type)


@kernel
def exp(x: np.float32) -> np.float32:
    """exp(x) for x <= 0, to 1e-6 of its value; a loop over it vectorises, which one over np.exp does not.

    2^n * 2^f, with the Taylor series of 2^f on |f| <= 1/2 and n put into the exponent bits.
    """
    scaled = max(x, np.float32(-87.0)) * np.float32(1.4426950408889634)
    whole = np.floor(scaled + np.float32(0.5))
    f = scaled - whole
    series = np.float32(1.5403530e-4)
    series = series * f + np.float32(1.3333558e-3)
    series = series * f + np.float32(9.6181291e-3)
    series = series * f + np.float32(5.5504109e-2)
    series = series * f + np.float32(2.4022651e-1)
    series = series * f + np.float32(6.9314718e-1)
    series = series * f + ONE
    result: np.float32 = series * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return result


@kernel
def tanh(x: np.float32) -> np.float32:
    """tanh(x) to a few units in the last place: the rational approximation of Eigen, which vectorises."""
    x = min(max(x, np.float32(-7.90531110763549805)), np.float32(7.90531110763549805))
    y = x * x
    top = np.float32(-2.76076847742355e-16)
    top = top * y + np.float32(2.00018790482477e-13)
    top = top * y + np.float32(-8.60467152213735e-11)
    top = top * y + np.float32(5.12229709037114e-08)
    top = top * y + np.float32(1.48572235717979e-05)
    top = top * y + np.float32(6.37261928875436e-04)
    top = top * y + np.float32(4.89352455891786e-03)
    bottom = np.float32(1.19825839466702e-06)
    bottom = bottom * y + np.float32(1.18534705686654e-04)
    bottom = bottom * y + np.float32(2.26843463243900e-03)
    bottom = bottom * y + np.float32(4.89352518554385e-03)
    return x * top / bottom


@kernel
def softmax_step(logits: FloatArray, peak: np.float32, mass: np.float32) -> tuple[np.float32, np.float32, np.float32]:
    """One step of an online softmax over a row: logits become weights relative to the new peak.

    Returns the new peak and mass, and the factor that what was summed before is to be multiplied by.
    (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.)
    """
    new_peak = peak
    for index in range(logits.shape[0]):
        new_peak = max(new_peak, logits[index])
    total = ZERO
    for index in range(logits.shape[0]):
        weight = exp(logits[index] - new_peak)
        logits[index] = weight
        total += weight
    decay = exp(peak - new_peak)
    return new_peak, mass * decay + total, decay
