"""Attention over paged keys and values.

Decode reads every key and value once: its bytes per second are put beside those that a copy moves. Prefill computes:
its FLOP per second are put beside those of a matrix product.
"""

from __future__ import annotations

import dataclasses

import torch

from bench.gpu import shapes
from bench.gpu.peers import PEERS, Run, missing, prepared
from bench.gpu.stand import Found, Stand
from bench.gpu.timing import seconds
from bench.kernels import Call, Shape
from bench.report import TableText
from engine.attention import make_backend
from engine.dry_run import LayerAttention

DECODE_AIM, PREFILL_AIM = 0.9, 0.6
OURS = "Baton"
_REFERENCE = "torch SDPA"
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


def measure(stand: Stand) -> Found:
    """Every shape whose keys and values fit, by every implementation that there is."""
    scale, device = stand.scale, stand.device
    pool = scale.layer(stand.block_size)
    fitting = scale.calls
    if device.type == "cuda":
        memory = int(torch.cuda.get_device_properties(device).total_memory * _MEMORY_SHARE)
        fitting = tuple(shapes.fitting(scale.calls, pool, memory))
    found = [each for shape in fitting for each in _measure(stand, shape)]
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
    title = f"attention (aims: decodes at {DECODE_AIM:.0%} of a copy, prefills at {PREFILL_AIM:.0%} of a product)"
    if absent := missing():
        title += f"; not installed: {', '.join(absent)}"
    table = TableText(title, ("shape", "by", "us", "of the limit", "error"), rows)
    return Found([table], {"missing": absent, "calls": [dataclasses.asdict(each) for each in found]})


def _measure(stand: Stand, shape: Shape) -> list[Measured]:
    pool, sizes, device = stand.scale.layer(stand.block_size), stand.scale.large, stand.device
    call = Call.make(pool, shape, sizes.num_heads, device)
    backend = make_backend("auto", device)
    backend.prepare(pool, [LayerAttention(sizes.num_heads, sizes.num_kv_heads, pool.head_dim, None, None, False)])
    runs: dict[str, Run] = {OURS: lambda: call.run(backend)}
    runs |= {name: run for name in PEERS if (run := prepared(name, call)) is not None}
    outputs = {name: run().clone() for name, run in runs.items()}
    reference = outputs.get(_REFERENCE)
    found = []
    for name, run in runs.items():
        taken = seconds(run, device)
        is_decode = shape.queries == 1
        share = call.kv_bytes / taken / stand.copy_bytes_per_s
        if not is_decode:
            share = call.flops / taken / stand.gemm_flops_per_s
        error = None if reference is None or name == _REFERENCE else difference(outputs[name], reference)
        found.append(Measured(name, str(shape), taken, share, error))
    return found


def difference(out: torch.Tensor, reference: torch.Tensor) -> float:
    """|out - reference| / |reference|."""
    return float((out.double() - reference.double()).norm() / reference.double().norm())
