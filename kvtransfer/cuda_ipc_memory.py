"""Memory of a GPU that another process of the host maps.

Torch shares its tensors too, but by a protocol of its own with counters in shared memory, which stay behind when a
process is killed. What is needed is four calls, of which torch shows none:
https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__DEVICE.html (cudaIpcGetMemHandle and its neighbours) and
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEM.html (cuMemGetAddressRange).
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable

import torch

_HANDLE_BYTES = 64
# The allocation's handle, where in the allocation the memory begins, and how much it is.
_EXPORT = struct.Struct(f"<{_HANDLE_BYTES}sQQ")
# The only flag there is, and it must be given.
_LAZY_ENABLE_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    """cudaIpcMemHandle_t."""

    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


class _Runtime:
    """What is used of libcudart, of which torch has loaded its own."""

    def __init__(self) -> None:
        assert torch.version.cuda is not None
        library = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")
        self._describe = library.cudaGetErrorString
        self._describe.restype = ctypes.c_char_p
        self._describe.argtypes = (ctypes.c_int,)
        # Takes the last error back, which would be raised by whichever call looks for it next.
        self._forget = library.cudaGetLastError
        self.get_handle = self._checked(library.cudaIpcGetMemHandle, ctypes.POINTER(_Handle), ctypes.c_void_p)
        self.open_handle = self._checked(
            library.cudaIpcOpenMemHandle, ctypes.POINTER(ctypes.c_void_p), _Handle, ctypes.c_uint
        )
        self.close_handle = self._checked(library.cudaIpcCloseMemHandle, ctypes.c_void_p)

    def _checked(self, function: Callable[..., int], *types: type) -> Callable[..., None]:
        function.argtypes = types  # type: ignore[attr-defined]
        function.restype = ctypes.c_int  # type: ignore[attr-defined]

        def call(*arguments: object) -> None:
            if (code := function(*arguments)) != 0:
                self._forget()
                raise OSError(f"{function.__name__}: {self._describe(code).decode()}")

        return call


@functools.cache
def _runtime() -> _Runtime:
    return _Runtime()


@functools.cache
def _address_range() -> Callable[..., int]:
    """cuMemGetAddressRange of the driver: the allocation that an address lies in."""
    function = ctypes.CDLL("libcuda.so.1").cuMemGetAddressRange_v2
    function.argtypes = (ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_size_t), ctypes.c_uint64)
    function.restype = ctypes.c_int
    typed: Callable[..., int] = function
    return typed


def export_memory(memory: torch.Tensor) -> bytes:
    """A handle of a GPU's contiguous memory, for `IpcMapping` in another process, while the memory lives.

    Raises:
        OSError: it is of a kind that cannot be shared, as torch's expandable segments.
    """
    assert memory.is_contiguous()
    # The driver answers threads that have a context; the runtime gives a thread one with its first call.
    with torch.cuda.device(memory.device):
        torch.cuda.current_stream().query()
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        if code := _address_range()(ctypes.byref(base), ctypes.byref(size), memory.data_ptr()):
            raise OSError(f"cuMemGetAddressRange: error {code}")
        handle = _Handle()
        _runtime().get_handle(ctypes.byref(handle), base.value)
    return _EXPORT.pack(bytes(handle), memory.data_ptr() - base.value, memory.nbytes)


class IpcMapping:
    """What another process has exported, mapped into this one; not by the process that has exported it.

    CUDA counts how often a process maps an allocation, so that several streams from one sender may have it each. The
    memory may lie on another GPU, even on one that this process is not shown, if `device` reaches it.

    Args:
        device: the GPU that is to read it.

    Attributes:
        memory: uint8 [n], which passes for one on `device`.

    Raises:
        OSError: it cannot be mapped.
        ValueError: `handle` is none of `export_memory`.
    """

    def __init__(self, handle: bytes, device: torch.device) -> None:
        if len(handle) != _EXPORT.size:
            raise ValueError(f"a handle of GPU memory has {_EXPORT.size} bytes, not {len(handle)}")
        allocation, offset, num_bytes = _EXPORT.unpack(handle)
        self._device = device
        self._base = ctypes.c_void_p()
        with torch.cuda.device(device):
            _runtime().open_handle(
                ctypes.byref(self._base), _Handle.from_buffer_copy(allocation), _LAZY_ENABLE_PEER_ACCESS
            )
        assert self._base.value is not None
        self.memory = tensor_at(self._base.value + offset, num_bytes, device)

    def close(self) -> None:
        base, self._base = self._base, ctypes.c_void_p()
        if base.value is not None:
            with torch.cuda.device(self._device):
                _runtime().close_handle(base)


def tensor_at(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """A view of memory that somebody else frees: uint8 [num_bytes]."""
    # As torch makes the outputs of CUDA graphs. Public ways ask CUDA whose memory it is, and copy another GPU's.
    storage = torch._C._construct_storage_from_data_pointer(address, device, num_bytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
