"""Tensors as numba sees them."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

_DTYPES = (torch.float32, torch.bfloat16)


def elements(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The tensor's memory as numpy sees it; bfloat16, which numpy lacks, as uint16."""
    assert tensor.dtype in _DTYPES, f"there are no CPU kernels for {tensor.dtype}"
    return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)).numpy()
