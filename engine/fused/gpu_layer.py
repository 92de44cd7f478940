"""One decoder layer of the Llama shape on a GPU, as nine launches: ten where few long contexts are split.

Nothing in it waits for the GPU, and what it launches follows from shapes and from the maxima of the step's context, so
that a CUDA graph can capture it.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.attention.paged import PagedDispatch
from engine.attention.triton import TritonAttention
from engine.dry_run import LayerAttention
from engine.fused.gpu_linear import GpuLinear, row_linear
from engine.fused.gpu_mlp import GpuMLP
from engine.fused.gpu_norm import GpuRMSNorm
from engine.kernels.rotary import rotate_and_write


class GpuDecoderLayer(torch.nn.Module):
    """Takes the place of a layer that `has_shape`; answers as it does, up to rounding."""

    def __init__(
        self, layer: Any, attention: LayerAttention, backend: TritonAttention, *, last: bool, batch_invariant: bool
    ) -> None:
        """Copies what weights it puts side by side.

        Args:
            attention: what the layer was seen to ask of attention.
            last: whether nothing follows that needs more than the rows whose logits are wanted.
            batch_invariant: as of `GpuLinear`.
        """
        super().__init__()
        own = layer.self_attn
        self._layer_index: int = own.layer_idx
        self._attention = attention
        self._scale: float = own.scaling
        self._backend = backend
        self._last = last
        self._input_norm = _norm(layer.input_layernorm)
        self._mlp_norm = _norm(layer.post_attention_layernorm)
        query_norm, key_norm = getattr(own, "q_norm", None), getattr(own, "k_norm", None)
        self._query_norm = None if query_norm is None else query_norm.weight.detach()
        self._key_norm = None if key_norm is None else key_norm.weight.detach()
        self._head_epsilon = 0.0 if query_norm is None else float(query_norm.variance_epsilon)
        self._qkv = GpuLinear([own.q_proj, own.k_proj, own.v_proj], batch_invariant=batch_invariant)
        self._output = row_linear(own.o_proj, batch_invariant=batch_invariant)
        self._mlp = GpuMLP(layer.mlp, "silu", batch_invariant=batch_invariant)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_dispatch: PagedDispatch,
        **_: Any,
    ) -> torch.Tensor:
        """hidden_states [1, T, H], overwritten -> [1, T, H]; of the last layer [1, R, H], the rows that want logits."""
        x = hidden_states[0]
        cosine, sine = position_embeddings
        rows = attention_dispatch.logit_rows if self._last else None
        paged = attention_dispatch.enter(self._layer_index, only_logit_rows=rows is not None)
        query = rotate_and_write(
            self._qkv(self._input_norm(x)),
            cosine[0],
            sine[0],
            paged.pages,
            paged.group.slot_mapping,
            query_norm=self._query_norm,
            key_norm=self._key_norm,
            epsilon=self._head_epsilon,
        )
        if rows is not None:
            x, query = x.index_select(0, rows), query.index_select(0, rows)
        attended = self._backend.attend(
            query,
            paged.pages,
            paged.group,
            paged.context,
            scale=self._scale,
            window=self._attention.window,
            softcap=None,
            sinks=None,
        )
        attention_dispatch.leave(self._layer_index)
        self._mlp.add_to(x, self._mlp_norm(self._output(attended.flatten(1)), residual=x))
        return x[None]


def _norm(module: Any) -> GpuRMSNorm:
    return GpuRMSNorm(module.weight.detach(), float(module.variance_epsilon))
