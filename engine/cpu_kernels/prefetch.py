"""Asking for memory before it is needed.

A block of one head is a few kilobytes somewhere in the pool. The hardware's own prefetcher needs some lines to notice a
stream, and by then half of the block has been waited for: reading blocks in random order took three times as long.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_LINE_BYTES = 64


def _emit_prefetch(typing_context: Any, block: Any) -> Any:
    """Fetch a contiguous array into the caches, without waiting for it."""
    signature = types.void(block)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type = signature.args[0]
        array = context.make_array(array_type)(context, builder, value=arguments[0])
        byte, index, word = ir.IntType(8), ir.IntType(64), ir.IntType(32)
        start = builder.bitcast(array.data, byte.as_pointer())
        count = builder.mul(
            array.nitems, ir.Constant(index, context.get_abi_sizeof(context.get_data_type(array_type.dtype)))
        )
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte.as_pointer()], ir.FunctionType(ir.VoidType(), [byte.as_pointer(), word, word, word])
        )
        read, keep, data = ir.Constant(word, 0), ir.Constant(word, 3), ir.Constant(word, 1)
        with cgutils.for_range_slice(builder, ir.Constant(index, 0), count, ir.Constant(index, _LINE_BYTES), index) as (
            offset,
            _,
        ):
            builder.call(function, [builder.gep(start, [offset]), read, keep, data])
        return context.get_dummy_value()

    return signature, generate


prefetch = intrinsic(_emit_prefetch)
