"""Answers a model's attention calls over the paged cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from engine.attention.base import AttentionBackend, AttentionContext, GroupMetadata
from engine.attention.interface import AttentionCall
from engine.cores import Cores


@dataclasses.dataclass(frozen=True, slots=True)
class LayerPages:
    """What one layer's attention of a step reads and writes.

    Attributes:
        pages: the layer's slot of the pool, [num_blocks, 2, Hkv, B, D].
        group: where the step's tokens live in it.
        context: of the queries, which may be those of the wanted rows alone.
    """

    pages: torch.Tensor
    group: GroupMetadata
    context: AttentionContext


class PagedDispatch:
    """`AttentionDispatch` of one step: writes the layer's keys and values, then attends over its pages."""

    def __init__(
        self,
        context: AttentionContext,
        backend: AttentionBackend,
        locations: Sequence[tuple[int, int]],
        logit_rows: torch.Tensor | None,
        cores: Cores,
    ) -> None:
        """`locations` are the (group, slot) of each layer; for `logit_rows` see `AttentionDispatch`."""
        self.logit_rows = logit_rows
        self._cores = cores
        self._context = context
        self._logit_context = context if logit_rows is None else _of_rows(context, logit_rows)
        self._backend = backend
        self._locations = locations

    def attend(self, call: AttentionCall) -> torch.Tensor:
        layer = self.enter(call.layer, only_logit_rows=len(call.query) < len(call.key))
        self._backend.write(call.key, call.value, layer.pages, layer.group)
        out = self._backend.attend(
            call.query,
            layer.pages,
            layer.group,
            layer.context,
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
            sinks=call.sinks,
        )
        self.leave(call.layer)
        return out

    def enter(self, layer: int, *, only_logit_rows: bool) -> LayerPages:
        """Before a layer's attention: take the cores that are free, and find its pages."""
        self._cores.take()
        context = self._logit_context if only_logit_rows else self._context
        group_index, slot = self._locations[layer]
        return LayerPages(context.kv[slot], context.groups[group_index], context)

    def leave(self, layer: int) -> None:
        """A layer's keys and values lie in the pool, and its attention is done."""
        if self._context.on_layer is not None:
            self._context.on_layer(layer)


def _of_rows(context: AttentionContext, rows: torch.Tensor) -> AttentionContext:
    """The context of queries of these rows alone, the last ones of each sequence."""
    cu_seqlens = torch.searchsorted(rows, context.cu_seqlens_q.long(), out_int32=True)
    # At most so many: to know would be to wait for a GPU.
    return dataclasses.replace(context, cu_seqlens_q=cu_seqlens, max_query_len=min(context.max_query_len, len(rows)))
