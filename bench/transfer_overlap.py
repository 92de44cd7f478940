"""`baton bench transfer --overlap`: what a transfer adds to a prefill whose layers are pushed while later ones compute.

The sender's process holds a model and its engine and computes one prompt, in turn with and without pushing. What is
exposed is the time from the end of the prefill until the receiver has everything, verified and committed.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch

from baton.config import CacheConfig, ModelConfig, PrefillConfig
from bench.checkpoint import MIN_VOCAB_SIZE
from bench.transfer_pair import CPU, Pushing, Transport, make_sender, pair
from engine.kv.layout import KVLayout
from kvtransfer.push import Push

if TYPE_CHECKING:
    from engine.engine import Engine


@dataclasses.dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt: seconds of its computation, and seconds from there to the receiver's commit where it was pushed."""

    prefill_s: float
    exposed_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Overlap:
    """Medians of some rounds, in seconds."""

    alone_s: float
    pushing_s: float
    exposed_s: float

    @property
    def exposed_share(self) -> float:
        """Of the prefill without pushing."""
        return self.exposed_s / self.alone_s

    @property
    def added_share(self) -> float:
        """What pushing adds to the time until decode may begin: to the prefill itself, and after it."""
        return (self.pushing_s + self.exposed_s) / self.alone_s - 1


def measure_overlap(
    transport: Transport,
    num_tokens: int,
    rounds: int,
    model: pathlib.Path,
    layout: KVLayout,
    *,
    chunk_tokens: int = PrefillConfig().max_batch_tokens,
    device: torch.device = CPU,
) -> Overlap:
    """Computes a prompt of `num_tokens` tokens `rounds` times each way, after one that warms everything up.

    Args:
        model: the checkpoint, whose KV has this `layout`.
        device: where it computes, and where both pools are.
    """
    num_blocks = layout.num_blocks(num_tokens)
    sending = (str(model), layout, num_tokens, chunk_tokens, device)
    with pair(transport, layout, num_blocks, run_prefills, *sending, device=device) as both:
        alone: list[Prefill] = []
        pushing: list[Prefill] = []
        for _ in range(rounds + 1):
            alone.append(both.order(num_blocks, False))
            pushing.append(both.order(num_blocks, True))
    return Overlap(
        alone_s=statistics.median(prefill.prefill_s for prefill in alone[1:]),
        pushing_s=statistics.median(prefill.prefill_s for prefill in pushing[1:]),
        exposed_s=statistics.median(prefill.exposed_s for prefill in pushing[1:]),
    )


def run_prefills(
    pipe: Connection,
    transport: Transport,
    model: str,
    layout: KVLayout,
    num_tokens: int,
    chunk_tokens: int,
    device: torch.device,
) -> None:
    """The sender's process: for each order a prefill, pushed if the order says so."""
    # Only here, where it is used: it loads transformers.
    from engine.engine import load_engine

    dtype = str(layout.dtype).removeprefix("torch.")
    num_bytes = (layout.num_blocks(num_tokens) + 1) * layout.block_bytes
    engine = load_engine(
        ModelConfig.model_validate({"path": model, "device": device.type, "dtype": dtype}),
        CacheConfig.model_validate({"block_size": layout.block_size, "kv_cache_bytes": num_bytes}),
        chunk_tokens=chunk_tokens,
    )
    sender = make_sender(engine.cache.kv, engine.layout, transport)
    token_ids = [index % MIN_VOCAB_SIZE for index in range(num_tokens)]
    while (order := pipe.recv()) is not None:
        ticket, pushes = order
        pipe.send(_prefill(engine, token_ids, chunk_tokens, Pushing(sender, ticket) if pushes else None))
    sender.close()


def _prefill(engine: Engine, token_ids: Sequence[int], chunk_tokens: int, pushing: Pushing | None) -> Prefill:
    from engine.batch import BatchItem

    cache, layout = engine.cache, engine.layout
    blocks = cache.begin(cache.match([], 0))
    started_s = time.perf_counter()
    for start in range(0, len(token_ids), chunk_tokens):
        end = min(start + chunk_tokens, len(token_ids))
        allocated = cache.allocate(blocks, end)
        assert allocated, "the pool holds one prompt"
        rows = blocks.rows()
        item = BatchItem(token_ids[start:end], start=start, tables=rows, num_logits=int(end == len(token_ids)))
        first = start // layout.block_size
        last = layout.num_blocks(end) if end == len(token_ids) else end // layout.block_size
        on_layer = None if pushing is None else functools.partial(_push_layer, pushing.push, layout, rows, first, last)
        logits = engine.runner.execute([item], on_layer=on_layer)
    # The first token, which waits for a GPU; with it the prompt is committed.
    logits[-1].argmax().item()
    computed_s = time.perf_counter()
    exposed_s = 0.0 if pushing is None else pushing.commit() - computed_s
    cache.free(blocks)
    return Prefill(computed_s - started_s, exposed_s)


def _push_layer(
    push: Push, layout: KVLayout, rows: Sequence[npt.NDArray[Any]], first: int, last: int, layer: int
) -> None:
    """Pushes logical blocks [first, last) of a layer, as the prefill worker does."""
    group, slot = layout.location(layer)
    if first < last:
        push.send(group, slot, first, rows[group][first:last].tolist())
