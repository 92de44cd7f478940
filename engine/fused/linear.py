"""Linear layers that keep their weights as kernels read them: our own in float32, oneDNN's in bfloat16.

oneDNN makes a kernel for each new number of rows in about a millisecond and keeps the last thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from engine.cpu_kernels.arithmetic import FloatArray, PageArray
from engine.cpu_kernels.product import multiply_all, pack
from engine.cpu_kernels.threads import use_threads

# What the blocking is chosen for; it hardly matters.
_TYPICAL_ROWS = 32

_pack = torch.ops.mkldnn._reorder_linear_weight.default
_product = torch.ops.mkldnn._linear_pointwise.default
_binary = torch.ops.mkldnn._linear_pointwise.binary


def has_kernels(dtype: torch.dtype) -> bool:
    """Whether products in `dtype` are our own kernels'."""
    return dtype == torch.float32


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU computes in `dtype` without emulating it."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class PackedLinear(torch.nn.Module):
    """Stands for one linear layer, or for several that read the same input, side by side; oneDNN keeps the weights."""

    def __init__(self, linears: Sequence[torch.nn.Linear]) -> None:
        """Copies the weights; biases are all there or all absent."""
        super().__init__()
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        weights: list[torch.Tensor] = [linear.weight.detach() for linear in linears]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        assert len(biases) in (0, len(linears))
        self._weight = _pack(weight.contiguous(), _TYPICAL_ROWS)
        self._bias = torch.cat(tuple(biases)).detach() if biases else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x @ W.T + b; x [..., in]."""
        return cast(torch.Tensor, _product(x, self._weight, self._bias, "none", [], ""))

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """x @ W.T + b + residual, added while the product is still in registers; residual [..., out]."""
        return cast(torch.Tensor, _binary(x, residual, self._weight, self._bias, "add"))


class PanelLinear(torch.nn.Module):
    """Stands for one float32 linear layer; a row's result is the same to the bit whatever rows are beside it."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        """Copies the weights."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._panels, self._biases = pack_linear(linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x @ W.T + b; x [..., in]."""
        rows = x.reshape(-1, self.in_features)
        out = torch.empty((len(rows), self.out_features))
        multiply_all(rows.contiguous().numpy(), self._panels, self._biases, out.numpy(), use_threads())
        return out.view(*x.shape[:-1], self.out_features)


def pack_linear(linear: torch.nn.Linear) -> tuple[PageArray, FloatArray]:
    """A float32 linear layer as kernels take it; copies the weights."""
    return pack(linear.weight.detach().numpy(), None if linear.bias is None else linear.bias.detach().numpy())


def pack_linears(module: torch.nn.Module) -> None:
    """Replace every linear layer below `module`, in one of the dtypes of `can_pack`, and compile what they call."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                packed = PanelLinear(child) if has_kernels(child.weight.dtype) else PackedLinear([child])
                packed(torch.zeros((1, packed.in_features), dtype=child.weight.dtype))
                setattr(parent, name, packed)
