"""Attention over KV blocks in place: `attend` launches it, `plan` cuts it into programs, the rest are its kernels."""

from __future__ import annotations

from engine.kernels.attention.launch import Batch, attend

__all__ = ["Batch", "attend"]
