"""Copies pages and takes their checksum in the same pass, in LLVM code that numba splices into a kernel.

Memory is what bounds a copy, so a checksum of its own pass would cost as much again. Each word is loaded once (the
loads are volatile) and both hashed and stored: the checksum is of the very bytes that were written, whatever somebody
else does to the source meanwhile. It is XXH3 (64 bits, no seed) of the pages joined, for lengths that are whole blocks
of XXH3: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from engine.cpu_kernels.compiling import exact_kernel

# A block is 16 stripes of 64 bytes, after which the accumulators are scrambled.
BLOCK_BYTES = 1024
# Alignment that a target needs to be written past the caches.
LINE_BYTES = 64
_STRIPES = BLOCK_BYTES // LINE_BYTES
# The hardware's prefetcher stops at each small page and takes some lines to notice a stream.
_AHEAD_BYTES = 4096

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_SCRAMBLE_AT, _LAST_STRIPE_AT, _MERGE_AT = 128, 121, 11
_PRIME32_1, _PRIME32_2, _PRIME32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_PRIME64_1, _PRIME64_2, _PRIME64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_PRIME64_4, _PRIME64_5, _PRIME_MX1 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5, 0x165667919E3779F9

_BYTE, _INT32, _INT64, _INT128 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.IntType(128)
_LANES = ir.VectorType(_INT64, 8)


def _secret(start: int, num_words: int = 8) -> npt.NDArray[np.uint64]:
    return np.frombuffer(_SECRET, dtype="<u8", count=num_words, offset=start).astype(np.uint64)


_MERGE_SECRET = _secret(_MERGE_AT)
_INITIAL = np.array(
    [_PRIME32_3, _PRIME64_1, _PRIME64_2, _PRIME64_3, _PRIME64_4, _PRIME32_2, _PRIME64_5, _PRIME32_1], dtype=np.uint64
)
_LENGTH_FACTOR, _AVALANCHE_FACTOR = np.uint64(_PRIME64_1), np.uint64(_PRIME_MX1)
_SHIFT_FIRST, _SHIFT_LAST = np.uint64(37), np.uint64(32)


def _lanes(values: npt.NDArray[np.uint64] | int) -> Any:
    """A vector constant: these words, or eight times the same."""
    return ir.Constant(_LANES, [ir.Constant(_INT64, int(value)) for value in np.broadcast_to(values, 8)])


def _emitter(*, past_caches: bool) -> Callable[..., Any]:
    def emit(typing_context: Any, source: Any, target: Any, sums: Any, is_last: Any) -> Any:
        """Copy a block of `BLOCK_BYTES` between two addresses and add it to the accumulators, uint64 [8]."""
        signature = types.void(source, target, sums, is_last)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            prefetch = builder.module.declare_intrinsic(
                "llvm.prefetch",
                [_BYTE.as_pointer()],
                ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT32, _INT32, _INT32]),
            )
            hint = builder.module.add_metadata([ir.Constant(_INT32, 1)])
            swap_neighbours = ir.Constant(ir.VectorType(_INT32, 8), [1, 0, 3, 2, 5, 4, 7, 6])

            def at(position: int, offset: int, kind: Any) -> Any:
                address = builder.add(arguments[position], ir.Constant(_INT64, offset))
                return builder.inttoptr(address, kind.as_pointer())

            def accumulate(total: Any, stripe: int, secret: Any) -> Any:
                offset = stripe * LINE_BYTES
                read, keep, data = ir.Constant(_INT32, 0), ir.Constant(_INT32, 3), ir.Constant(_INT32, 1)
                builder.call(prefetch, [at(0, offset + _AHEAD_BYTES, _BYTE), read, keep, data])
                words = builder.load(at(0, offset, _LANES), align=1)
                words.volatile = True
                store = builder.store(words, at(1, offset, _LANES), align=LINE_BYTES if past_caches else 1)
                if past_caches:
                    store.set_metadata("nontemporal", hint)
                keyed = builder.xor(words, secret)
                product = builder.mul(builder.and_(keyed, _lanes(0xFFFFFFFF)), builder.lshr(keyed, _lanes(32)))
                swapped = builder.shuffle_vector(words, ir.Constant(_LANES, ir.Undefined), swap_neighbours)
                return builder.add(builder.add(total, swapped), product)

            array = context.make_array(signature.args[2])(context, builder, value=arguments[2])
            totals = builder.bitcast(array.data, _LANES.as_pointer())
            total = builder.load(totals, align=8)
            for stripe in range(_STRIPES - 1):
                total = accumulate(total, stripe, _lanes(_secret(8 * stripe)))
            # The very last stripe has a secret of its own and no scrambling after it.
            last_secret = builder.select(
                arguments[3], _lanes(_secret(_LAST_STRIPE_AT)), _lanes(_secret(8 * (_STRIPES - 1)))
            )
            total = accumulate(total, _STRIPES - 1, last_secret)
            mixed = builder.xor(builder.xor(total, builder.lshr(total, _lanes(47))), _lanes(_secret(_SCRAMBLE_AT)))
            scrambled = builder.mul(mixed, _lanes(_PRIME32_1))
            builder.store(builder.select(arguments[3], total, scrambled), totals, align=8)
            return context.get_dummy_value()

        return signature, generate

    return emit


def _emit_fold(typing_context: Any, a: Any, b: Any) -> Any:
    """The halves of the 128 bits of a * b, xored; all uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = (builder.zext(argument, _INT128) for argument in arguments)
        product = builder.mul(a, b)
        high = builder.lshr(product, ir.Constant(_INT128, 64))
        return builder.xor(builder.trunc(product, _INT64), builder.trunc(high, _INT64))

    return types.uint64(types.uint64, types.uint64), generate


def _emit_fence(typing_context: Any) -> Any:
    """What was written past the caches is seen before what is written next."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


_copy_block = intrinsic(_emitter(past_caches=False))
_copy_block_past_caches = intrinsic(_emitter(past_caches=True))
_fold = intrinsic(_emit_fold)
_fence = intrinsic(_emit_fence)


@exact_kernel
def checked_copy(
    pool: npt.NDArray[np.uint8],
    block_ids: npt.NDArray[np.int64],
    page_bytes: int,
    run_starts: npt.NDArray[np.int64],
    run_bytes: int,
    payload: npt.NDArray[np.uint8],
    into_pool: bool,
    past_caches: bool,
) -> Any:
    """Copies runs of pages between a pool and a payload, where they lie behind each other in the order of `block_ids`.

    Args:
        pool: uint8 [num_blocks * page_bytes].
        block_ids: int64 [num_pages].
        page_bytes: bytes from one page of the pool to the next.
        run_starts: int64 [num_runs], offsets in each page at which a run begins; a whole page is one run from 0.
        run_bytes: length of every run, a multiple of `BLOCK_BYTES`.
        payload: uint8 [num_pages * num_runs * run_bytes]; neither it nor a block id or run is checked.
        into_pool: from the payload into the pool, or the other way.
        past_caches: write to memory at once, for a target that is not read soon. All its runs begin at multiples of
            `LINE_BYTES` then.

    Returns:
        The XXH3 of the payload, uint64.
    """
    sums = _INITIAL.copy()
    num_runs = len(run_starts)
    num_left = len(block_ids) * num_runs
    payload_bytes = num_left * run_bytes
    place = np.int64(payload.ctypes.data)
    for index in range(len(block_ids)):
        page = np.int64(pool.ctypes.data) + block_ids[index] * page_bytes
        for run in range(num_runs):
            start = page + run_starts[run]
            source, target = (place, start) if into_pool else (start, place)
            num_left -= 1
            for offset in range(0, run_bytes, BLOCK_BYTES):
                is_last = num_left == 0 and offset + BLOCK_BYTES == run_bytes
                if past_caches:
                    _copy_block_past_caches(source + offset, target + offset, sums, is_last)
                else:
                    _copy_block(source + offset, target + offset, sums, is_last)
            place += run_bytes
    if past_caches:
        _fence()
    result = np.uint64(payload_bytes) * _LENGTH_FACTOR
    for lane in range(0, 8, 2):
        result += _fold(sums[lane] ^ _MERGE_SECRET[lane], sums[lane + 1] ^ _MERGE_SECRET[lane + 1])
    result = (result ^ (result >> _SHIFT_FIRST)) * _AVALANCHE_FACTOR
    return result ^ (result >> _SHIFT_LAST)
