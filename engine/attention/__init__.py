"""Attention backends over the paged KV pool, by name."""

from __future__ import annotations

import importlib
from typing import cast

import torch

from engine.attention.base import AttentionBackend, AttentionContext, GroupMetadata

BACKENDS = {
    "reference": "engine.attention.reference:ReferenceAttention",
    "cpu": "engine.attention.cpu:CpuAttention",
    "triton": "engine.attention.triton:TritonAttention",
}
# The kind of device that a backend needs; one that is not named here runs on any.
_DEVICES = {"cpu": "cpu", "triton": "cuda"}


def backends_of(device: torch.device) -> list[str]:
    """Names of the backends that run on a device."""
    return [name for name in BACKENDS if _DEVICES.get(name, device.type) == device.type]


def resolve_backend(name: str, device: torch.device) -> str:
    """The backend that `name` means on a device; "auto" is the fastest that runs there."""
    if name == "auto":
        return {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
    if name not in BACKENDS:
        raise ValueError(f"attention: unknown backend {name!r}; there are auto, {', '.join(BACKENDS)}")
    if name not in backends_of(device):
        raise ValueError(f"attention: backend {name!r} cannot run on device {device}")
    return name


def make_backend(name: str, device: torch.device) -> AttentionBackend:
    """Make the backend that `name` means on a device. Its module is imported only now."""
    module, _, class_name = BACKENDS[resolve_backend(name, device)].partition(":")
    return cast(AttentionBackend, getattr(importlib.import_module(module), class_name)())


__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "AttentionContext",
    "GroupMetadata",
    "backends_of",
    "make_backend",
    "resolve_backend",
]
