"""Swaps faster modules into a loaded model, and keeps the originals wherever they would not answer the same."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from engine.attention.base import AttentionBackend, AttentionContext, GroupMetadata
from engine.attention.paged import PagedDispatch
from engine.attention.reference import ReferenceAttention
from engine.cores import Cores
from engine.dry_run import LayerAttention
from engine.fused.kit import Kit, is_alike
from engine.kv.layout import KVGroup, KVLayout
from engine.parallel.group import RankGroup

logger = logging.getLogger(__name__)

_PROOF_TOKENS = 5
_BLOCK_SIZE = 16


class Fusion(NamedTuple):
    """What a model's layers do since they were replaced.

    Attributes:
        prunes_rows: the last layer answers for `AttentionDispatch.logit_rows` only.
        attends: layers read and write the pool themselves, and never call on the attention backend.
    """

    prunes_rows: bool
    attends: bool


def fuse(module: PreTrainedModel, layers: Sequence[LayerAttention], kit: Kit, group: RankGroup | None = None) -> Fusion:
    """Replace what can be, in place.

    Layers are replaced one after another, so that no more than one is held twice. Of layers of one kind the first has
    to prove equal.

    Args:
        layers: what each decoder layer was seen to ask of attention.
        group: the ranks that hold the rest of the model, and replace layers where all of them can.
    """
    decoder_layers = module.get_decoder().layers
    proved: dict[Hashable, bool] = {}
    fused = []
    for index, attention in enumerate(layers):
        layer = decoder_layers[index]
        kind = _kind(layer, attention)
        stand_in = None
        if proved.get(kind, True):
            stand_in = kit.make_layer(layer, attention, last=index == len(layers) - 1)
        if stand_in is not None and kind not in proved:
            proved[kind] = _agreed(_proves_equal(module, stand_in, layer, attention, kit.backend), group)
        fused.append(stand_in is not None and proved[kind])
        if fused[-1]:
            decoder_layers[index] = stand_in
        del layer, stand_in
        # Else a GPU's allocator would keep the originals' memory, in pieces too small for the next stand-in's tensors.
        torch.cuda.empty_cache()
    kit.replace_rest(module)
    logger.info("%s: %d of %d decoder layers fused", type(module).__name__, sum(fused), len(layers))
    return Fusion(prunes_rows=fused[-1], attends=all(fused) and kit.layers_attend)


def _agreed(is_equal: bool, group: RankGroup | None) -> bool:
    return is_equal if group is None else bool(group.smallest(is_equal))


def _kind(layer: torch.nn.Module, attention: LayerAttention) -> Hashable:
    """All that may tell a layer's code from another's: its modules, and their settings."""
    return attention, tuple((name, type(module), _settings(module)) for name, module in layer.named_modules())


def _settings(module: torch.nn.Module) -> Hashable:
    plain = bool | int | float | str | None
    settings = {name: value for name, value in vars(module).items() if isinstance(value, plain) and name != "layer_idx"}
    return tuple(sorted(settings.items()))


class _Stage:
    """A small pool of one layer, and a step over it: a chunk of three tokens beside two sequences of one."""

    def __init__(self, attention: LayerAttention, dtype: torch.dtype, device: torch.device) -> None:
        group = KVGroup((0,), attention.window)
        self._layout = KVLayout((group,), attention.num_kv_heads, attention.head_dim, _BLOCK_SIZE, dtype)
        self.kv = torch.zeros(self._layout.pool_shape(4), dtype=dtype, device=device)

    def dispatch(self, backend: AttentionBackend, num_layers: int) -> PagedDispatch:
        device = self.kv.device
        group = GroupMetadata(
            block_tables=torch.tensor([[1], [2], [3]], dtype=torch.int32, device=device),
            slot_mapping=torch.tensor([0, 1, 2, _BLOCK_SIZE, 2 * _BLOCK_SIZE], device=device) + _BLOCK_SIZE,
        )
        context = AttentionContext(
            kv=self.kv,
            layout=self._layout,
            cu_seqlens_q=torch.tensor([0, 3, 4, 5], dtype=torch.int32, device=device),
            seq_lens=torch.tensor([3, 1, 1], dtype=torch.int32, device=device),
            groups=(group,),
            max_query_len=3,
            max_seq_len=3,
        )
        return PagedDispatch(context, backend, [(0, 0)] * num_layers, None, Cores(0, 0))


@torch.inference_mode()
def _proves_equal(
    module: PreTrainedModel,
    stand_in: torch.nn.Module,
    layer: torch.nn.Module,
    attention: LayerAttention,
    backend: AttentionBackend,
) -> bool:
    """Whether the stand-in does to a few random tokens at scattered positions what the layer does."""
    generator = torch.Generator().manual_seed(0)
    config: Any = module.config
    dtype, device, num_layers = module.dtype, module.device, config.num_hidden_layers
    x = torch.randn(1, _PROOF_TOKENS, config.hidden_size, generator=generator).to(device, dtype)
    positions = torch.tensor([[0, 1, 5, 63, 600]], device=device) % config.max_position_embeddings
    wanted_stage, stage = _Stage(attention, dtype, device), _Stage(attention, dtype, device)
    try:
        embeddings = module.get_decoder().rotary_emb(x, position_ids=positions)
        reference = wanted_stage.dispatch(ReferenceAttention(), num_layers)
        wanted = layer(x, position_embeddings=embeddings, attention_mask=None, attention_dispatch=reference)
        dispatch = stage.dispatch(backend, num_layers)
        got = stand_in(x.clone(), position_embeddings=embeddings, attention_dispatch=dispatch)
    except Exception:
        logger.debug("the fused decoder layer does not take what the original takes", exc_info=True)
        return False
    return is_alike(wanted, got) and is_alike(wanted_stage.kv, stage.kv)
