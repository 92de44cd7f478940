"""Runs a loaded model over the paged KV cache.

Owns nothing but references to the model, the pool and the attention backend. Only the engine's thread executes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch

from engine.attention.base import AttentionBackend, AttentionContext
from engine.attention.paged import PagedDispatch
from engine.batch import Batch, BatchItem, BatchTensors, build_batch
from engine.cores import Cores
from engine.decode_graphs import DecodeGraphs
from engine.kv.layout import KVLayout
from engine.model_loader import LoadedModel
from engine.pace import Pace


class ModelRunner:
    """Executes ragged batches: prompts' chunks and decodes of any sequences, flattened to one row."""

    def __init__(
        self,
        model: LoadedModel,
        layout: KVLayout,
        kv: torch.Tensor,
        backend: AttentionBackend,
        cores: Cores | None = None,
        *,
        max_graph_rows: int = 0,
    ) -> None:
        """May compile kernels.

        Args:
            kv: the pool, [num_slots, num_blocks, 2, Hkv, B, D] as `layout.pool_shape` says.
            cores: which to compute on; None for as many threads as torch uses now.
            max_graph_rows: decode steps of at most so many sequences are replayed as CUDA graphs; 0 for none.
        """
        assert kv.shape == layout.pool_shape(kv.shape[1])
        assert kv.dtype == layout.dtype
        self._model = model
        self._layout = layout
        self._kv = kv
        self._backend = backend
        self._cores = cores or Cores(0, 0)
        self._locations = [layout.location(layer) for layer in range(layout.num_layers)]
        if not model.attends:
            backend.prepare(layout, model.layers)
        self._pace: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if kv.is_cuda:
            self._pace = Pace()
        self._graphs: DecodeGraphs | None = None
        if max_graph_rows:
            self._graphs = DecodeGraphs(
                self.forward,
                layout,
                kv.device,
                max_rows=max_graph_rows,
                vocab_size=model.vocab_size,
                alone=model.group is None,
            )

    def execute(self, items: Sequence[BatchItem], on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Compute all tokens of the items and keep their keys and values.

        Args:
            items: at least one; at most one of any sequence.
            on_layer: called with each layer's index once its pages are written, while the step goes on.

        Returns:
            float32 logits [num_rows, vocab]: the last `num_logits` positions of each item, in the items' order.
        """
        return self.execute_batch(build_batch(items, self._layout), on_layer)

    @torch.inference_mode()
    def execute_batch(
        self,
        batch: Batch,
        on_layer: Callable[[int], None] | None = None,
        *,
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`execute`, where the batch is built already. On a GPU a step is launched, while the one before may still run.

        Args:
            chosen: int64, on the model's device: the tokens of the step before, where `batch.sources` asks for some.

        Returns:
            As `execute`; of a decode step on a GPU valid until the next.
        """
        self._cores.take()
        with self._pace:
            if self._graphs is not None and on_layer is None and self._graphs.takes(batch):
                return self._graphs.run(batch, chosen)
            tensors = batch.on(self._kv.device, chosen)
            return self.forward(tensors, on_layer).float()

    def forward(self, batch: BatchTensors, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Logits in the model's dtype."""
        logit_rows = batch.logit_rows if len(batch.logit_rows) < len(batch.token_ids) else None
        context = self._context(batch, on_layer)
        dispatch = PagedDispatch(context, self._backend, self._locations, logit_rows, self._cores)
        return self._model.forward(batch.token_ids, batch.positions, batch.logit_rows, dispatch)

    def _context(self, batch: BatchTensors, on_layer: Callable[[int], None] | None) -> AttentionContext:
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
