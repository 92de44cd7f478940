"""Runs a loaded model over the paged KV cache.

Owns nothing but references to the model, the pool and the attention backend. Only the engine's thread executes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from engine.attention.base import AttentionBackend, AttentionContext
from engine.attention.interface import AttentionCall
from engine.batch import Batch, BatchItem, build_batch
from engine.cores import Cores
from engine.kv.layout import KVLayout
from engine.model_loader import LoadedModel


class PagedDispatch:
    """Answers one step's attention calls: writes the layer's keys and values, then attends over its pages."""

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
        self._cores.take()
        context = self._context if len(call.query) == len(call.key) else self._logit_context
        group_index, slot = self._locations[call.layer]
        group, pages = context.groups[group_index], context.kv[slot]
        self._backend.write(call.key, call.value, pages, group)
        out = self._backend.attend(
            call.query,
            pages,
            group,
            context,
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
            sinks=call.sinks,
        )
        if context.on_layer is not None:
            context.on_layer(call.layer)
        return out


class ModelRunner:
    """Executes ragged batches: prompts' chunks and decodes of any sequences, flattened to one row."""

    def __init__(
        self,
        model: LoadedModel,
        layout: KVLayout,
        kv: torch.Tensor,
        backend: AttentionBackend,
        cores: Cores | None = None,
    ) -> None:
        """May compile kernels.

        Args:
            kv: the pool, [num_slots, num_blocks, 2, Hkv, B, D] as `layout.pool_shape` says.
            cores: which to compute on; None for as many threads as torch uses now.
        """
        assert kv.shape == layout.pool_shape(kv.shape[1])
        assert kv.dtype == layout.dtype
        self._model = model
        self._layout = layout
        self._kv = kv
        self._backend = backend
        self._cores = cores or Cores(0, 0)
        self._locations = [layout.location(layer) for layer in range(layout.num_layers)]
        backend.prepare(layout)

    def execute(self, items: Sequence[BatchItem], on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Compute all tokens of the items and keep their keys and values.

        Args:
            items: at least one; at most one of any sequence.
            on_layer: called with each layer's index once its pages are written, while the step goes on.

        Returns:
            float32 logits [num_rows, vocab]: the last `num_logits` positions of each item, in the items' order.
        """
        return self.execute_batch(build_batch(items, self._layout, self._kv.device), on_layer)

    @torch.inference_mode()
    def execute_batch(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """`execute`, where the batch is built already."""
        logit_rows = batch.logit_rows if len(batch.logit_rows) < len(batch.token_ids) else None
        dispatch = PagedDispatch(
            self._context(batch, on_layer), self._backend, self._locations, logit_rows, self._cores
        )
        self._cores.take()
        return self._model.forward(batch.token_ids, batch.positions, batch.logit_rows, dispatch)

    def _context(self, batch: Batch, on_layer: Callable[[int], None] | None) -> AttentionContext:
        return AttentionContext(
            kv=self._kv,
            layout=self._layout,
            cu_seqlens_q=batch.cu_seqlens_q,
            seq_lens=batch.seq_lens,
            groups=batch.groups,
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
            on_layer=on_layer,
        )


def _of_rows(context: AttentionContext, rows: torch.Tensor) -> AttentionContext:
    """The context of queries of these rows alone, the last ones of each sequence."""
    cu_seqlens = torch.searchsorted(rows, context.cu_seqlens_q.long(), out_int32=True)
    return dataclasses.replace(context, cu_seqlens_q=cu_seqlens, max_query_len=int(cu_seqlens.diff().max()))
