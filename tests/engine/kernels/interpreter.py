"""Makes Triton interpret kernels in this process, where there is no GPU to run them on.

Triton decides at the decoration of each function, its own library's included. The variable that tells it to is set for
its import alone, so that processes started later compile as ever.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def interpret() -> None:
    """Have all kernels that are imported from here on interpreted."""
    assert "triton" not in sys.modules, "Triton has been imported before its kernels' tests"
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton
        from triton.runtime import interpreter

        # For this process; setting it sets the variable too.
        triton.knobs.runtime.interpret = True
    finally:
        del os.environ["TRITON_INTERPRET"]
    _mend(interpreter)


def _mend(interpreter) -> None:
    """Have the interpreter compute what GPUs compute.

    It holds bfloat16 as uint16, multiplies these numbers, and truncates to them where GPUs round. And its products are
    those of a BLAS, whose rounding of a row depends on where in the matrix the row is; in float64 no more of that is
    seen.
    """
    builder_class, tl = interpreter.InterpreterBuilder, interpreter.tl
    cast_impl = builder_class.cast_impl

    def as_float64(builder, handle):
        is_bfloat16 = handle.dtype.scalar == tl.bfloat16
        return (cast_impl(builder, handle, tl.float32) if is_bfloat16 else handle).data.astype(np.float64)

    def create_dot(builder, a, b, d, *precision):
        product = as_float64(builder, a) @ as_float64(builder, b)
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    def cast_to_nearest(builder, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast_impl(builder, source, target)
        rounded = torch.from_numpy(np.array(source.data, np.float32)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), target.scalar)

    builder_class.create_dot = create_dot
    builder_class.cast_impl = cast_to_nearest


if DEVICE.type == "cpu":
    interpret()
