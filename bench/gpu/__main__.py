"""`python -m bench.gpu`: all that is measured on a GPU, one part after another, in this process and its children."""

from __future__ import annotations

import gc
import pathlib
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
import torch
from transformers.utils.logging import disable_progress_bar

from bench import report
from bench.gpu import attention, serving, steps, transfers
from bench.gpu.scale import FULL, TINY
from bench.gpu.stand import Found, Stand
from bench.gpu.tuner import tune
from bench.provenance import Provenance

PARTS: Mapping[str, Callable[[Stand], Found]] = {
    "attention": attention.measure,
    "steps": steps.measure,
    "transfers": transfers.measure,
    "serving": serving.measure,
}
_PACKAGES = ("triton", "flashinfer-python", "vllm")


@click.command("gpu")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(list(PARTS)),
    help="Measure this alone; may be given several times  [default: everything]",
)
@click.option(
    "--device",
    default="cuda",
    show_default=True,
    type=click.Choice(["cuda", "cpu"]),
    help="On cpu all is tiny and shows no more than that it runs.",
)
@click.option(
    "--block-size",
    default="64",
    show_default=True,
    type=click.Choice(["16", "32", "64", "128", "256"]),
    help="Tokens of a KV block.",
)
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path),
    help="Where models are written meanwhile, 18 GB  [default: the system's for temporary files]",
)
@click.option("--tune", "only_tune", is_flag=True, help="Measure tiles, and print rows of engine/kernels/tiles.py.")
@report.json_option
def command(
    only: Sequence[str],
    device: str,
    block_size: str,
    folder: pathlib.Path | None,
    only_tune: bool,
    output: str | None,
) -> None:
    """Measure attention, steps, transfers and a server on the current GPU.

    A part that fails is told of at the end; what the others have found is in the output all the same.
    """
    where = torch.device(device)
    if device == "cuda":
        if not torch.cuda.is_available():
            raise click.ClickException("there is no GPU here")
        where = torch.device("cuda", torch.cuda.current_device())
    if only_tune:
        if device == "cpu":
            raise click.UsageError("--tune: tiles are those of a GPU")
        for line in tune(where, int(block_size)):
            click.echo(line)
        return
    disable_progress_bar()
    scale = FULL if device == "cuda" else TINY
    parameters = {"only": list(only), "device": device, "block_size": int(block_size)}
    results: dict[str, Any] = {}
    failed = []
    with tempfile.TemporaryDirectory(prefix="baton-bench-", dir=folder) as scratch:
        stand = Stand.make(where, scale, pathlib.Path(scratch), int(block_size))
        click.echo(stand.title)
        limits = {"copy_bytes_per_s": stand.copy_bytes_per_s, "gemm_flops_per_s": stand.gemm_flops_per_s}
        for name in only or PARTS:
            started_s = time.monotonic()
            try:
                found = PARTS[name](stand)
            except Exception:
                traceback.print_exc()
                failed.append(name)
                continue
            finally:
                _give_back(where)
            for table in found.tables:
                report.print_table(table)
            click.echo(f"{name}: {time.monotonic() - started_s:.0f} s")
            results[name] = found.results
            if output is not None:
                provenance = Provenance.collect(packages=_PACKAGES)
                report.Report("gpu", provenance, parameters, limits | results).write(output)
    if failed:
        raise click.ClickException(f"could not be measured: {', '.join(failed)}")


def _give_back(device: torch.device) -> None:
    """Frees what a part has left on a GPU, for the processes of the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    command()
