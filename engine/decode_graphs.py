"""Decode steps replayed as CUDA graphs: launching a step's hundreds of kernels one by one takes the host longer than
they take a GPU.

A graph replays the launches of one step over the same memory. So a step's batch is padded to one of a few sizes and
copied to where that size's graph reads it; contexts may be of any length up to a power of two. Padding rows have no
context and no slot: they read and write nothing of the pool. A graph is captured when its size first comes, beside the
step that brings it; all share one pool of memory, since no two run at a time, and the least recently used go.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch

from engine.batch import Batch, BatchTensors, take_chosen
from engine.kv.layout import NULL_BLOCK, KVLayout
from engine.staging import Packing

logger = logging.getLogger(__name__)

# Steps between sizes grow with them, so that padding is at most a third of a small batch, an eighth of a large one.
_SIZES: tuple[int, ...] = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 257, 32))
_MIN_CONTEXT = 1024
# Each costs some megabytes of the driver's own.
_MAX_GRAPHS = 48

# Makes of a function that launches kernels one that launches the same again.
Capture: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]


class CudaCapture:
    """Captures CUDA graphs that share one pool of memory: what one leaves there the next may overwrite."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, launch: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        try:
            # A capture that fails leaves its stream as the current one, hence the outer context. Other threads move KV
            # meanwhile; what they do is not to be captured, nor forbidden.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                launch()
        except RuntimeError:
            # Torch 2.11 and 2.12 go on as if it were under way, and never empty their cache again (pytorch#180395).
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            raise
        return graph.replay


@dataclasses.dataclass(frozen=True, slots=True)
class _Graph:
    """One size's memory on the device, and what computes a step over it.

    Attributes:
        inputs: uint8; a padded batch, as `packing` says, and its sources last.
    """

    packing: Packing
    inputs: torch.Tensor
    sources: torch.Tensor
    batch: BatchTensors
    replay: Callable[[], None]


class DecodeGraphs:
    """
    Args:
        forward: launches a step and returns its logits [rows, vocab_size].
        max_rows: most sequences of a step; larger ones are not taken.
        alone: whether steps may go on without graphs where none can be made: not where other ranks have theirs.
    """

    def __init__(
        self,
        forward: Callable[[BatchTensors], torch.Tensor],
        layout: KVLayout,
        device: torch.device,
        *,
        max_rows: int,
        vocab_size: int,
        capture: Capture | None = None,
        alone: bool = True,
    ) -> None:
        self._forward = forward
        self._layout = layout
        self._device = device
        self._max_rows = min(max_rows, _SIZES[-1])
        self._capture = capture or CudaCapture()
        self._graphs: collections.OrderedDict[tuple[int, int], _Graph] = collections.OrderedDict()
        # Of all graphs, for a step's logits are read before the next step writes its own.
        self._logits = torch.empty(_size_for(self._max_rows), vocab_size, dtype=torch.float32, device=device)
        self._works = True
        self._alone = alone

    def takes(self, batch: Batch) -> bool:
        """Whether `run` computes this step."""
        return self._works and batch.is_decode and len(batch.seq_lens) <= self._max_rows

    def run(self, batch: Batch, chosen: torch.Tensor | None) -> torch.Tensor:
        """The step's logits, float32 [S, vocab], valid until the next step; for `chosen` see `Batch.on`."""
        num_rows = len(batch.seq_lens)
        key = _size_for(num_rows), _context_for(batch.max_seq_len)
        padded = _padded(batch, *key, self._layout.block_size)
        graph = self._graphs.get(key)
        if graph is None:
            self._make(key, padded, chosen)
        else:
            self._graphs.move_to_end(key)
            self._stage(graph.packing, graph.inputs, padded)
            if chosen is not None:
                take_chosen(graph.batch.token_ids, graph.sources, chosen)
            graph.replay()
        return self._logits[:num_rows]

    def _make(self, key: tuple[int, int], padded: Batch, chosen: torch.Tensor | None) -> None:
        """Computes the step and captures how, for the next ones of its size."""
        assert padded.sources is not None
        packing = Packing([*padded.arrays, padded.sources])
        inputs = torch.empty(packing.num_bytes, dtype=torch.uint8, device=self._device)
        self._stage(packing, inputs, padded)
        *arrays, sources = packing.views(inputs)
        batch = padded.tensors(arrays)
        if chosen is not None:
            take_chosen(batch.token_ids, sources, chosen)
        logits = self._logits[: key[0]]

        def launch() -> None:
            logits.copy_(self._forward(batch))

        # What is compiled or allocated once is so before the capture, in which it must not be.
        launch()
        try:
            replay = self._capture(launch)
        except RuntimeError as error:
            if not self._alone:
                raise RuntimeError(
                    "model.cuda_graphs: a decode step of a model that several ranks share could not be captured; where "
                    "that is not for lack of memory, set it to false"
                ) from error
            logger.warning("decode steps are launched kernel by kernel: no CUDA graph can be made", exc_info=True)
            self._works = False
            self._graphs.clear()
            return
        self._graphs[key] = _Graph(packing, inputs, sources, batch, replay)
        if len(self._graphs) > _MAX_GRAPHS:
            self._graphs.popitem(last=False)

    def _stage(self, packing: Packing, inputs: torch.Tensor, padded: Batch) -> None:
        assert padded.sources is not None
        packed = packing.pack([*padded.arrays, padded.sources], pinned=inputs.is_cuda)
        inputs.copy_(packed, non_blocking=True)


def _size_for(num_rows: int) -> int:
    """The smallest size that has so many rows."""
    return next(size for size in _SIZES if size >= num_rows)


def _context_for(max_seq_len: int) -> int:
    """The smallest power of two that is as long, but no shorter than the shortest of all."""
    return max(_MIN_CONTEXT, 1 << (max_seq_len - 1).bit_length())


def _padded(batch: Batch, num_rows: int, context: int, block_size: int) -> Batch:
    """The decode step with rows up to `num_rows` and tables for contexts up to `context` tokens."""
    count = len(batch.seq_lens)
    more = num_rows - count
    width = -(-context // block_size)
    tables = []
    for table in batch.tables:
        wide = np.full((num_rows, width), NULL_BLOCK, np.int32)
        wide[:count, : table.shape[1]] = table
        tables.append(wide)
    sources = np.full(count, -1, np.int64) if batch.sources is None else batch.sources
    return Batch(
        token_ids=np.pad(batch.token_ids, (0, more)),
        positions=np.pad(batch.positions, (0, more)),
        cu_seqlens_q=np.arange(num_rows + 1, dtype=np.int32),
        seq_lens=np.pad(batch.seq_lens, (0, more)),
        tables=tuple(tables),
        slots=tuple(np.pad(slots, (0, more), constant_values=-1) for slots in batch.slots),
        logit_rows=np.arange(num_rows),
        max_query_len=1,
        max_seq_len=context,
        sources=np.pad(sources, (0, more), constant_values=-1),
    )
