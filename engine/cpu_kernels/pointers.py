"""Calls of a kernel through its address: numba compiles what is called by name once more into each caller."""

from __future__ import annotations

from typing import Any

import numba
from numba.core import cgutils, types
from numba.extending import intrinsic


def address_of(kernel: Any, *arguments: Any) -> int:
    """The address of a kernel that returns nothing, compiled for the types of these arguments; it stays valid."""
    signature = tuple(numba.typeof(argument) for argument in arguments)
    kernel.compile(signature)
    compiled = kernel.overloads[signature]
    address: int = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    return address


def _emit_call(typing_context: Any, address: Any, arguments: Any) -> Any:
    """Calls the kernel at `address` with the values of a tuple, whose types must be those that it was compiled for."""
    signature = types.none(types.intp, arguments)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        argument_types = signature.args[1].types
        convention = context.call_conv
        function_type = convention.get_function_type(types.none, argument_types)
        function = builder.inttoptr(values[0], function_type.as_pointer())
        unpacked = cgutils.unpack_tuple(builder, values[1], len(argument_types))
        status, _ = convention.call_function(builder, function, types.none, argument_types, unpacked)
        with cgutils.if_unlikely(builder, status.is_error):
            convention.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return signature, generate


call = intrinsic(_emit_call)
