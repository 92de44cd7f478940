"""Swaps faster modules into a loaded model, and keeps the originals wherever they would not answer the same."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from engine.attention.base import AttentionBackend, AttentionContext, GroupMetadata
from engine.attention.cpu import CpuAttention
from engine.attention.paged import PagedDispatch
from engine.attention.reference import ReferenceAttention
from engine.cores import Cores
from engine.dry_run import LayerAttention
from engine.fused.decoder_layer import FusedDecoderLayer, Workspace
from engine.fused.linear import can_pack, has_kernels, pack_linears
from engine.fused.onednn_layer import OneDNNDecoderLayer
from engine.fused.shape import has_shape
from engine.kv.layout import KVGroup, KVLayout

logger = logging.getLogger(__name__)

# Of the largest number compared: float32 sums in another order, and bfloat16's eight bits a few roundings on.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
_PROOF_TOKENS = 5
_BLOCK_SIZE = 16

LayerMaker = Callable[..., torch.nn.Module]


class Fusion(NamedTuple):
    """What a model's layers do since they were replaced.

    Attributes:
        prunes_rows: the last layer answers for `AttentionDispatch.logit_rows` only.
        attends: layers read and write the pool themselves, and never call `AttentionDispatch.attend`.
    """

    prunes_rows: bool
    attends: bool


def fuse(module: PreTrainedModel, layers: Sequence[LayerAttention]) -> Fusion:
    """Replace what can be, in place; for a model on a CPU.

    Layers are replaced one after another, so that no more than one is held twice.

    Args:
        layers: what each decoder layer was seen to ask of attention.
    """
    dtype = module.dtype
    if not can_pack(dtype):
        return Fusion(prunes_rows=False, attends=False)
    decoder_layers = module.get_decoder().layers
    fused = False
    if all(map(has_shape, decoder_layers, layers)) and _are_of_one_size(decoder_layers, layers):
        make = _layer_maker(decoder_layers[0], layers[0], dtype)
        fused = _proves_equal(module, make, decoder_layers[0], layers[0])
        for index in range(len(layers) if fused else 0):
            decoder_layers[index] = make(decoder_layers[index], layers[index], last=index == len(layers) - 1)
    pack_linears(module)
    logger.info("%s: %s", type(module).__name__, "decoder layers fused" if fused else "linear layers packed")
    return Fusion(prunes_rows=fused, attends=fused and has_kernels(dtype))


def _are_of_one_size(decoder_layers: Sequence[Any], layers: Sequence[LayerAttention]) -> bool:
    """Whether the layers can share a workspace."""
    heads = {(layer.num_heads, layer.num_kv_heads, layer.head_dim) for layer in layers}
    return len(heads) == 1 and len({layer.mlp.gate_proj.out_features for layer in decoder_layers}) == 1


def _layer_maker(layer: Any, attention: LayerAttention, dtype: torch.dtype) -> LayerMaker:
    """What makes fused layers of a model, whose layers all have the shape of this one."""
    if not has_kernels(dtype):
        return OneDNNDecoderLayer
    mlp = layer.mlp
    workspace = Workspace(mlp.gate_proj.in_features, attention, mlp.gate_proj.out_features)
    return functools.partial(FusedDecoderLayer, workspace=workspace)


class _Stage:
    """A small pool of one layer, and a step over it: a chunk of three tokens beside two sequences of one."""

    def __init__(self, attention: LayerAttention, dtype: torch.dtype) -> None:
        group = KVGroup((0,), attention.window)
        self._layout = KVLayout((group,), attention.num_kv_heads, attention.head_dim, _BLOCK_SIZE, dtype)
        self.kv = torch.zeros(self._layout.pool_shape(4), dtype=dtype)

    def dispatch(self, backend: AttentionBackend) -> PagedDispatch:
        group = GroupMetadata(
            block_tables=torch.tensor([[1], [2], [3]], dtype=torch.int32),
            slot_mapping=torch.tensor([0, 1, 2, _BLOCK_SIZE, 2 * _BLOCK_SIZE]) + _BLOCK_SIZE,
        )
        context = AttentionContext(
            kv=self.kv,
            layout=self._layout,
            cu_seqlens_q=torch.tensor([0, 3, 4, 5], dtype=torch.int32),
            seq_lens=torch.tensor([3, 1, 1], dtype=torch.int32),
            groups=(group,),
            max_query_len=3,
            max_seq_len=3,
        )
        return PagedDispatch(context, backend, [(0, 0)], None, Cores(0, 0))


@torch.inference_mode()
def _proves_equal(module: PreTrainedModel, make: LayerMaker, layer: torch.nn.Module, attention: LayerAttention) -> bool:
    """Whether the fused layer does to a few random tokens at scattered positions what the original does."""
    generator = torch.Generator().manual_seed(0)
    config = module.config
    x = torch.randn(1, _PROOF_TOKENS, config.hidden_size, generator=generator).to(module.dtype)
    positions = torch.tensor([[0, 1, 5, 63, 600]]) % config.max_position_embeddings
    wanted_stage, stage = _Stage(attention, module.dtype), _Stage(attention, module.dtype)
    try:
        embeddings = module.get_decoder().rotary_emb(x, position_ids=positions)
        reference = wanted_stage.dispatch(ReferenceAttention())
        wanted = layer(x, position_embeddings=embeddings, attention_mask=None, attention_dispatch=reference)
        fused = make(layer, attention, last=False)
        got = fused(x.clone(), position_embeddings=embeddings, attention_dispatch=stage.dispatch(CpuAttention()))
    except Exception:
        logger.debug("the fused decoder layer does not take what the original takes", exc_info=True)
        return False
    tolerance = _TOLERANCE[module.dtype]
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= tolerance * a.abs().max().clamp(min=1))
        for a, b in ((wanted, got), (wanted_stage.kv, stage.kv))
    )
