"""Linear layers on a GPU, side by side where they read the same input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from engine.kernels.matmul import matmul
from engine.parallel.modules import Summed


class GpuLinear(torch.nn.Module):
    """Stands for one linear layer, or for several that read the same input; keeps what weights it does not copy."""

    def __init__(self, linears: Sequence[torch.nn.Linear], *, batch_invariant: bool) -> None:
        """
        Args:
            linears: weights of more than one are copied; biases are all there or all absent.
            batch_invariant: whether a row's result must not depend, to the bit, on what rows are beside it: the product
                is then our own kernel's, and cuBLAS's otherwise.
        """
        super().__init__()
        self._weight = _joined([linear.weight.detach() for linear in linears])
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        assert len(biases) in (0, len(linears))
        self._bias = _joined(biases) if biases else None
        self._batch_invariant = batch_invariant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x @ W.T + b; x [..., in]."""
        if not self._batch_invariant:
            return torch.nn.functional.linear(x, self._weight, self._bias)
        out = matmul(x.reshape(-1, x.shape[-1]), self._weight, self._bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual += x @ W.T + b, where residual is [T, out] and x [T, in]."""
        if self._batch_invariant:
            matmul(x, self._weight, self._bias, residual=residual)
        elif self._bias is None:
            residual.addmm_(x, self._weight.t())
        else:
            residual.add_(torch.nn.functional.linear(x, self._weight, self._bias))


def row_linear(module: Any, *, batch_invariant: bool) -> GpuLinear | Summed:
    """A linear layer's stand-in; one rank's summands are summed as before."""
    if isinstance(module, Summed):
        inner: Any = module.inner
        return module.around(GpuLinear([inner], batch_invariant=batch_invariant))
    return GpuLinear([module], batch_invariant=batch_invariant)


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
