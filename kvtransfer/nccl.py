"""NCCL between two processes, each with a GPU of its own: payloads pass from memory to memory.

Taken by its C interface, https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html, and not through torch's
ProcessGroupNCCL: the watchdog of that ends the whole process where a peer has died, unless the environment says
otherwise for all groups of the process, those of tensor parallelism too. A pair that fails here is aborted alone.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from baton.errors import UnavailableError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_SIZE = 2
_SENDER = 0
_ID_BYTES = 128
_UINT8 = 1
_SUCCESS, _IN_PROGRESS = 0, 7
_KEY = "nccl"
# Between two looks at what is under way.
_POLL_S = 50e-6


class _UniqueId(ctypes.Structure):
    """ncclUniqueId."""

    _fields_ = (("internal", ctypes.c_char * _ID_BYTES),)


class _Config(ctypes.Structure):
    """The first fields of ncclConfig_t, as they are since version 2.14; newer versions take the rest for unsaid."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    )


_CONFIG_MAGIC, _CONFIG_VERSION = 0xCAFEBEEF, 21400


class _Library:
    """What is used of libnccl, of which torch has loaded its own. Raises OSError where there is none."""

    def __init__(self) -> None:
        library = ctypes.CDLL("libnccl.so.2")
        comm, pointer, size, stream = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        self._describe = library.ncclGetErrorString
        self._describe.restype = ctypes.c_char_p
        self._describe.argtypes = (ctypes.c_int,)
        self.get_unique_id = self._checked(library.ncclGetUniqueId, ctypes.POINTER(_UniqueId))
        self.init_rank = self._checked(
            library.ncclCommInitRankConfig,
            ctypes.POINTER(comm),
            ctypes.c_int,
            _UniqueId,
            ctypes.c_int,
            ctypes.POINTER(_Config),
        )
        self.get_async_error = self._checked(library.ncclCommGetAsyncError, comm, ctypes.POINTER(ctypes.c_int))
        self.send = self._checked(library.ncclSend, pointer, size, ctypes.c_int, ctypes.c_int, comm, stream)
        self.receive = self._checked(library.ncclRecv, pointer, size, ctypes.c_int, ctypes.c_int, comm, stream)
        self.group_start = self._checked(library.ncclGroupStart)
        self.group_end = self._checked(library.ncclGroupEnd)
        self.abort = self._checked(library.ncclCommAbort, comm)

    def raise_for(self, code: int, name: str) -> None:
        if code not in (_SUCCESS, _IN_PROGRESS):
            raise UnavailableError(f"{name}: {self._describe(code).decode()}")

    def _checked(self, function: Callable[..., int], *types: type) -> Callable[..., None]:
        """Raises UnavailableError where the function fails; what it began may be in progress."""
        function.argtypes = types  # type: ignore[attr-defined]
        function.restype = ctypes.c_int  # type: ignore[attr-defined]

        def call(*arguments: object) -> None:
            self.raise_for(function(*arguments), function.__name__)

        return call


@functools.cache
def _library() -> _Library:
    return _Library()


def is_available() -> bool:
    """Whether torch brings NCCL along."""
    try:
        _library()
    except (OSError, AttributeError):
        return False
    return True


class NcclGroup:
    """One of the two ends; blocks until the other has joined. Used by one thread, but for `close`.

    Args:
        store: tells the receiver how to reach the sender.
        rank: 0 for the sender, 1 for the receiver.
        device: this process's GPU, which is not the other's.
        timeout_s: longest wait for the other end, and for one payload.
        size: 1 makes a group with oneself, which tests on one GPU have.

    Raises:
        UnavailableError: the two cannot make a group, or not in time.
    """

    def __init__(self, store: Store, rank: int, device: torch.device, timeout_s: float, *, size: int = _SIZE) -> None:
        self._nccl = _library()
        self._device = device
        self._peer = size - 1 - rank
        self._timeout_s = timeout_s
        self._comm = ctypes.c_void_p()
        unique_id = _UniqueId()
        if rank == _SENDER:
            self._nccl.get_unique_id(ctypes.byref(unique_id))
            store.set(_KEY, bytes(unique_id))  # type: ignore[arg-type]
        else:
            unique_id = _UniqueId.from_buffer_copy(store.get(_KEY))
        # Calls return at once, so that the time of each is limited here.
        config = _Config(ctypes.sizeof(_Config), _CONFIG_MAGIC, _CONFIG_VERSION, 0)
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            try:
                self._nccl.init_rank(ctypes.byref(self._comm), size, unique_id, rank, ctypes.byref(config))
                self._settle(time.monotonic() + timeout_s)
                if size == _SIZE:
                    self._connect(rank)
            except BaseException:
                self.close()
                raise

    def send(self, payload: torch.Tensor) -> None:
        """Begins to send uint8 [n] of the GPU, which must stay as it is until the other end has received it.

        Raises:
            UnavailableError: the other end is gone.
        """
        self._move(self._nccl.send, payload)

    def receive(self, into: torch.Tensor) -> None:
        """Waits for what the other end sends next, uint8 [n] of the GPU.

        Raises:
            UnavailableError: it is gone, or sent nothing in time.
        """
        deadline_s = time.monotonic() + self._timeout_s
        self._move(self._nccl.receive, into)
        arrived = self._stream.record_event()
        while not arrived.query():
            self._settle(deadline_s)
            time.sleep(_POLL_S)
            if time.monotonic() > deadline_s:
                raise UnavailableError(f"a payload did not come within {self._timeout_s:g} s")

    def exchange(self, payload: torch.Tensor, into: torch.Tensor) -> None:
        """Sends and receives in one go, as a group with oneself must."""
        self._nccl.group_start()
        self._nccl.send(payload.data_ptr(), payload.nbytes, _UINT8, self._peer, self._comm, self._stream.cuda_stream)
        self._nccl.receive(into.data_ptr(), into.nbytes, _UINT8, self._peer, self._comm, self._stream.cuda_stream)
        self._nccl.group_end()
        self._settle(time.monotonic() + self._timeout_s)
        self._stream.synchronize()

    def close(self) -> None:
        """Ends what is under way. Idempotent."""
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm.value is not None:
            self._nccl.abort(comm)

    def _connect(self, rank: int) -> None:
        """Passes a byte: NCCL connects the two with the first, for which each waits until the other begins its part.

        Later a payload is sent before the receiver hears of it.
        """
        with torch.cuda.stream(self._stream):
            byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
        if rank == _SENDER:
            self.send(byte)
        else:
            self.receive(byte)

    def _move(self, function: Callable[..., None], memory: torch.Tensor) -> None:
        with torch.cuda.device(self._device):
            function(memory.data_ptr(), memory.nbytes, _UINT8, self._peer, self._comm, self._stream.cuda_stream)
            self._settle(time.monotonic() + self._timeout_s)

    def _settle(self, deadline_s: float) -> None:
        """Waits until the last call has done its part on the host."""
        state = ctypes.c_int(_IN_PROGRESS)
        while True:
            self._nccl.get_async_error(self._comm, ctypes.byref(state))
            self._nccl.raise_for(state.value, "ncclCommGetAsyncError")
            if state.value == _SUCCESS:
                return
            if time.monotonic() > deadline_s:
                raise UnavailableError(f"the other end did not join within {self._timeout_s:g} s")
            time.sleep(_POLL_S)
