"""The inner step of a matrix product, in registers, as LLVM code that numba splices into a kernel."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

# 6 x 16 sums fill 12 of the 16 vector registers of AVX2, 6 of the 32 of AVX-512, and 24 of the 32 of NEON.
TILE_ROWS = 6
TILE_COLUMNS = 16


def _emit_multiply_add(
    typing_context: Any, a: Any, a_row: Any, b: Any, b_column: Any, out: Any, out_row: Any, out_column: Any, depth: Any
) -> Any:
    """out[out_row:+6, out_column:+16] += a[a_row:+6, :depth] @ b[:depth, b_column:+16], all float32 and contiguous.

    The sums stay in registers over the whole depth. Compilers do not find this form in a loop nest, and it runs near
    the speed of a tuned library (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008).
    """
    signature = types.void(a, a_row, b, b_column, out, out_row, out_column, depth)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = ir.VectorType(ir.FloatType(), TILE_COLUMNS)
        undefined = ir.Constant(lanes, ir.Undefined)
        first_lane = ir.Constant(ir.VectorType(ir.IntType(32), TILE_COLUMNS), None)
        index = ir.IntType(64)

        def pointer(position: int, row: Any, column: Any) -> tuple[Any, Any]:
            array = context.make_array(signature.args[position])(context, builder, value=arguments[position])
            width = cgutils.unpack_tuple(builder, array.shape)[1]
            return builder.gep(array.data, [builder.add(builder.mul(row, width), column)]), width

        def as_index(position: int) -> Any:
            return context.cast(builder, arguments[position], signature.args[position], types.int64)

        zero = ir.Constant(index, 0)
        a_start, a_width = pointer(0, as_index(1), zero)
        b_start, b_width = pointer(2, zero, as_index(3))
        out_start, out_width = pointer(4, as_index(5), as_index(6))

        def vector_at(start: Any) -> Any:
            return builder.bitcast(start, lanes.as_pointer())

        rows = [ir.Constant(index, row) for row in range(TILE_ROWS)]
        out_rows = [builder.gep(out_start, [builder.mul(row, out_width)]) for row in rows]
        a_rows = [builder.gep(a_start, [builder.mul(row, a_width)]) for row in rows]
        sums = [cgutils.alloca_once_value(builder, builder.load(vector_at(row), align=4)) for row in out_rows]
        with cgutils.for_range(builder, as_index(7)) as loop:
            right = builder.load(vector_at(builder.gep(b_start, [builder.mul(loop.index, b_width)])), align=4)
            for total, row in zip(sums, a_rows, strict=True):
                element = builder.load(builder.gep(row, [loop.index]))
                seed = builder.insert_element(undefined, element, ir.Constant(ir.IntType(32), 0))
                left = builder.shuffle_vector(seed, undefined, first_lane)
                product = builder.fmul(left, right, flags=["contract"])
                builder.store(builder.fadd(builder.load(total), product, flags=["contract"]), total)
        for total, row in zip(sums, out_rows, strict=True):
            builder.store(builder.load(total), vector_at(row), align=4)
        return context.get_dummy_value()

    return signature, generate


multiply_add = intrinsic(_emit_multiply_add)
