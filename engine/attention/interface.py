"""The seam to `transformers`: one attention function, registered once, that hands each layer's call to a dispatcher.

A model loaded with `attn_implementation=IMPLEMENTATION` and called with `attention_dispatch=...` makes one call per
layer. Models pass keyword arguments of `forward` on to the attention function, which is how the dispatcher gets there:
no state hangs on modules or in globals. The name has no entry in transformers' mask table, so no mask is ever built:
backends mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

IMPLEMENTATION = "baton_paged"


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's attention over the flattened row.

    Attributes:
        layer: the module's layer index.
        query: [T, Hq, D], key and value: [T, Hkv, D]; rotated and normalised already. Queries may be those of the
            dispatcher's `logit_rows` alone.
        scale, window, softcap, sinks: as in `AttentionBackend.attend`.
        causal: whether the module asks for causal attention.
        mask: a mask that the model built itself, None in every model that can be served.
        extra: names of other tensors that the model gave; a backend would ignore them.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    causal: bool
    mask: torch.Tensor | None
    extra: tuple[str, ...]


class AttentionDispatch(Protocol):
    """Answers a model's attention calls: over the paged cache when serving, by a recorder at load."""

    @property
    def logit_rows(self) -> torch.Tensor | None:
        """int64 [R], R < T: the tokens whose logits are wanted; None for all. What the last layer computes of others
        than these, but for keys and values, nobody reads."""
        ...

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Output of one layer: [T, Hq, Dv], or as many rows as there are queries."""


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attention_dispatch: AttentionDispatch | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function of transformers' AttentionInterface.

    Takes query [1, Hq, T, D], key and value [1, Hkv, T, D]; returns [1, T, Hq, D] and no weights.

    Raises:
        ValueError: the model has dropped the dispatcher on the way.
    """
    if attention_dispatch is None:
        raise ValueError("the model's layers do not pass keyword arguments on to attention")
    call = AttentionCall(
        layer=getattr(module, "layer_idx", -1),
        query=query[0].transpose(0, 1),
        key=key[0].transpose(0, 1),
        value=value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        mask=attention_mask,
        extra=_unknown_tensors(kwargs),
    )
    return attention_dispatch.attend(call)[None], None


def _unknown_tensors(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of tensor arguments whose meaning is not known; positions are, for rotation has used them already."""
    return tuple(
        name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name not in ("position_ids",)
    )


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers; again is harmless."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
