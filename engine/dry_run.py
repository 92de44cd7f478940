"""A forward pass at load that proves a model fits the paged engine, or says by name what does not.

The model runs once on a few tokens with a recorder in the place of attention. What its layers ask for becomes the
layout of the KV cache; what they would ask of an engine that is not this one is refused before any request can meet it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from engine.attention.interface import AttentionCall, AttentionDispatch

# The middle one of these tokens is poisoned; both neighbours must stay clean.
NUM_TOKENS = 3
_POISONED = 1

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionDispatch], torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one decoder layer asks of attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    softcap: float | None
    has_sinks: bool


@dataclasses.dataclass(frozen=True, slots=True)
class DryRun:
    """What the dry run found.

    Attributes:
        layers: one for each decoder layer.
        vocab_size: width of the logits.
    """

    layers: tuple[LayerAttention, ...]
    vocab_size: int


class DispatchRecorder:
    """`AttentionDispatch` that notes each call and answers zeros, but NaN for one token.

    Tokens may influence each other through attention only: if the NaN reaches another token's logits, some layer mixes
    tokens by itself (a convolution, a recurrence) and would mix sequences in a flattened batch.
    """

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []
        self.logit_rows: torch.Tensor | None = None

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call)
        out = torch.zeros(
            (*call.query.shape[:2], call.value.shape[-1]), dtype=call.query.dtype, device=call.query.device
        )
        out[_POISONED] = float("nan")
        return out


def dry_run(forward: Forward, device: torch.device, *, num_layers: int, windows: Sequence[int | None]) -> DryRun:
    """Run `forward(token_ids, positions, logit_rows, dispatch)` once and check every layer.

    Args:
        num_layers: decoder layers that must call attention, once each and in order.
        windows: sliding window of each layer as the model's config declares it.

    Raises:
        ValueError: the model does not fit; the message names the layer and the feature.
    """
    recorder = DispatchRecorder()
    rows = torch.arange(NUM_TOKENS, device=device)
    clean = [row for row in range(NUM_TOKENS) if row != _POISONED]
    try:
        with torch.inference_mode():
            logits = forward(rows, rows, rows[clean], recorder)
    except Exception as error:
        raise ValueError(f"the model cannot run through transformers' AttentionInterface: {error}") from error
    _check_order([call.layer for call in recorder.calls], num_layers)
    for call, window in zip(recorder.calls, windows, strict=True):
        if problem := _problem(call, window):
            raise ValueError(f"layer {call.layer}: {problem}")
    layers = tuple(_describe(call) for call in recorder.calls)
    shapes = {(layer.num_kv_heads, layer.head_dim) for layer in layers}
    if len(shapes) > 1:
        raise ValueError(f"layers differ in (key/value heads, head dimension), which one pool cannot hold: {shapes}")
    if logits.shape[0] != len(clean):
        raise ValueError("the model computes logits for all tokens: its forward has no logits_to_keep")
    if not logits.isfinite().all():
        raise ValueError("some layer mixes tokens outside of attention (a convolution, a recurrence or a state space)")
    return DryRun(layers, logits.shape[-1])


def _check_order(layers: Sequence[int], num_layers: int) -> None:
    for layer in range(num_layers):
        if (count := layers.count(layer)) != 1:
            raise ValueError(f"layer {layer} calls attention through AttentionInterface {count} times, not once")
    if list(layers) != list(range(num_layers)):
        raise ValueError(f"layers call attention in the order {list(layers)}, not one after another")


def _problem(call: AttentionCall, window: int | None) -> str | None:
    """Why a layer's call cannot be served, or None."""
    if not call.causal:
        return "attention is not causal"
    if call.mask is not None:
        return "attention has a mask of its own"
    if call.extra:
        return f"attention takes unknown tensors: {', '.join(call.extra)} (a position bias, such as ALiBi?)"
    if not call.query.shape[-1] == call.key.shape[-1] == call.value.shape[-1]:
        return (
            f"head dimensions of query, key and value differ ({call.query.shape[-1]}, {call.key.shape[-1]}, "
            f"{call.value.shape[-1]}; latent attention?)"
        )
    if call.key.shape[1] != call.value.shape[1] or call.query.shape[1] % call.key.shape[1]:
        return f"{call.query.shape[1]} query heads do not group over {call.key.shape[1]} key/value heads"
    if call.query.shape[0] != NUM_TOKENS or call.key.shape[0] != NUM_TOKENS:
        return f"attention gets {call.key.shape[0]} keys for {NUM_TOKENS} tokens"
    if call.window != window:
        return f"attention asks for the window {call.window}, but the config declares {window}"
    if call.sinks is not None and call.sinks.shape != (call.query.shape[1],):
        return f"sinks of shape {tuple(call.sinks.shape)}, not one for each query head"
    return None


def _describe(call: AttentionCall) -> LayerAttention:
    return LayerAttention(
        num_heads=call.query.shape[1],
        num_kv_heads=call.key.shape[1],
        head_dim=call.key.shape[2],
        window=call.window,
        softcap=call.softcap,
        has_sinks=call.sinks is not None,
    )
