"""Attention backends over the paged KV pool, by name."""

from __future__ import annotations

import importlib
import logging
from typing import Any, cast

import torch

from engine.attention.base import AttentionBackend, AttentionContext, GroupMetadata
from engine.kernels.tiles import MAX_HEAD_DIM

logger = logging.getLogger(__name__)

BACKENDS = {
    "reference": "engine.attention.reference:ReferenceAttention",
    "cpu": "engine.attention.cpu:CpuAttention",
    "triton": "engine.attention.triton:TritonAttention",
}
# The kind of device that a backend needs, and the widest heads that it takes; one that is not named takes any.
_DEVICES = {"cpu": "cpu", "triton": "cuda"}
_MAX_HEAD_DIMS = {"triton": MAX_HEAD_DIM}


def backends_of(device: torch.device) -> list[str]:
    """Names of the backends that run on a device."""
    return [name for name in BACKENDS if _DEVICES.get(name, device.type) == device.type]


def resolve_backend(name: str, device: torch.device, *, head_dim: int = 0) -> str:
    """The backend that `name` means on a device; "auto" is the fastest that runs there.

    Args:
        head_dim: dimensions of the model's heads.

    Raises:
        ValueError: there is no such backend, or it does not do.
    """
    if name == "auto":
        fastest = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
        if head_dim <= _MAX_HEAD_DIMS.get(fastest, head_dim):
            return fastest
        logger.warning("attention is slow: no kernels are made for heads of %d dimensions", head_dim)
        return "reference"
    if name not in BACKENDS:
        raise ValueError(f"attention: unknown backend {name!r}; there are auto, {', '.join(BACKENDS)}")
    if name not in backends_of(device):
        raise ValueError(f"attention: backend {name!r} cannot run on device {device}")
    if head_dim > (most := _MAX_HEAD_DIMS.get(name, head_dim)):
        raise ValueError(
            f"attention: backend {name!r} has kernels for heads of at most {most} dimensions, not {head_dim}"
        )
    return name


def make_backend(name: str, device: torch.device, **options: Any) -> AttentionBackend:
    """Make the backend that `name` means on a device, with its own options. Its module is imported only now."""
    module, _, class_name = BACKENDS[resolve_backend(name, device)].partition(":")
    return cast(AttentionBackend, getattr(importlib.import_module(module), class_name)(**options))


__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "AttentionContext",
    "GroupMetadata",
    "backends_of",
    "make_backend",
    "resolve_backend",
]
