"""`baton bench transfer`: KV transfers between two processes of this host.

For each transport the time from `Sender.open` to the receiver's answer to Commit, copy-in and checksums included, for a
long prompt (GB/s, and as a share of this machine's copy bandwidth, measured in the same run) and for a single block
(latency), and the CPU time that each side takes; beside them what gRPC makes of bare messages of that size. The pool is
that of a Llama with 12 layers and 4 KV heads of 64, in blocks of 16 tokens. With --overlap also what a transfer adds to
a real prefill of the same shape.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection

import click
import torch

from bench import report
from bench.ceilings import copy_bandwidth
from bench.checkpoint import Sizes, make_checkpoint
from bench.provenance import Provenance
from bench.report import Report, TableText, print_table
from bench.transfer_ceiling import grpc_bandwidth
from bench.transfer_overlap import Overlap, measure_overlap
from bench.transfer_pair import CPU, Pair, Pushing, Transport, cpu_s, kv_layout, make_pool, make_sender, pair
from engine.kv.layout import KVLayout

TRANSPORTS: tuple[Transport, ...] = ("shm", "collective", "grpc")


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """
    Attributes:
        seconds: of each round.
        first_s: of the transfer before them, which makes the connection if it is the pair's first.
        num_bytes: that one round moves.
        sender_cpu_s, receiver_cpu_s: of all rounds together.
    """

    seconds: tuple[float, ...]
    first_s: float
    num_bytes: int
    sender_cpu_s: float
    receiver_cpu_s: float

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.median_s

    def per_gb(self, cpu_s: float) -> float:
        """CPU seconds for each 10^9 bytes."""
        return cpu_s / (self.num_bytes * len(self.seconds) / 1e9)


def measure(
    transport: Transport, layout: KVLayout, num_blocks: int, rounds: int, device: torch.device = CPU
) -> tuple[Result, Result]:
    """Times `rounds` transfers of `num_blocks` blocks, and of one, each after one more, between pools on `device`."""
    with pair(transport, layout, num_blocks, run_pushes, layout, num_blocks, device, device=device) as both:
        return _measure(both, num_blocks, rounds), _measure(both, 1, rounds)


def _measure(both: Pair, num_blocks: int, rounds: int) -> Result:
    first_s, _ = both.order(num_blocks, num_blocks)
    started_s = cpu_s()
    timed = [both.order(num_blocks, num_blocks) for _ in range(rounds)]
    receiver_cpu_s = cpu_s() - started_s
    return Result(
        seconds=tuple(seconds for seconds, _ in timed),
        first_s=first_s,
        num_bytes=num_blocks * both.layout.block_bytes,
        sender_cpu_s=sum(cpu for _, cpu in timed),
        receiver_cpu_s=receiver_cpu_s,
    )


def run_pushes(pipe: Connection, transport: Transport, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
    """The sender's process: pushes all layers of its blocks for each ticket; answers seconds and CPU seconds."""
    sender = make_sender(make_pool(layout, num_blocks, device), layout, transport)
    while (order := pipe.recv()) is not None:
        ticket, num_pushed = order
        block_ids = list(range(1, num_pushed + 1))
        started_s, started_cpu_s = time.perf_counter(), cpu_s()
        pushing = Pushing(sender, ticket)
        for slot in range(layout.num_slots):
            pushing.push.send(0, slot, 0, block_ids)
        ended_s = pushing.commit()
        pipe.send((ended_s - started_s, cpu_s() - started_cpu_s))
    sender.close()


@click.command()
@click.option(
    "--tokens", type=click.IntRange(min=1), default=2048, show_default=True, help="Length of the long prompt."
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Transfers of which the median is taken.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the KV.",
)
@click.option("--overlap", is_flag=True, help="Also push a real prefill layer by layer, in float32.")
@report.json_option
def command(*, tokens: int, rounds: int, dtype: str, overlap: bool, output: str | None) -> None:
    """Measure every transport between two processes of this host, each on half of its cores."""
    kv = kv_layout(Sizes(), dtype)
    num_blocks = kv.num_blocks(tokens)
    torch.set_num_threads(1)
    # Of bytes copied, where the bandwidth counts each as read and as written.
    limit = copy_bandwidth(rounds) / 2
    bare_grpc = grpc_bandwidth(num_blocks * kv.block_bytes, rounds)
    measured = {transport: measure(transport, kv, num_blocks, rounds) for transport in TRANSPORTS}
    prompts = {transport: prompt for transport, (prompt, _) in measured.items()}
    blocks = {transport: block for transport, (_, block) in measured.items()}
    print_table(transfer_table(prompts, blocks, limit, bare_grpc))
    overlaps: dict[Transport, Overlap] = {}
    if overlap:
        with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
            model = pathlib.Path(folder)
            make_checkpoint(model)
            overlaps = {
                transport: measure_overlap(transport, tokens, max(1, rounds // 4), model, kv_layout(Sizes(), "float32"))
                for transport in TRANSPORTS
            }
        print_table(overlap_table(overlaps, tokens))
    if output is not None:
        results = {
            "copy_bytes_per_s": limit,
            "bare_grpc_bytes_per_s": bare_grpc,
            "prompt": {name: dataclasses.asdict(result) for name, result in prompts.items()},
            "block": {name: dataclasses.asdict(result) for name, result in blocks.items()},
            "overlap": {name: dataclasses.asdict(result) for name, result in overlaps.items()},
        }
        parameters = {"tokens": tokens, "rounds": rounds, "dtype": dtype, "overlap": overlap}
        Report("transfer", Provenance.collect(), parameters, results).write(output)


def transfer_table(
    prompts: Mapping[Transport, Result],
    blocks: Mapping[Transport, Result],
    copy_bytes_per_s: float,
    bare_grpc_bytes_per_s: float | None = None,
) -> TableText:
    """What of each transport is shown."""
    num_bytes = next(iter(prompts.values())).num_bytes
    title = f"{num_bytes / 1e6:.1f} MB between two processes; a plain copy makes {copy_bytes_per_s / 1e9:.1f} GB/s"
    if bare_grpc_bytes_per_s is not None:
        title += f", bare gRPC {bare_grpc_bytes_per_s / 1e9:.2f}"
    return TableText(
        title,
        ("transport", "ms", "first, ms", "GB/s", "of a copy", "sender CPU s/GB", "receiver CPU s/GB", "one block, ms"),
        [
            (
                name,
                f"{result.median_s * 1e3:.1f}",
                f"{result.first_s * 1e3:.1f}",
                f"{result.bytes_per_s / 1e9:.2f}",
                f"{result.bytes_per_s / copy_bytes_per_s:.0%}",
                f"{result.per_gb(result.sender_cpu_s):.2f}",
                f"{result.per_gb(result.receiver_cpu_s):.2f}",
                f"{blocks[name].median_s * 1e3:.2f}",
            )
            for name, result in prompts.items()
        ],
    )


def overlap_table(overlaps: Mapping[Transport, Overlap], num_tokens: int) -> TableText:
    return TableText(
        f"prefill of {num_tokens} tokens, pushed layer by layer",
        ("transport", "prefill alone, ms", "while pushing, ms", "then until committed, ms", "of the prefill", "in all"),
        [
            (
                name,
                f"{overlap.alone_s * 1e3:.0f}",
                f"{overlap.pushing_s * 1e3:.0f}",
                f"{overlap.exposed_s * 1e3:.1f}",
                f"{overlap.exposed_share:.1%}",
                f"{overlap.added_share:+.1%}",
            )
            for name, overlap in overlaps.items()
        ],
    )
