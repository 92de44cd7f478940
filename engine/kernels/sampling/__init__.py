"""Draws the next token of each row of logits: `choose` launches it, `threshold` finds what filters leave."""

from __future__ import annotations

from engine.kernels.sampling.choose import choose

__all__ = ["choose"]
