"""Arithmetic of tile sizes."""

from __future__ import annotations


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()
