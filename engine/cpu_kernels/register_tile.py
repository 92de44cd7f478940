"""The inner step of a matrix product, in registers, as LLVM code that numba splices into a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

# 6 x 16 sums fill 12 of the 16 vector registers of AVX2, 6 of the 32 of AVX-512, and 24 of the 32 of NEON.
TILE_ROWS = 6
TILE_COLUMNS = 16


def _multiply_add(num_rows: int) -> Callable[..., Any]:
    """The step for `num_rows` rows, at most TILE_ROWS.

    out[out_row:+rows, out_column:+16] += a[a_row:+rows, a_column:+depth] @ b[b_row:+depth, b_column:+16], all
    contiguous and float32, but b may be bfloat16 as uint16. The sums stay in registers over the whole depth. Compilers
    do not find this form in a loop nest, and it runs near the speed of a tuned library (Goto and van de Geijn, "Anatomy
    of High-Performance Matrix Multiplication", 2008). A sum is of the same products in the same order however many rows
    there are.
    """

    def emit(
        typing_context: Any,
        a: Any,
        a_row: Any,
        a_column: Any,
        b: Any,
        b_row: Any,
        b_column: Any,
        out: Any,
        out_row: Any,
        out_column: Any,
        depth: Any,
    ) -> Any:
        signature = types.void(a, a_row, a_column, b, b_row, b_column, out, out_row, out_column, depth)
        return signature, generate

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

        a_start, a_width = pointer(0, as_index(1), as_index(2))
        b_start, b_width = pointer(3, as_index(4), as_index(5))
        out_start, out_width = pointer(6, as_index(7), as_index(8))

        def vector_at(start: Any) -> Any:
            return builder.bitcast(start, lanes.as_pointer())

        def right_at(row: Any) -> Any:
            start = builder.gep(b_start, [builder.mul(row, b_width)])
            if signature.args[3].dtype != types.uint16:
                return builder.load(vector_at(start), align=4)
            halves, words = (ir.VectorType(ir.IntType(bits), TILE_COLUMNS) for bits in (16, 32))
            upper = builder.zext(builder.load(builder.bitcast(start, halves.as_pointer()), align=2), words)
            return builder.bitcast(builder.shl(upper, ir.Constant(words, [16] * TILE_COLUMNS)), lanes)

        rows = [ir.Constant(index, row) for row in range(num_rows)]
        out_rows = [builder.gep(out_start, [builder.mul(row, out_width)]) for row in rows]
        a_rows = [builder.gep(a_start, [builder.mul(row, a_width)]) for row in rows]
        sums = [cgutils.alloca_once_value(builder, builder.load(vector_at(row), align=4)) for row in out_rows]
        with cgutils.for_range(builder, as_index(9)) as loop:
            right = right_at(loop.index)
            for total, row in zip(sums, a_rows, strict=True):
                element = builder.load(builder.gep(row, [loop.index]))
                seed = builder.insert_element(undefined, element, ir.Constant(ir.IntType(32), 0))
                left = builder.shuffle_vector(seed, undefined, first_lane)
                product = builder.fmul(left, right, flags=["contract"])
                builder.store(builder.fadd(builder.load(total), product, flags=["contract"]), total)
        for total, row in zip(sums, out_rows, strict=True):
            builder.store(builder.load(total), vector_at(row), align=4)
        return context.get_dummy_value()

    return emit


multiply_add_1, multiply_add_2, multiply_add_3, multiply_add_4, multiply_add_5, multiply_add_6 = (
    intrinsic(_multiply_add(num_rows)) for num_rows in range(1, TILE_ROWS + 1)
)
multiply_add = multiply_add_6
