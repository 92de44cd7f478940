"""`python -m bench.gpu`: attention over paged keys and values on the current GPU.

Decode reads every key and value once: its bytes per second are put beside those that a copy moves. Prefill computes:
its FLOP per second are put beside those of a matrix product.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import click
import torch

from bench.gpu import shapes
from bench.gpu.peers import PEERS, Run, prepared
from bench.gpu.timing import copy_bandwidth, gemm_rate, seconds
from bench.gpu.tuner import tune
from bench.kernels import Call, Shape
from bench.report import TableText, print_table
from engine.attention import make_backend

OURS = "Baton"
# Of the GPU's memory, what a call's keys and values may take: peers copy them.
_MEMORY_SHARE = 0.3


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """
    Attributes:
        share: of the copy's bandwidth for a decode, of the product's rate for a prefill.
        error: relative to what torch computes of the same call, |out - torch| / |torch|; None for torch's own.
    """

    implementation: str
    shape: str
    seconds: float
    share: float
    error: float | None


def measure(shape: Shape, block_size: int, device: torch.device, copy: float, gemm: float) -> list[Measured]:
    """One shape by every implementation that there is."""
    call = Call.make(shapes.layout(block_size), shape, shapes.NUM_HEADS, device)
    backend = make_backend("triton", device)
    runs: dict[str, Run] = {OURS: lambda: call.run(backend)}
    runs |= {name: run for name in PEERS if (run := prepared(name, call)) is not None}
    outputs = {name: run().clone() for name, run in runs.items()}
    reference = outputs.get("torch SDPA")
    found = []
    for name, run in runs.items():
        taken = seconds(run)
        share = call.kv_bytes / taken / copy if shape.queries == 1 else call.flops / taken / gemm
        error = None if reference is None or name == "torch SDPA" else difference(outputs[name], reference)
        found.append(Measured(name, str(shape), taken, share, error))
    return found


def difference(out: torch.Tensor, reference: torch.Tensor) -> float:
    """|out - reference| / |reference|."""
    return float((out.double() - reference.double()).norm() / reference.double().norm())


@click.command("gpu")
@click.option("--block-size", default=64, show_default=True, type=click.IntRange(16, 256), help="Tokens of a block.")
@click.option("--tune", "only_tune", is_flag=True, help="Measure tiles, and print rows of engine/kernels/tiles.py.")
@click.option("--output", type=click.Path(path_type=pathlib.Path), help="Write the figures there, as JSON.")
def command(block_size: int, only_tune: bool, output: pathlib.Path | None) -> None:
    """Measure attention on the current GPU."""
    if not torch.cuda.is_available():
        raise click.ClickException("there is no GPU here")
    device = torch.device("cuda", torch.cuda.current_device())
    if only_tune:
        for line in tune(device, block_size):
            click.echo(line)
        return
    copy, gemm = copy_bandwidth(device), gemm_rate(device, torch.bfloat16)
    memory = int(torch.cuda.get_device_properties(device).total_memory * _MEMORY_SHARE)
    found = [
        each
        for shape in (*shapes.decodes(shapes.layout(block_size), memory), *shapes.prefills())
        for each in measure(shape, block_size, device, copy, gemm)
    ]
    title = f"{torch.cuda.get_device_name(device)}: copies {copy / 1e12:.2f} TB/s, products {gemm / 1e12:.0f} TFLOP/s"
    rows = [
        (
            each.shape,
            each.implementation,
            f"{each.seconds * 1e6:.1f}",
            f"{each.share:.0%}",
            "" if each.error is None else f"{each.error:.1e}",
        )
        for each in found
    ]
    print_table(TableText(title, ("shape", "by", "us", "of the limit", "error"), rows))
    if output:
        limits = {"copy_bytes_per_s": copy, "gemm_flops_per_s": gemm}
        output.write_text(json.dumps(limits | {"calls": [dataclasses.asdict(each) for each in found]}, indent=2) + "\n")


if __name__ == "__main__":
    command()
