"""What every part of the benchmark is given, and what it leaves."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, NamedTuple

import torch

from bench.checkpoint import make_checkpoint, make_model
from bench.gpu.scale import Scale
from bench.gpu.timing import copy_bandwidth, gemm_rate
from bench.report import TableText


class Found(NamedTuple):
    """What a part has measured: tables for the terminal, and plain JSON values."""

    tables: list[TableText]
    results: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Stand:
    """
    Attributes:
        folder: where models are written; whoever made it removes it.
        block_size: tokens of a KV block.
        copy_bytes_per_s: read and written together.
    """

    device: torch.device
    scale: Scale
    folder: pathlib.Path
    block_size: int
    copy_bytes_per_s: float
    gemm_flops_per_s: float

    @classmethod
    def make(cls, device: torch.device, scale: Scale, folder: pathlib.Path, block_size: int) -> Stand:
        """Measures what the device can do."""
        return cls(device, scale, folder, block_size, copy_bandwidth(device), gemm_rate(device, scale.dtype))

    @property
    def title(self) -> str:
        """The device and its limits."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        copies, products = self.copy_bytes_per_s / 1e12, self.gemm_flops_per_s / 1e12
        return f"{name}: a copy moves {copies:.3g} TB/s, read and written; a product runs at {products:.3g} TFLOP/s"

    def large_model(self) -> pathlib.Path:
        """The large model's checkpoint, without a tokenizer; made on the device when it is first asked for."""
        path = self.folder / "large"
        if not path.exists():
            make_model(self.scale.large, 0, self.device).save_pretrained(path)
        return path

    def small_model(self) -> pathlib.Path:
        """The small model's, as servers load it."""
        path = self.folder / "small"
        if not path.exists():
            make_checkpoint(path, self.scale.small, device=self.device)
        return path
