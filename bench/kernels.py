"""`baton bench kernels`: attention backends against what the machine can do, in the same run.

Decode reads every key and value once and does little with them: its bytes per second are put beside those that a copy
moves. Prefill computes: its FLOPs per second are put beside those of a plain matrix product.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import click
import torch

from bench import report
from bench.ceilings import best_seconds, copy_bandwidth, gemm_rate
from bench.provenance import Provenance
from bench.report import Report, TableText, print_table
from engine.attention import AttentionBackend, AttentionContext, GroupMetadata, backends_of, make_backend
from engine.dry_run import LayerAttention
from engine.kv.huge_pages import advise_huge_pages
from engine.kv.layout import KVGroup, KVLayout

_CPU = torch.device("cpu")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """One call: `sequences` times `queries` tokens, the last ones of a context each."""

    sequences: int
    queries: int
    context: int

    def __str__(self) -> str:
        kind = "decode" if self.queries == 1 else "prefill"
        return f"{kind} {self.sequences} x {self.queries} of {self.context}"


SHAPES = (
    Shape(1, 1, 4096),
    Shape(8, 1, 256),
    Shape(32, 1, 256),
    Shape(32, 1, 2048),
    Shape(1, 512, 512),
    Shape(1, 512, 2048),
    Shape(1, 512, 8192),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """
    Attributes:
        share: of the machine's copy bandwidth for a decode, of its rate of matrix products for a prefill.
    """

    backend: str
    dtype: str
    shape: str
    seconds: float
    bytes_per_s: float
    flops_per_s: float
    share: float


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A backend's arguments for one shape, over a pool whose blocks lie in random order."""

    layout: KVLayout
    shape: Shape
    num_heads: int
    pages: torch.Tensor
    query: torch.Tensor
    group: GroupMetadata
    context: AttentionContext

    @classmethod
    def make(cls, layout: KVLayout, shape: Shape, num_heads: int, device: torch.device = _CPU) -> Call:
        generator = torch.Generator(device).manual_seed(0)
        width = layout.num_blocks(shape.context)
        num_blocks = shape.sequences * width
        pages = torch.empty(layout.pool_shape(num_blocks + 1)[1:], dtype=layout.dtype, device=device)
        if device.type == "cpu":
            advise_huge_pages(pages)
        pages.normal_(generator=generator)
        order = torch.randperm(num_blocks, generator=generator, device=device)
        tables = (order + 1).int().view(shape.sequences, width)
        tokens = shape.sequences * shape.queries
        group = GroupMetadata(tables, torch.zeros(tokens, dtype=torch.int64, device=device))
        context = AttentionContext(
            kv=pages[None],
            layout=layout,
            cu_seqlens_q=torch.arange(shape.sequences + 1, dtype=torch.int32, device=device) * shape.queries,
            seq_lens=torch.full((shape.sequences,), shape.context, dtype=torch.int32, device=device),
            groups=(group,),
            max_query_len=shape.queries,
            max_seq_len=shape.context,
        )
        query = torch.randn(tokens, num_heads, layout.head_dim, generator=generator, device=device).to(layout.dtype)
        return cls(layout, shape, num_heads, pages, query, group, context)

    def run(self, backend: AttentionBackend) -> torch.Tensor:
        return backend.attend(
            self.query,
            self.pages,
            self.group,
            self.context,
            scale=self.layout.head_dim**-0.5,
            window=None,
            softcap=None,
            sinks=None,
        )

    @property
    def kv_bytes(self) -> int:
        return self.shape.sequences * self.layout.num_blocks(self.shape.context) * self.layout.block_bytes

    @property
    def flops(self) -> float:
        """Of both products, masked keys not counted."""
        shape = self.shape
        keys = shape.queries * (shape.context - shape.queries) + shape.queries * (shape.queries + 1) / 2
        return 4.0 * shape.sequences * keys * self.num_heads * self.layout.head_dim


@click.command("kernels")
@click.option(
    "--backend", multiple=True, default=("cpu",), show_default=True, type=click.Choice(sorted(backends_of(_CPU)))
)
@click.option("--dtype", multiple=True, default=tuple(_DTYPES), show_default=True, type=click.Choice(list(_DTYPES)))
@click.option("--heads", default=8, show_default=True, type=click.IntRange(1), help="Query heads.")
@click.option("--kv-heads", default=4, show_default=True, type=click.IntRange(1), help="Key/value heads.")
@click.option("--head-dim", default=64, show_default=True, type=click.IntRange(8), help="Width of a head.")
@click.option("--block-size", default=16, show_default=True, type=click.IntRange(1), help="Tokens of a block.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(1), help="Runs; the best one counts.")
@report.json_option
def command(
    backend: Sequence[str],
    dtype: Sequence[str],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    threads: int,
    rounds: int,
    output: str | None,
) -> None:
    """Measure attention over paged keys and values."""
    if heads % kv_heads:
        raise click.UsageError(f"--heads {heads}: not a multiple of --kv-heads {kv_heads}")
    parameters = {name: value for name, value in locals().items() if name != "output"}
    torch.set_num_threads(threads)
    copy, gemm = copy_bandwidth(rounds), gemm_rate(rounds=rounds)
    found = []
    for name in dtype:
        layout = KVLayout((KVGroup((0,)),), kv_heads, head_dim, block_size, _DTYPES[name])
        backends = {each: make_backend(each, _CPU) for each in backend}
        for made in backends.values():
            made.prepare(layout, [LayerAttention(heads, kv_heads, head_dim, None, None, has_sinks=False)])
        for shape in SHAPES:
            prepared = Call.make(layout, shape, heads)
            for each, made in backends.items():
                seconds = best_seconds(functools.partial(prepared.run, made), rounds)
                bytes_per_s, flops_per_s = prepared.kv_bytes / seconds, prepared.flops / seconds
                share = bytes_per_s / copy if shape.queries == 1 else flops_per_s / gemm
                found.append(Measured(each, name, str(shape), seconds, bytes_per_s, flops_per_s, share))
    title = f"{threads} thread(s); a copy moves {copy / 1e9:.1f} GB/s, a product runs at {gemm / 1e9:.0f} GFLOP/s"
    print_table(
        TableText(
            title,
            ("shape", "backend", "KV", "ms", "GB/s", "GFLOP/s", "of the limit"),
            [
                (
                    call.shape,
                    call.backend,
                    call.dtype,
                    f"{call.seconds * 1e3:.3f}",
                    f"{call.bytes_per_s / 1e9:.1f}",
                    f"{call.flops_per_s / 1e9:.1f}",
                    f"{call.share:.0%}",
                )
                for call in found
            ],
        )
    )
    if output:
        limits = {"copy_bytes_per_s": copy, "gemm_flops_per_s": gemm}
        results = limits | {"calls": [dataclasses.asdict(call) for call in found]}
        Report("kernels", Provenance.collect(), parameters, results).write(output)
