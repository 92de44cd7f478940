"""Every kernel, as the engine launches it, for each target, dtype and head size."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from triton.backends.compiler import GPUTarget

from engine.kernels.attention import Batch, attend
from engine.kernels.gate import silu_multiply
from engine.kernels.gpu import Gpu
from engine.kernels.norm import rms_norm
from engine.kernels.pages import gather_blocks, scatter_blocks, write
from engine.kernels.rotary import rotate
from engine.kernels.sampling import choose

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HEAD_DIMS = (64, 80, 96, 128, 256)

meta = functools.partial(torch.empty, device="meta")
integers = functools.partial(meta, dtype=torch.int32)
longs = functools.partial(meta, dtype=torch.int64)


@dataclasses.dataclass(frozen=True)
class Variant:
    """What `launch` launches for a GPU; tensors are on torch's meta device."""

    name: str
    launch: Callable[[Gpu], object]


def variants() -> Iterator[Variant]:
    """All of them, for each of `TARGETS`."""
    yield from _attention()
    for name, dtype in DTYPES.items():
        yield Variant(f"write {name} 128", functools.partial(_write, dtype, 128))
        yield Variant(f"rms_norm {name} 8192", functools.partial(_rms_norm, dtype, 8192))
        yield Variant(f"rotate {name} 128", functools.partial(_rotate, dtype, 128))
        yield Variant(f"silu_multiply {name}", functools.partial(_silu_multiply, dtype))
    yield Variant("gather", lambda _: gather_blocks(meta(2, 9, 2, 8, 16, 128), integers(4), meta(4, 2, 2, 8, 16, 128)))
    yield Variant(
        "scatter", lambda _: scatter_blocks(meta(4, 2, 2, 8, 16, 128), integers(4), meta(2, 9, 2, 8, 16, 128))
    )
    yield Variant("choose", _choose)


def _attention() -> Iterator[Variant]:
    """Decodes over a split context and chunks; tiles of several blocks, and tiles that lie inside one."""
    for (name, dtype), head_dim, queries in itertools.product(DTYPES.items(), HEAD_DIMS, (1, 512)):
        for block_size in (16, 64) if dtype == torch.bfloat16 else (16,):
            yield _attention_variant(name, head_dim, queries, block_size)
    for queries in (1, 512):
        yield _attention_variant("bfloat16", 128, queries, 16, "window", window=1024)
        yield _attention_variant("bfloat16", 256, queries, 16, "window softcap", window=4096, softcap=50.0)
        yield _attention_variant("bfloat16", 64, queries, 16, "window sinks", window=128, sinks=True)


def _attention_variant(
    dtype: str,
    head_dim: int,
    queries: int,
    block_size: int,
    features: str = "",
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
) -> Variant:
    kind = "decode" if queries == 1 else "chunk"

    def launch(gpu: Gpu) -> None:
        attend(
            meta(4 * queries, 32, head_dim, dtype=DTYPES[dtype]),
            meta(100, 2, 8, block_size, head_dim, dtype=DTYPES[dtype]),
            Batch(integers(4, 512), integers(5), integers(4), queries, 8192),
            scale=head_dim**-0.5,
            window=window,
            softcap=softcap,
            sinks=meta(32, dtype=DTYPES[dtype]) if sinks else None,
            gpu=gpu,
        )

    return Variant(f"attention {kind} {dtype} {head_dim} block {block_size} {features}".rstrip(), launch)


def _write(dtype: torch.dtype, head_dim: int, _: Gpu) -> None:
    tokens = meta(64, 8, head_dim, dtype=dtype)
    write(tokens, tokens, meta(100, 2, 8, 16, head_dim, dtype=dtype), longs(64))


def _rms_norm(dtype: torch.dtype, columns: int, _: Gpu) -> None:
    rows = meta(64, columns, dtype=dtype)
    rms_norm(rows, meta(columns, dtype=dtype), epsilon=1e-5, residual=rows)


def _rotate(dtype: torch.dtype, head_dim: int, _: Gpu) -> None:
    angles = meta(64, head_dim, dtype=dtype)
    rotate(meta(64, 32, head_dim, dtype=dtype), meta(64, 8, head_dim, dtype=dtype), angles, angles)


def _silu_multiply(dtype: torch.dtype, _: Gpu) -> None:
    silu_multiply(*meta(64, 2 * 14336, dtype=dtype).chunk(2, dim=1))


def _choose(_: Gpu) -> None:
    choose(
        meta(64, 128256),
        temperature=meta(64),
        top_k=integers(64),
        top_p=meta(64, dtype=torch.float64),
        min_p=meta(64),
        seeds=longs(64),
        streams=longs(64),
        positions=longs(64),
    )
