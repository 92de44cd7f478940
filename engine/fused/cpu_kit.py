"""Stand-ins for a model on a CPU."""

from __future__ import annotations

from typing import Any

import torch

from engine.attention.cpu import CpuAttention
from engine.dry_run import LayerAttention
from engine.fused.decoder_layer import FusedDecoderLayer, Workspace
from engine.fused.linear import can_pack, has_kernels, pack_linears
from engine.fused.onednn_layer import OneDNNDecoderLayer
from engine.fused.shape import has_shape


class CpuKit:
    """`Kit` of numba's kernels in float32, and of oneDNN's products in bfloat16 where the CPU computes in it."""

    def __init__(self, dtype: torch.dtype, *, batch_invariant: bool) -> None:
        """`batch_invariant` changes nothing: what is here in float32 is so already."""
        self.backend = CpuAttention()
        self.layers_attend = has_kernels(dtype)
        self._dtype = dtype
        self._workspace: Workspace | None = None
        self._sizes: tuple[int, ...] = ()

    def make_layer(self, layer: Any, attention: LayerAttention, *, last: bool) -> torch.nn.Module | None:
        if not can_pack(self._dtype) or not has_shape(layer, attention):
            return None
        if not has_kernels(self._dtype):
            return OneDNNDecoderLayer(layer, attention, last=last)
        sizes = (
            layer.mlp.gate_proj.in_features,
            layer.mlp.gate_proj.out_features,
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_dim,
        )
        if self._workspace is None:
            self._workspace, self._sizes = Workspace(sizes[0], attention, sizes[1]), sizes
        # Layers share the workspace.
        return FusedDecoderLayer(layer, attention, self._workspace, last=last) if sizes == self._sizes else None

    def replace_rest(self, module: torch.nn.Module) -> None:
        if can_pack(self._dtype):
            pack_linears(module)
