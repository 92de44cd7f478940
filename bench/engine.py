"""`baton bench engine`: one worker's forward passes against what the machine can do.

Prefill is bound by arithmetic: its FLOPs per second are put beside those of a plain matrix product. Decode is bound by
its own products, of few rows each, and by the keys and values that it reads: a step is put beside the time of these
products alone, by the faster of oneDNN and our own kernel, plus that of the KV bytes at the machine's copy bandwidth.
All in one process, on the same threads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import click
import torch

from baton.config import CacheConfig, ModelConfig
from bench import report
from bench.ceilings import best_seconds, copy_bandwidth, gemm_rate
from bench.provenance import Provenance
from bench.report import Report, TableText, print_table
from engine.batch import BatchItem
from engine.engine import Engine, load_engine
from engine.fused.linear import PackedLinear, PanelLinear, has_kernels
from engine.model_loader import load_model

PREFILL_AIM = 0.7
DECODE_AIM = 1.5


@dataclasses.dataclass(frozen=True, slots=True)
class Prefill:
    """One chunk.

    Attributes:
        prefix: tokens of the sequence that were computed before.
        flops: of all layers over all tokens of the chunk, attention included, and of one row of logits; that the last
            layer is computed for that row alone is the engine's gain.
    """

    chunk: int
    prefix: int
    seconds: float
    flops: float
    gemm_flops_per_s: float

    @property
    def share(self) -> float:
        """Of the rate of a plain matrix product."""
        return self.flops / self.seconds / self.gemm_flops_per_s


@dataclasses.dataclass(frozen=True, slots=True)
class Decode:
    """One step of `batch` sequences.

    Attributes:
        gemm_s: the step's matrix products alone.
        kv_bytes: keys and values that the step reads.
    """

    batch: int
    context: int
    seconds: float
    gemm_s: float
    kv_bytes: int
    copy_bytes_per_s: float

    @property
    def limit_s(self) -> float:
        return self.gemm_s + self.kv_bytes / self.copy_bytes_per_s

    @property
    def ratio(self) -> float:
        """Of the step to its limit."""
        return self.seconds / self.limit_s


class Products:
    """A model's matrix products alone, in the order of its layers."""

    def __init__(self, config: ModelConfig) -> None:
        linears = [module for module in load_model(config).module.modules() if type(module) is torch.nn.Linear]
        self.shapes = [(linear.in_features, linear.out_features) for linear in linears]
        self._dtype = linears[0].weight.dtype
        self._kinds: list[list[torch.nn.Module]] = [[PackedLinear([linear]) for linear in linears]]
        if has_kernels(self._dtype):
            self._kinds.append([PanelLinear(linear) for linear in linears])

    def seconds(self, rows: int, rounds: int) -> float:
        """The time that all products of so many rows take, by what is fastest."""
        return min(best_seconds(functools.partial(self._run, kind, rows), rounds) for kind in self._kinds)

    @torch.inference_mode()
    def _run(self, kind: Sequence[torch.nn.Module], rows: int) -> None:
        inputs = {width: torch.ones((rows, width), dtype=self._dtype) for width, _ in self.shapes}
        for (width, _), linear in zip(self.shapes, kind, strict=True):
            linear(inputs[width])


class Work:
    """Random tokens for an engine, over blocks of its pool in random order."""

    def __init__(self, engine: Engine) -> None:
        self._layout = engine.layout
        self._vocab_size = engine.model.vocab_size
        self._generator = torch.Generator().manual_seed(0)
        order = torch.randperm(engine.cache.pool.num_usable, generator=self._generator) + 1
        self._blocks: list[int] = order.tolist()

    def chunk(self, start: int, count: int) -> BatchItem:
        """Tokens [start, start + count) of a prompt, which wants the logits of its last one."""
        return self._item(start, count, self._blocks)

    def decodes(self, batch: int, context: int) -> list[BatchItem]:
        """The last token of `batch` sequences of `context` tokens.

        Raises:
            ValueError: the pool does not hold so many.
        """
        width = self._layout.num_blocks(context)
        if batch * width * len(self._layout.groups) > len(self._blocks):
            raise ValueError(f"{batch} x {context} tokens do not fit the pool")
        return [self._item(context - 1, 1, self._blocks[index * width :]) for index in range(batch)]

    def _item(self, start: int, count: int, blocks: Sequence[int]) -> BatchItem:
        width = self._layout.num_blocks(start + count)
        tables = [blocks[group * width : (group + 1) * width] for group in range(len(self._layout.groups))]
        tokens = torch.randint(self._vocab_size, (count,), generator=self._generator)
        return BatchItem(tokens.tolist(), start, tables, 1)


class Stand:
    """An engine, its products alone, and work for it."""

    def __init__(self, engine: Engine, products: Products, rounds: int) -> None:
        self._engine = engine
        self._products = products
        self._rounds = rounds
        self._work = Work(engine)

    def prefill(self, chunk: int, prefix: int, gemm_flops_per_s: float) -> Prefill:
        items = [self._work.chunk(prefix, chunk)]
        seconds = best_seconds(lambda: self._engine.runner.execute(items), self._rounds)
        return Prefill(chunk, prefix, seconds, self._flops(chunk, prefix), gemm_flops_per_s)

    def decode(self, batch: int, context: int, copy_bytes_per_s: float) -> Decode:
        try:
            items = self._work.decodes(batch, context)
        except ValueError as error:
            raise click.UsageError(f"--batch {batch}: {error}; raise --kv-bytes") from error
        layout = self._engine.layout
        seconds = best_seconds(lambda: self._engine.runner.execute(items), self._rounds)
        gemm_s = self._products.seconds(batch, self._rounds)
        kv_bytes = batch * layout.num_blocks(context) * layout.block_bytes * len(layout.groups)
        return Decode(batch, context, seconds, gemm_s, kv_bytes, copy_bytes_per_s)

    def _flops(self, chunk: int, prefix: int) -> float:
        model = self._engine.model
        *layers, head = (2.0 * width * height for width, height in self._products.shapes)
        keys = chunk * prefix + chunk * (chunk + 1) / 2
        attention = sum(4.0 * layer.num_heads * layer.head_dim * keys for layer in model.layers)
        return chunk * sum(layers) + head + attention


@click.command("engine")
@click.option("--model", required=True, metavar="DIR", help="Checkpoint of the Llama shape.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of the engine.")
@click.option("--chunk", default=512, show_default=True, type=click.IntRange(1), help="Prompt tokens of one step.")
@click.option("--prefix", multiple=True, default=(0, 1536), show_default=True, type=click.IntRange(0))
@click.option("--batch", multiple=True, default=(1, 8, 32, 64), show_default=True, type=click.IntRange(1))
@click.option("--context", default=256, show_default=True, type=click.IntRange(1), help="Tokens that a decode sees.")
@click.option("--kv-bytes", default=1 << 30, show_default=True, type=click.IntRange(1), help="Bytes of the KV pool.")
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(1), help="Runs; the best one counts.")
@report.json_option
def command(
    model: str,
    threads: int,
    chunk: int,
    prefix: Sequence[int],
    batch: Sequence[int],
    context: int,
    kv_bytes: int,
    rounds: int,
    output: str | None,
) -> None:
    """Measure one engine's steps against the machine's limits."""
    parameters = {name: value for name, value in locals().items() if name != "output"}
    config = ModelConfig(path=model, num_threads=threads)
    engine = load_engine(config, CacheConfig(kv_cache_bytes=kv_bytes), chunk_tokens=chunk)
    if not engine.model.prunes_rows:
        raise click.UsageError(f"--model {model}: its layers are not fused, so their products cannot be told apart")
    gemm, copy = gemm_rate(rounds=rounds), copy_bandwidth(rounds)
    stand = Stand(engine, Products(config), rounds)
    prefills = [stand.prefill(chunk, each, gemm) for each in prefix]
    decodes = [stand.decode(each, context, copy) for each in batch]
    for table in _tables(prefills, decodes, threads, gemm, copy):
        print_table(table)
    results: dict[str, Any] = {
        "gemm_flops_per_s": gemm,
        "copy_bytes_per_s": copy,
        "prefill": [dataclasses.asdict(each) | {"share": each.share} for each in prefills],
        "decode": [dataclasses.asdict(each) | {"limit_s": each.limit_s, "ratio": each.ratio} for each in decodes],
    }
    if output:
        Report("engine", Provenance.collect(), parameters, results).write(output)


def _tables(
    prefills: Sequence[Prefill], decodes: Sequence[Decode], threads: int, gemm: float, copy: float
) -> list[TableText]:
    on = f"{threads} thread{'' if threads == 1 else 's'}"
    return [
        TableText(
            f"Prefill on {on}; a matrix product runs at {gemm / 1e9:.0f} GFLOP/s (aim: {PREFILL_AIM:.0%} of it)",
            ("chunk at prefix", "ms", "GFLOP/s", "of the product's"),
            [
                (
                    f"{p.chunk} at {p.prefix}",
                    f"{p.seconds * 1e3:.1f}",
                    f"{p.flops / p.seconds / 1e9:.1f}",
                    f"{p.share:.0%}",
                )
                for p in prefills
            ],
        ),
        TableText(
            f"Decode on {on}; a copy moves {copy / 1e9:.1f} GB/s, read and written (aim: {DECODE_AIM} x the limit)",
            ("batch x context", "ms", "products ms", "KV MB", "limit ms", "x limit"),
            [
                (
                    f"{d.batch} x {d.context}",
                    f"{d.seconds * 1e3:.2f}",
                    f"{d.gemm_s * 1e3:.2f}",
                    f"{d.kv_bytes / 1e6:.1f}",
                    f"{d.limit_s * 1e3:.2f}",
                    f"{d.ratio:.2f}",
                )
                for d in decodes
            ],
        ),
    ]
