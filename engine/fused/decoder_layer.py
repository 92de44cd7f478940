"""One decoder layer of the Llama shape in float32 as one call: `engine.cpu_kernels.decoder_layer`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engine.attention.cpu import make_rule, step_work
from engine.attention.paged import PagedDispatch
from engine.cpu_kernels.arithmetic import FloatArray, PageArray
from engine.cpu_kernels.decoder_layer import Buffers, LayerWeights, Tokens, decoder_layer, work_on
from engine.cpu_kernels.pointers import address_of
from engine.cpu_kernels.product import PANEL_COLUMNS, pack
from engine.cpu_kernels.threads import use_threads
from engine.cpu_kernels.views import elements
from engine.dry_run import LayerAttention
from engine.fused.linear import pack_linear


class Workspace:
    """What the layers of one model write between their stages; they run one after another."""

    def __init__(self, hidden_size: int, attention: LayerAttention, intermediate_size: int) -> None:
        self._shapes = (
            (hidden_size,),
            (attention.num_heads, attention.head_dim),
            (attention.num_heads, attention.head_dim),
            (intermediate_size,),
        )
        self._buffers = self._allocate(0)

    def of(self, num_tokens: int) -> Buffers:
        """Buffers of so many rows."""
        if len(self._buffers.normed) < num_tokens:
            self._buffers = self._allocate(num_tokens)
        return Buffers(*(buffer[:num_tokens] for buffer in self._buffers))

    def _allocate(self, num_tokens: int) -> Buffers:
        return Buffers(*(np.empty((num_tokens, *shape), np.float32) for shape in self._shapes))


class FusedDecoderLayer(torch.nn.Module):
    """Takes the place of a float32 layer that `has_shape`; answers as it does, up to rounding.

    A token's output is the same to the bit whatever tokens of other sequences are computed beside it.
    """

    def __init__(self, layer: Any, attention: LayerAttention, workspace: Workspace, *, last: bool) -> None:
        """
        Args:
            attention: what the layer was seen to ask of attention.
            last: whether nothing follows that needs more than the rows whose logits are wanted.
        """
        super().__init__()
        own, mlp = layer.self_attn, layer.mlp
        self._layer_index: int = own.layer_idx
        self._attention = attention
        self._workspace = workspace
        self._last = last
        self._work_on = 0
        self._rule = make_rule(
            attention.num_heads, scale=own.scaling, window=attention.window, softcap=None, sinks=None
        )
        head_norms = getattr(own, "q_norm", None), getattr(own, "k_norm", None)
        qkv, qkv_bias = _pack_heads([own.q_proj, own.k_proj, own.v_proj], attention.head_dim)
        output, output_bias = pack_linear(own.o_proj)
        gate, gate_bias = pack_linear(mlp.gate_proj)
        up, up_bias = pack_linear(mlp.up_proj)
        down, down_bias = pack_linear(mlp.down_proj)
        self._weights = LayerWeights(
            input_norm=_norm_weight(layer.input_layernorm),
            query_norm=_norm_weight(head_norms[0]),
            key_norm=_norm_weight(head_norms[1]),
            mlp_norm=_norm_weight(layer.post_attention_layernorm),
            epsilons=np.array(
                [
                    0.0 if norm is None else norm.variance_epsilon
                    for norm in (layer.input_layernorm, head_norms[0], layer.post_attention_layernorm)
                ],
                np.float32,
            ),
            qkv=qkv,
            qkv_bias=qkv_bias,
            output=output,
            output_bias=output_bias,
            gate=gate,
            gate_bias=gate_bias,
            up=up,
            up_bias=up_bias,
            down=down,
            down_bias=down_bias,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_dispatch: PagedDispatch,
        **_: Any,
    ) -> torch.Tensor:
        """hidden_states [1, T, H], changed -> [1, T, H]; of the last layer [1, R, H], the rows whose logits are wanted.

        Raises:
            ValueError: rotations are not as wide as heads.
        """
        cosine, sine = position_embeddings
        if cosine.shape[-1] != self._attention.head_dim:
            raise ValueError(f"rotations of {cosine.shape[-1]} dimensions, heads of {self._attention.head_dim}")
        rows = attention_dispatch.logit_rows if self._last else None
        paged = attention_dispatch.enter(self._layer_index, only_logit_rows=rows is not None)
        x = elements(hidden_states[0])
        tokens = Tokens(elements(cosine[0]), elements(sine[0]), paged.group.slot_mapping.numpy())
        pages = elements(paged.pages)
        work = step_work(paged.context, paged.group, self._attention.num_heads // self._attention.num_kv_heads)
        buffers = self._workspace.of(hidden_states.shape[1])
        # The address is that of a kernel for arrays in this order.
        assert all(array.flags.c_contiguous for array in (x, *tokens, pages, *work))
        if not self._work_on:
            self._work_on = address_of(work_on, 0, _NONE, x, self._weights, tokens, pages, work, self._rule, buffers)
        x = decoder_layer(
            x,
            self._weights,
            tokens,
            pages,
            _NONE if rows is None else rows.numpy(),
            rows is not None,
            work,
            self._rule,
            buffers,
            use_threads(),
            self._work_on,
        )
        attention_dispatch.leave(self._layer_index)
        return torch.from_numpy(x)[None]


_NONE = np.empty(0, np.int64)


def _pack_heads(linears: list[torch.nn.Linear], head_dim: int) -> tuple[PageArray, FloatArray]:
    """Projections side by side, each head padded to whole panels."""
    padding = -head_dim % PANEL_COLUMNS
    weights, biases = [], []
    for linear in linears:
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        weights.append(_pad_heads(linear.weight.detach(), head_dim, padding))
        biases.append(_pad_heads(bias[:, None], head_dim, padding)[:, 0])
    return pack(torch.cat(weights).numpy(), torch.cat(biases).numpy())


def _pad_heads(rows: torch.Tensor, head_dim: int, padding: int) -> torch.Tensor:
    heads = rows.view(-1, head_dim, rows.shape[1])
    return torch.nn.functional.pad(heads, (0, 0, 0, padding)).flatten(0, 1)


def _norm_weight(module: Any | None) -> FloatArray:
    return np.empty(0, np.float32) if module is None else module.weight.detach().numpy().copy()
