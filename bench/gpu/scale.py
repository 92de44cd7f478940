"""What is measured, and how much of it: as a GPU takes it, or so little that a CPU shows that all of it runs."""

from __future__ import annotations

import dataclasses

import torch

from bench.checkpoint import Sizes
from bench.gpu import shapes
from bench.interference import Mix
from bench.kernels import Shape
from bench.load.load import Load
from bench.load.workloads import Lengths
from engine.kv.layout import KVLayout


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """
    Attributes:
        large: the model of attention, steps and transfers; it is made on the device.
        calls: of attention alone.
        batches, context: sequences of the decode steps, and tokens that each of them sees.
        prompt_tokens: of the prompt that is computed in chunks of each of the sizes `chunks`, and transferred.
        rounds: of a step or a transfer.
        small: the model that is served.
        load: the closed loop of requests; peers get the same ones.
        num_generated: of these, how many `generate` answers, which takes one after another.
        mix: streams and the long prompts beside them.
        kv_cache_bytes: of each worker that serves.
        batch_limits: what `transformers`' continuous batching is told; nothing lets it choose by itself.
    """

    large: Sizes
    calls: tuple[Shape, ...]
    batches: tuple[int, ...]
    context: int
    prompt_tokens: int
    chunks: tuple[int, ...]
    rounds: int
    small: Sizes
    load: Load
    num_generated: int
    mix: Mix
    kv_cache_bytes: int
    batch_limits: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.large.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def layer(self, block_size: int) -> KVLayout:
        """One layer's pool of the large model."""
        head_dim = self.large.hidden_size // self.large.num_heads
        return shapes.layout(block_size, head_dim, self.dtype, self.large.num_kv_heads)


def _closed_loop(num_requests: int, concurrency: int, num_input: int, num_output: int, vocab_size: int) -> Load:
    return Load(
        num_requests=num_requests,
        concurrency=concurrency,
        input_tokens=Lengths(num_input, num_input),
        output_tokens=Lengths(num_output, num_output),
        num_warm_up=concurrency,
        vocab_size=vocab_size,
        seed=1,
    )


_LLAMA_3_8B = Sizes(
    hidden_size=4096,
    num_layers=32,
    num_heads=shapes.NUM_HEADS,
    num_kv_heads=shapes.NUM_KV_HEADS,
    intermediate_size=14336,
    vocab_size=128256,
    max_model_len=16384,
)
_ONE_BILLION = Sizes(
    hidden_size=2048,
    num_layers=16,
    num_heads=16,
    num_kv_heads=8,
    intermediate_size=8192,
    vocab_size=32768,
    max_model_len=16384,
)
_TOY = Sizes(
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=64,
    vocab_size=1024,
    max_model_len=512,
    dtype="float32",
)

FULL = Scale(
    large=_LLAMA_3_8B,
    calls=(*shapes.DECODES, *shapes.PREFILLS),
    batches=(1, 32, 128),
    context=2048,
    prompt_tokens=8192,
    chunks=(2048, 8192),
    rounds=20,
    small=_ONE_BILLION,
    load=_closed_loop(512, 256, 256, 256, _ONE_BILLION.vocab_size),
    num_generated=4,
    mix=Mix(
        num_streams=32,
        stream_input_tokens=256,
        stream_output_tokens=1024,
        num_long=8,
        long_input_tokens=8192,
        interval_s=0.5,
        alone_s=5.0,
        vocab_size=_ONE_BILLION.vocab_size,
    ),
    kv_cache_bytes=24 << 30,
)
TINY = Scale(
    large=_TOY,
    calls=(Shape(2, 1, 40), Shape(1, 24, 24)),
    batches=(1, 3),
    context=40,
    prompt_tokens=48,
    chunks=(32, 48),
    rounds=1,
    small=_TOY,
    load=_closed_loop(4, 2, 24, 4, _TOY.vocab_size),
    num_generated=1,
    mix=Mix(
        num_streams=2,
        stream_input_tokens=8,
        stream_output_tokens=100,
        num_long=1,
        long_input_tokens=100,
        long_output_tokens=2,
        alone_s=0.5,
        vocab_size=_TOY.vocab_size,
    ),
    kv_cache_bytes=8 << 20,
    batch_limits={"num_blocks": 8, "max_batch_tokens": 128},
)
