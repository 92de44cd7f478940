"""What a device has to put in the place of a model's modules."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import torch

from engine.attention.base import AttentionBackend
from engine.dry_run import LayerAttention

# By attention backend, whose pages and dispatch the stand-ins work with; modules are imported when they are needed.
_KITS = {"cpu": "engine.fused.cpu_kit:CpuKit", "triton": "engine.fused.gpu_kit:GpuKit"}


# Of the largest number compared: float32 sums in another order, and bfloat16's eight bits a few roundings on.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Kit(Protocol):
    """Makes stand-ins for the modules of one model.

    Attributes:
        backend: the attention that stand-ins are proved with.
        layers_attend: whether its decoder layers read and write the pool themselves, without `backend`.
    """

    backend: AttentionBackend
    layers_attend: bool

    def make_layer(self, layer: torch.nn.Module, attention: LayerAttention, *, last: bool) -> torch.nn.Module | None:
        """A stand-in for a decoder layer, not proved yet; None where there is none.

        Args:
            attention: what the layer was seen to ask of attention.
            last: whether nothing follows that needs more than the rows whose logits are wanted.
        """

    def replace_rest(self, module: torch.nn.Module) -> None:
        """Replace, in place, what else of the model has a stand-in."""


def make_kit(backend: str, dtype: torch.dtype, *, batch_invariant: bool) -> Kit | None:
    """The kit that goes with an attention backend; None where modules stay as they are.

    Args:
        dtype: of the model.
        batch_invariant: whether a token's output must not depend on the batch, to the bit.
    """
    if backend not in _KITS:
        return None
    module, _, class_name = _KITS[backend].partition(":")
    return cast(Kit, getattr(importlib.import_module(module), class_name)(dtype, batch_invariant=batch_invariant))


def is_alike(wanted: torch.Tensor, got: torch.Tensor) -> bool:
    """Whether a stand-in's answer differs from the original's by rounding alone."""
    if wanted.shape != got.shape:
        return False
    return bool((wanted - got).abs().max() <= _TOLERANCE[wanted.dtype] * wanted.abs().max().clamp(min=1))
