"""Work that threads take in shares from a common counter, so that one that loses its core holds no other up."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic


def _emit_next_share(typing_context: Any, counters: Any, index: Any) -> Any:
    """counters[index]++, of an int64 array, in one indivisible step; returns what it was."""
    signature = types.int64(counters, index)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, value=arguments[0])
        position = context.cast(builder, arguments[1], signature.args[1], types.int64)
        word = ir.IntType(64)
        return builder.atomic_rmw("add", builder.gep(array.data, [position]), ir.Constant(word, 1), "monotonic")

    return signature, generate


next_share = intrinsic(_emit_next_share)
