"""The engine's steps over a large random model.

A decode step reads the weights and the keys and values of its sequences once: it is put beside the time in which a copy
moves so many bytes. A prompt is put beside the rate of a matrix product.
"""

from __future__ import annotations

import dataclasses

import torch

from baton.config import CacheConfig, ModelConfig
from bench.checkpoint import Sizes
from bench.engine import Work
from bench.gpu.stand import Found, Stand
from bench.gpu.timing import mean_seconds
from bench.report import TableText
from engine.batch import build_batch
from engine.engine import Engine, load_engine

DECODE_AIM, PREFILL_AIM = 1.2, 0.6


@dataclasses.dataclass(frozen=True, slots=True)
class Decode:
    """A step of `batch` sequences.

    Attributes:
        ratio: to the time in which a copy moves the bytes of weights and KV.
    """

    batch: int
    context: int
    seconds: float
    weight_bytes: int
    kv_bytes: int
    ratio: float


@dataclasses.dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt in chunks.

    Attributes:
        share: of the rate of a matrix product.
    """

    tokens: int
    chunk: int
    seconds: float
    flops: float
    share: float


def measure(stand: Stand) -> Found:
    scale = stand.scale
    engine = _load(stand)
    work = Work(engine)
    weight_bytes = step_weights(scale.large) * scale.dtype.itemsize
    with torch.inference_mode():
        decodes = [_decode(stand, engine, work, batch, weight_bytes) for batch in scale.batches]
        prefills = [_prefill(stand, engine, work, chunk) for chunk in scale.chunks]
    tables = [
        TableText(
            f"decode steps of {weight_bytes / 1e9:.3g} GB of weights (aim: {DECODE_AIM} x a copy's time for all bytes)",
            ("batch x context", "ms", "KV GB", "x the limit"),
            [
                (f"{d.batch} x {d.context}", f"{d.seconds * 1e3:.2f}", f"{d.kv_bytes / 1e9:.2f}", f"{d.ratio:.2f}")
                for d in decodes
            ],
        ),
        TableText(
            f"prompts (aim: {PREFILL_AIM:.0%} of a product's rate)",
            ("tokens in chunks of", "ms", "TFLOP/s", "of the product's"),
            [
                (
                    f"{p.tokens} / {p.chunk}",
                    f"{p.seconds * 1e3:.1f}",
                    f"{p.flops / p.seconds / 1e12:.3g}",
                    f"{p.share:.0%}",
                )
                for p in prefills
            ],
        ),
    ]
    results = {
        "decodes": [dataclasses.asdict(each) for each in decodes],
        "prefills": [dataclasses.asdict(each) for each in prefills],
    }
    return Found(tables, results)


def step_weights(sizes: Sizes) -> int:
    """Weights that a step of a Llama multiplies with: all but the embedding's, of which it reads a row a token."""
    kv_width = sizes.num_kv_heads * (sizes.hidden_size // sizes.num_heads)
    attention = 2 * sizes.hidden_size * (sizes.hidden_size + kv_width)
    gated = 3 * sizes.hidden_size * sizes.intermediate_size
    return sizes.num_layers * (attention + gated) + sizes.vocab_size * sizes.hidden_size


def prompt_flops(sizes: Sizes, tokens: int) -> float:
    """Of a whole prompt, attention included, and of one row of logits."""
    head = sizes.vocab_size * sizes.hidden_size
    keys = tokens * (tokens + 1) / 2
    attention = 4.0 * sizes.num_layers * sizes.hidden_size * keys
    return 2.0 * (tokens * (step_weights(sizes) - head) + head) + attention


def _load(stand: Stand) -> Engine:
    """An engine whose pool holds the largest of what is measured."""
    scale = stand.scale
    layer_bytes = scale.layer(stand.block_size).block_bytes
    tokens = max(max(scale.batches) * scale.context, scale.prompt_tokens, scale.large.max_model_len)
    num_blocks = -(-tokens // stand.block_size) + 2
    return load_engine(
        ModelConfig.model_validate(
            {"path": str(stand.large_model()), "device": stand.device.type, "dtype": scale.large.dtype}
        ),
        CacheConfig.model_validate(
            {"block_size": stand.block_size, "kv_cache_bytes": num_blocks * layer_bytes * scale.large.num_layers}
        ),
        chunk_tokens=max(scale.chunks),
        decode_sequences=max(scale.batches),
    )


def _decode(stand: Stand, engine: Engine, work: Work, batch: int, weight_bytes: int) -> Decode:
    scale = stand.scale
    step = build_batch(work.decodes(batch, scale.context), engine.layout)
    seconds = mean_seconds(lambda: engine.runner.execute_batch(step), stand.device, scale.rounds)
    kv_bytes = batch * engine.layout.num_blocks(scale.context) * engine.layout.block_bytes
    limit_s = (weight_bytes + kv_bytes) / stand.copy_bytes_per_s
    return Decode(batch, scale.context, seconds, weight_bytes, kv_bytes, seconds / limit_s)


def _prefill(stand: Stand, engine: Engine, work: Work, chunk: int) -> Prefill:
    tokens = stand.scale.prompt_tokens
    steps = [
        build_batch([work.chunk(start, min(chunk, tokens - start))], engine.layout) for start in range(0, tokens, chunk)
    ]

    def run() -> None:
        for step in steps:
            engine.runner.execute_batch(step)

    seconds = mean_seconds(run, stand.device, max(1, stand.scale.rounds // 4))
    flops = prompt_flops(stand.scale.large, tokens)
    return Prefill(tokens, chunk, seconds, flops, flops / seconds / stand.gemm_flops_per_s)
