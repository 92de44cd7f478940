"""Triton's interpreter, which runs kernels in this process where there is no GPU, made to compute what GPUs compute.

Triton decides at the decoration of each function, its own library's included; tests/conftest.py tells it before it is
imported.
"""

from __future__ import annotations

import numpy as np
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _mend(interpreter) -> None:
    """Have the interpreter round as GPUs do.

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
    import triton
    from triton.runtime import interpreter

    assert triton.knobs.runtime.interpret, "Triton was imported before tests/conftest.py"
    _mend(interpreter)
