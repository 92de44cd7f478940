"""Attention backends over the paged KV pool, by name."""

from __future__ import annotations

import importlib
from typing import cast

import torch

from engine.attention.base import AttentionBackend, AttentionContext, GroupMetadata

BACKENDS = {
    "reference": "engine.attention.reference:ReferenceAttention",
    "cpu": "engine.attention.cpu:CpuAttention",
}


def resolve_backend(name: str, device: torch.device) -> str:
    """The backend that `name` means on a device; "auto" is the fastest that runs there."""
    if name == "auto":
        return "cpu" if device.type == "cpu" else "reference"
    if name not in BACKENDS:
        raise ValueError(f"attention: unknown backend {name!r}; there are auto, {', '.join(BACKENDS)}")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"attention: backend 'cpu' cannot run on device {device}")
    return name


def make_backend(name: str, device: torch.device) -> AttentionBackend:
    """Make the backend that `name` means on a device. Its module is imported only now."""
    module, _, class_name = BACKENDS[resolve_backend(name, device)].partition(":")
    return cast(AttentionBackend, getattr(importlib.import_module(module), class_name)())


__all__ = ["BACKENDS", "AttentionBackend", "AttentionContext", "GroupMetadata", "make_backend", "resolve_backend"]
