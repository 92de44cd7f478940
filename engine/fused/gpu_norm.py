"""An RMS norm as one kernel."""

from __future__ import annotations

import torch

from engine.kernels.norm import rms_norm


class GpuRMSNorm(torch.nn.Module):
    """Stands for an RMS norm of rows [..., H]."""

    def __init__(self, weight: torch.Tensor, epsilon: float, offset: float = 0.0) -> None:
        """`weight` [H], to which `offset` is added (1 in gemma's)."""
        super().__init__()
        self._weight, self._epsilon, self._offset = weight, epsilon, offset

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The norm of x, or of x + residual, which `residual` then holds; [T, H] if there is one."""
        rows = x.reshape(-1, x.shape[-1])
        out = rms_norm(rows, self._weight, epsilon=self._epsilon, weight_offset=self._offset, residual=residual)
        return out.view(x.shape)
