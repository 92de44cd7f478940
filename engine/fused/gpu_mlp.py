"""A gated MLP on a GPU, as three launches."""

from __future__ import annotations

from typing import Any

import torch

from engine.fused.gpu_linear import GpuLinear, row_linear
from engine.kernels.gate import Activation, apply_gate


class GpuMLP(torch.nn.Module):
    """Stands for down(activation(gate(x)) * up(x))."""

    def __init__(self, mlp: Any, activation: Activation, *, batch_invariant: bool) -> None:
        """Copies the weights of gate and up; `mlp` is a `gated_mlp`. For `batch_invariant` see `GpuLinear`."""
        super().__init__()
        self._activation = activation
        self._gate_up = GpuLinear([mlp.gate_proj, mlp.up_proj], batch_invariant=batch_invariant)
        self._down = row_linear(mlp.down_proj, batch_invariant=batch_invariant)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        out: torch.Tensor = self._down(self._gated(x.reshape(-1, x.shape[-1])))
        return out.view(x.shape)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """residual += what the MLP makes of x; both [T, H]."""
        gated = self._gated(x)
        if isinstance(self._down, GpuLinear):
            self._down.add_to(residual, gated)
        else:
            residual.add_(self._down(gated))

    def _gated(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=1)
        return apply_gate(gate, up, self._activation)
