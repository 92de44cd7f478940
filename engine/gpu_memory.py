"""How much of a GPU's memory the KV pool gets: what a worker's share leaves once its largest step has run.

That is measured at load, with the model and its kernels as they will serve, and a pool of two blocks in which all
sequences of the step lie.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable
from typing import Protocol

import torch

from engine.attention.base import AttentionBackend
from engine.batch import BatchItem
from engine.kv.layout import NULL_BLOCK, KVLayout
from engine.model_loader import LoadedModel
from engine.model_runner import ModelRunner
from engine.prompt_logprobs import MAX_CELLS
from engine.sampling import ranked

logger = logging.getLogger(__name__)

_GIB = 1 << 30
# What CUDA graphs of decode steps take at most, in the end: their buffers, and the driver's own for each.
_MAX_GRAPH_BYTES = _GIB
_GRAPH_SHARE = 1 / 32


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of one GPU.

    Attributes:
        total: all there are.
        free: that no process uses while this one rests, with the model loaded.
        held: that torch keeps for this process while it rests.
        peak: that it kept at most during the largest step.
    """

    total: int
    free: int
    held: int
    peak: int


class GpuMemory(Protocol):
    """What can be measured of a GPU's memory."""

    def measure(self, step: Callable[[], object]) -> MemoryUse:
        """Run `step` once and say what it took."""


class CudaMemory:
    """`GpuMemory` of a device of torch's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def measure(self, step: Callable[[], object]) -> MemoryUse:
        self._give_back()
        torch.cuda.reset_peak_memory_stats(self._device)
        step()
        peak = torch.cuda.max_memory_reserved(self._device)
        self._give_back()
        free, total = torch.cuda.mem_get_info(self._device)
        return MemoryUse(total=total, free=free, held=torch.cuda.memory_reserved(self._device), peak=peak)

    def _give_back(self) -> None:
        """Leave with torch's allocator no more than tensors need."""
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def graph_bytes(total: int) -> int:
    """What is kept for CUDA graphs on a GPU of so many bytes."""
    return min(_MAX_GRAPH_BYTES, int(total * _GRAPH_SHARE))


def pool_bytes(use: MemoryUse, *, utilization: float, graphs: bool, least: int) -> int:
    """Bytes of the KV pool.

    Args:
        utilization: share of all memory that the worker may use.
        graphs: whether CUDA graphs will be made.
        least: bytes of the smallest pool there can be.

    Raises:
        ValueError: no more is left; names the setting and what takes the memory.
    """
    reserve = graph_bytes(use.total) if graphs else 0
    left = int(use.total * utilization) - use.peak - reserve
    if left < least:
        raise ValueError(
            f"cache.gpu_memory_utilization: {utilization:g} of the GPU's {_gib(use.total)} leaves nothing for KV: the "
            f"model and its largest step take {_gib(use.peak)}, CUDA graphs {_gib(reserve)}; raise it, or lower "
            "prefill.max_batch_tokens or decode.max_batch_seqs"
        )
    free = use.free - (use.peak - use.held) - reserve
    if free < least:
        raise ValueError(
            f"cache.gpu_memory_utilization: of the GPU's {_gib(use.total)} only {_gib(use.free)} are free, which the "
            f"largest step ({_gib(use.peak - use.held)}) and CUDA graphs ({_gib(reserve)}) take; other processes use "
            f"about {_gib(use.total - use.free - use.held)}"
        )
    return min(left, free)


def largest_step(layout: KVLayout, *, chunk_tokens: int, decode_sequences: int, max_model_len: int) -> list[BatchItem]:
    """The step that takes most memory: a full chunk, whose prompt wants all its logprobs, beside all decodes.

    All tokens lie in one block, the pool's second: what is computed matters to nobody.

    Args:
        max_model_len: longest sequence; a larger chunk is of several.
    """
    lengths = [max_model_len] * (chunk_tokens // max_model_len) + [chunk_tokens % max_model_len]
    return [
        BatchItem([0] * length, 0, [[NULL_BLOCK + 1] * layout.num_blocks(length)] * len(layout.groups), length)
        for length in [1] * decode_sequences + lengths
        if length
    ]


def measured_pool_bytes(
    model: LoadedModel,
    layout: KVLayout,
    backend: AttentionBackend,
    *,
    utilization: float,
    chunk_tokens: int,
    decode_sequences: int,
    graphs: bool,
    memory: GpuMemory | None = None,
) -> int:
    """Run the worker's largest step and size its pool; arguments as of `pool_bytes` and `largest_step`.

    Raises:
        ValueError: nothing is left for the pool.
    """
    kv = torch.zeros(layout.pool_shape(2), dtype=layout.dtype, device=model.device)
    runner = ModelRunner(model, layout, kv, backend)
    items = largest_step(
        layout, chunk_tokens=chunk_tokens, decode_sequences=decode_sequences, max_model_len=model.max_model_len
    )

    def step() -> None:
        logits = runner.execute(items)
        # The largest of what is done with logits, for no more rows than are looked at together.
        ranked(logits[: max(decode_sequences, MAX_CELLS // logits.shape[1])], 1)

    use = (memory or CudaMemory(model.device)).measure(step)
    num_bytes = pool_bytes(use, utilization=utilization, graphs=graphs, least=2 * layout.block_bytes)
    logger.info(
        "of the GPU's %s the weights take %s and a step at most %s more; the KV pool gets %s",
        *map(_gib, (use.total, use.held, use.peak - use.held, num_bytes)),
    )
    return num_bytes


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
