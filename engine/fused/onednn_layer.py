"""One decoder layer of the Llama shape as a few calls: oneDNN's products, four kernels and attention.

For bfloat16, in which oneDNN multiplies several times as fast as float32 can be where the CPU has instructions for it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.interface import AttentionCall, AttentionDispatch
from engine.cpu_kernels import elementwise
from engine.cpu_kernels.views import elements
from engine.dry_run import LayerAttention
from engine.fused.linear import PackedLinear


@dataclasses.dataclass(frozen=True, slots=True)
class RMSNorm:
    """Weights of an RMS norm: float32 [n]; [0] for a norm that is not there."""

    weight: npt.NDArray[np.float32]
    epsilon: np.float32

    @classmethod
    def of(cls, module: Any | None) -> RMSNorm:
        if module is None:
            return cls(np.empty(0, np.float32), np.float32(0))
        return cls(module.weight.detach().float().numpy().copy(), np.float32(module.variance_epsilon))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        elementwise.rms_norm(elements(x), self.weight, self.epsilon, elements(out))
        return out


class OneDNNDecoderLayer(torch.nn.Module):
    """Takes the place of a layer that `has_shape`; answers as it does, up to rounding."""

    def __init__(self, layer: Any, attention: LayerAttention, *, last: bool) -> None:
        """
        Args:
            attention: what the layer was seen to ask of attention.
            last: whether nothing follows that needs more than the rows whose logits are wanted.
        """
        super().__init__()
        own = layer.self_attn
        self._attention = attention
        self._layer_index: int = own.layer_idx
        self._scale: float = own.scaling
        self._last = last
        self._input_norm = RMSNorm.of(layer.input_layernorm)
        self._query_norm = RMSNorm.of(getattr(own, "q_norm", None))
        self._key_norm = RMSNorm.of(getattr(own, "k_norm", None))
        self._mlp_norm = RMSNorm.of(layer.post_attention_layernorm)
        self.qkv = PackedLinear([own.q_proj, own.k_proj, own.v_proj])
        self.output = PackedLinear([own.o_proj])
        self.gate_up = PackedLinear([layer.mlp.gate_proj, layer.mlp.up_proj])
        self.down = PackedLinear([layer.mlp.down_proj])

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_dispatch: AttentionDispatch,
        **_: Any,
    ) -> torch.Tensor:
        """hidden_states [1, T, H] -> [1, T, H]; of the last layer [1, R, H], the rows whose logits are wanted."""
        x = hidden_states[0]
        query, key, value = self._project(self._input_norm(x), position_embeddings)
        rows = attention_dispatch.logit_rows if self._last else None
        if rows is not None:
            x, query = x[rows], query[rows]
        attended = attention_dispatch.attend(
            AttentionCall(
                layer=self._layer_index,
                query=query,
                key=key,
                value=value,
                scale=self._scale,
                window=self._attention.window,
                softcap=None,
                sinks=None,
                causal=True,
                mask=None,
                extra=(),
            )
        )
        x = self.output.plus(attended.flatten(1), x)
        gate_up = self.gate_up(self._mlp_norm(x))
        gate, up = gate_up.chunk(2, 1)
        gated = torch.empty(gate.shape, dtype=x.dtype)
        elementwise.silu_multiply(elements(gate), elements(up), elements(gated))
        return self.down.plus(gated, x)[None]

    def _project(
        self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T, Hq, D], keys and values [T, Hkv, D], rotated."""
        shape = self._attention
        qkv = self.qkv(x)
        query = torch.empty((x.shape[0], shape.num_heads, shape.head_dim), dtype=x.dtype)
        key = torch.empty((x.shape[0], shape.num_kv_heads, shape.head_dim), dtype=x.dtype)
        value = torch.empty_like(key)
        cosine, sine = position_embeddings
        elementwise.split_and_rotate(
            elements(qkv),
            elements(cosine[0]),
            elements(sine[0]),
            self._query_norm.weight,
            self._key_norm.weight,
            self._query_norm.epsilon,
            elements(query),
            elements(key),
            elements(value),
        )
        return query, key, value
