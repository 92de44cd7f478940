"""Swaps faster modules into a loaded model, and keeps the originals wherever they would not answer the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from engine.attention.interface import AttentionCall
from engine.dry_run import LayerAttention
from engine.fused.decoder_layer import FusedDecoderLayer, has_shape
from engine.fused.linear import can_pack, pack_linears

logger = logging.getLogger(__name__)

# Of the largest number compared: float32 sums in another order, and bfloat16's eight bits a few roundings on.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
_PROOF_TOKENS = 5


def fuse(module: PreTrainedModel, layers: Sequence[LayerAttention]) -> bool:
    """Replace what can be, in place; for a model on a CPU.

    Layers are replaced one after another, so that no more than one is held twice.

    Args:
        layers: what each decoder layer was seen to ask of attention.

    Returns:
        Whether the model's last layer answers for `AttentionDispatch.logit_rows` only.
    """
    dtype = module.dtype
    if not can_pack(dtype):
        return False
    decoder_layers = module.get_decoder().layers
    fused = all(map(has_shape, decoder_layers, layers)) and _proves_equal(module, decoder_layers[0], layers[0])
    if fused:
        for index, attention in enumerate(layers):
            last = index == len(layers) - 1
            decoder_layers[index] = FusedDecoderLayer(decoder_layers[index], attention, last=last)
    pack_linears(module)
    logger.info("%s: %s", type(module).__name__, "decoder layers fused" if fused else "linear layers packed")
    return fused


class _Proof:
    """`AttentionDispatch` that answers with what depends on queries, keys and values, and notes the rest."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []
        self.logit_rows: torch.Tensor | None = None

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call)
        groups = call.query.shape[1] // call.key.shape[1]
        return call.query + (call.key + call.value).repeat_interleave(groups, 1)

    @property
    def asked(self) -> tuple[Any, ...]:
        (call,) = self.calls
        return call.layer, call.scale, call.window, call.softcap, call.sinks, call.causal, call.mask, call.extra


@torch.inference_mode()
def _proves_equal(module: PreTrainedModel, layer: torch.nn.Module, attention: LayerAttention) -> bool:
    """Whether the fused layer does to a few random tokens at scattered positions what the original does."""
    generator = torch.Generator().manual_seed(0)
    config = module.config
    x = torch.randn(1, _PROOF_TOKENS, config.hidden_size, generator=generator).to(module.dtype)
    positions = torch.tensor([[0, 1, 5, 63, 600]]) % config.max_position_embeddings
    try:
        embeddings = module.get_decoder().rotary_emb(x, position_ids=positions)
        seen, answered = _Proof(), _Proof()
        wanted = layer(x, position_embeddings=embeddings, attention_mask=None, attention_dispatch=seen)
        fused = FusedDecoderLayer(layer, attention, last=False)
        got = fused(x, position_embeddings=embeddings, attention_dispatch=answered)
    except Exception:
        logger.debug("the fused decoder layer does not take what the original takes", exc_info=True)
        return False
    if seen.asked != answered.asked:
        return False
    pairs = [(wanted, got)] + [
        (getattr(seen.calls[0], name), getattr(answered.calls[0], name)) for name in ("query", "key", "value")
    ]
    tolerance = _TOLERANCE[module.dtype]
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= tolerance * a.abs().max().clamp(min=1)) for a, b in pairs
    )
