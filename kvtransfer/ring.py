"""A ring of payloads that two processes of one host share: the sender's file, which the receiver maps too.

The file's name lives only until the receiver has answered the hello; from then on the two mappings keep the memory, so
nothing is left behind however a process dies. For a sender that is killed in between, the name carries its pid, and
whoever makes or offers a ring next sweeps it away.
"""

from __future__ import annotations

import collections
import contextlib
import mmap
import os
import pathlib
import re
import secrets

import numpy as np

from baton.errors import TransferError
from kvtransfer.pages import Bytes

SHM_DIR = pathlib.Path("/dev/shm")
_NAME = re.compile(r"baton-kv-(\d+)-[0-9a-f]{16}")
_BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")
_NETWORK = pathlib.Path("/proc/self/ns/net")


class RingSpace:
    """Which bytes of a ring are taken: allocated at the head, freed at the tail, each piece in one run."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._head = 0
        self._tail = 0
        # Head after each piece that is still taken.
        self._ends: collections.deque[int] = collections.deque()

    @property
    def num_pieces(self) -> int:
        """Pieces that are taken."""
        return len(self._ends)

    def has_room(self, num_bytes: int) -> bool:
        return self._start(num_bytes) + num_bytes - self._tail <= self.capacity_bytes

    def allocate(self, num_bytes: int) -> int:
        """Takes a piece and returns its offset; only when there is room."""
        assert self.has_room(num_bytes), "the ring is full"
        start = self._start(num_bytes)
        self._head = start + num_bytes
        self._ends.append(self._head)
        return start % self.capacity_bytes

    def free(self) -> None:
        """Gives the oldest piece back."""
        self._tail = self._ends.popleft()
        if not self._ends:
            # Beginning anew keeps the pieces of a quiet link in the same, cached, memory.
            self._head = self._tail = 0

    def _start(self, num_bytes: int) -> int:
        left = self.capacity_bytes - self._head % self.capacity_bytes
        return self._head if num_bytes <= left else self._head + left


class Ring:
    """A mapping of the shared memory; it ends with the last reference, since none may be closed under a view."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        # Mapped now, page by page, and not while the first payloads are copied.
        mapping = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._bytes: Bytes = np.frombuffer(mapping, dtype=np.uint8)

    def view(self, offset: int, num_bytes: int) -> Bytes:
        """uint8 [num_bytes]; raises TransferError beyond the ring's end."""
        if offset + num_bytes > len(self._bytes):
            raise TransferError(f"{num_bytes} bytes at {offset} lie beyond the ring's {len(self._bytes)}")
        return self._bytes[offset : offset + num_bytes]


def create_ring(num_bytes: int) -> tuple[str, Ring]:
    """Makes a ring and its name; raises OSError where there is no room for it."""
    name = f"baton-kv-{os.getpid()}-{secrets.token_hex(8)}"
    descriptor = os.open(SHM_DIR / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        # Unlike ftruncate this takes the memory now: a full /dev/shm is an error here and not a SIGBUS later.
        os.posix_fallocate(descriptor, 0, num_bytes)
        return name, Ring(descriptor, num_bytes)
    except BaseException:
        unlink_ring(name)
        raise
    finally:
        os.close(descriptor)


def open_ring(name: str, num_bytes: int) -> Ring:
    """Maps a sender's ring; raises OSError or ValueError where that is not possible or `name` is not a ring's."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is not the name of a ring")
    descriptor = os.open(SHM_DIR / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size < num_bytes:
            raise ValueError(f"ring {name} is smaller than {num_bytes} bytes")
        return Ring(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def unlink_ring(name: str) -> None:
    """Takes the name away, if it is still there; mappings stay."""
    with contextlib.suppress(FileNotFoundError):
        (SHM_DIR / name).unlink()


def sweep_rings() -> None:
    """Unlinks rings whose makers died before they could."""
    if not SHM_DIR.is_dir():
        return
    for path in SHM_DIR.glob("baton-kv-*"):
        match = _NAME.fullmatch(path.name)
        if match is not None and not _is_alive(int(match[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def shm_domain() -> str:
    """Equal in processes that see each other's shared memory and sockets, and may open them; empty without any."""
    try:
        boot_id = _BOOT_ID.read_text().strip()
        return f"shm:{boot_id}:{os.stat(SHM_DIR).st_dev}:{os.stat(_NETWORK).st_ino}:{os.geteuid()}"
    except OSError:
        return ""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
