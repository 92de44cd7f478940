"""KV of a long prompt of the large model, between the pools of two processes on one device: how fast it is alone, and
what it adds to the prefill whose layers it follows."""

from __future__ import annotations

import dataclasses

from bench import transfer
from bench.gpu.stand import Found, Stand
from bench.transfer_overlap import Overlap, measure_overlap
from bench.transfer_pair import Transport
from engine.kv.layout import KVGroup

RATE_AIM_BYTES_PER_S = 1e12
ADDED_AIM = 0.02
_TRANSPORTS: dict[str, tuple[Transport, ...]] = {"cuda": ("cuda_ipc", "shm"), "cpu": ("shm",)}


def measure(stand: Stand) -> Found:
    scale, device = stand.scale, stand.device
    transports = _TRANSPORTS[device.type]
    layout = dataclasses.replace(scale.layer(stand.block_size), groups=(KVGroup(tuple(range(scale.large.num_layers))),))
    num_blocks = layout.num_blocks(scale.prompt_tokens)
    measured = {name: transfer.measure(name, layout, num_blocks, scale.rounds, device) for name in transports}
    prompts = {name: prompt for name, (prompt, _) in measured.items()}
    blocks = {name: block for name, (_, block) in measured.items()}
    overlaps: dict[Transport, Overlap] = {
        transports[0]: measure_overlap(
            transports[0],
            scale.prompt_tokens,
            max(1, scale.rounds // 4),
            stand.large_model(),
            layout,
            chunk_tokens=min(scale.chunks),
            device=device,
        )
    }
    tables = [
        transfer.transfer_table(prompts, blocks, stand.copy_bytes_per_s / 2),
        transfer.overlap_table(overlaps, scale.prompt_tokens),
    ]
    results = {
        "prompt": {name: dataclasses.asdict(result) for name, result in prompts.items()},
        "block": {name: dataclasses.asdict(result) for name, result in blocks.items()},
        "overlap": {name: dataclasses.asdict(result) for name, result in overlaps.items()},
    }
    return Found(tables, results)
