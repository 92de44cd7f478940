"""Every kernel, as the engine launches it, for each target, dtype and head size."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import get_args

import torch
from triton.backends.compiler import GPUTarget

from engine.kernels.attention import Batch, attend
from engine.kernels.gate import Activation, apply_gate
from engine.kernels.gpu import Gpu
from engine.kernels.matmul import matmul
from engine.kernels.norm import rms_norm
from engine.kernels.pages import copy_pages, write
from engine.kernels.rotary import rotate_and_write
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
_POOL, _BUFFER = (meta(num_pages, 2, 8, 16, 128, dtype=torch.bfloat16) for num_pages in (9, 4))


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
        yield Variant(f"rms_norm {name} 8192", functools.partial(_rms_norm, dtype, 8192, True))
        yield Variant(f"rms_norm {name} 4096 alone", functools.partial(_rms_norm, dtype, 4096, False))
        yield Variant(f"matmul {name}", functools.partial(_matmul, dtype, False))
        yield Variant(f"matmul {name} add", functools.partial(_matmul, dtype, True))
        yield Variant(f"rotate {name} 128", functools.partial(_rotate, dtype, 128, False))
        yield Variant(f"rotate {name} 128 norms", functools.partial(_rotate, dtype, 128, True))
        for activation in get_args(Activation):
            yield Variant(f"gate {activation} {name}", functools.partial(_gate, dtype, activation))
    yield Variant("gather", lambda _: copy_pages(_POOL, longs(4), _BUFFER, None))
    yield Variant("scatter", lambda _: copy_pages(_BUFFER, None, _POOL, longs(4)))
    yield Variant("copy heads", lambda _: copy_pages(_POOL[:, :, 2:4], longs(4), _POOL[:, :, 4:6], longs(4)))
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


def _rms_norm(dtype: torch.dtype, columns: int, adds: bool, _: Gpu) -> None:
    rows = meta(64, columns, dtype=dtype)
    rms_norm(rows, meta(columns, dtype=dtype), epsilon=1e-5, residual=rows if adds else None)


def _matmul(dtype: torch.dtype, adds: bool, gpu: Gpu) -> None:
    """An attention's output onto the residual stream; the fused projection, with a bias."""
    columns = 4096 if adds else 6144
    matmul(
        meta(64, 4096, dtype=dtype),
        meta(columns, 4096, dtype=dtype),
        None if adds else meta(columns, dtype=dtype),
        residual=meta(64, columns, dtype=dtype) if adds else None,
        gpu=gpu,
    )


def _rotate(dtype: torch.dtype, head_dim: int, normed: bool, _: Gpu) -> None:
    angles, norm = meta(64, head_dim, dtype=dtype), meta(head_dim, dtype=dtype) if normed else None
    pages = meta(100, 2, 8, 16, head_dim, dtype=dtype)
    qkv = meta(64, 48 * head_dim, dtype=dtype)
    rotate_and_write(qkv, angles, angles, pages, longs(64), query_norm=norm, key_norm=norm, epsilon=1e-6)


def _gate(dtype: torch.dtype, activation: Activation, _: Gpu) -> None:
    gate, up = meta(64, 2 * 14336, dtype=dtype).chunk(2, dim=1)
    apply_gate(gate, up, activation)


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
