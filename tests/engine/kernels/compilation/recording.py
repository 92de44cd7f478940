"""Records what functions would launch: kernel, types and constants, as Triton itself would compile them on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


@dataclasses.dataclass(frozen=True)
class Launch:
    """The arguments of `triton.compiler.ASTSource`, and the options of `triton.compile`."""

    kernel: JITFunction
    signature: Mapping[str, str]
    constants: Mapping[Any, Any]
    attributes: Mapping[Any, Any]
    options: Mapping[str, Any]


@contextlib.contextmanager
def recorded_launches(target: GPUTarget) -> Iterator[list[Launch]]:
    """Kernels launched meanwhile are listed instead; their tensors need no memory."""
    launches: list[Launch] = []
    backend = make_backend(target)

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*arguments, debug=False, **keywords)
        packed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
        launches.append(Launch(kernel, signature, constants, attributes, packed.__dict__))

    with mock.patch.object(JITFunction, "run", record):
        yield launches
