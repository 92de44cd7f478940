"""Lends an idle worker's cores to its neighbours: how many threads the engine of this process computes with, now.

Prefill and decode workers of one host have cores of their own, so that a prompt never takes those of a stream. But what
is idle may be used: all workers of a host and user keep a flag each on a board in shared memory, and while every other
flag is down a worker computes on all cores. It looks at the board before each layer, so it is back on its own cores
within a layer of a neighbour's start.

A flag is up while its worker has work, not just while it computes. A worker that is killed leaves its flag up, but not
the lock on its place of the board, which goes with the process: whoever minds the flag tests the lock and takes it
down.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import pathlib
import struct
import time

import torch

logger = logging.getLogger(__name__)

_FOLDER = pathlib.Path("/dev/shm")
_NUM_PLACES = 256
# Of the board's bytes only locks matter: of the places, and of this one by whoever enters or leaves the board.
_GATE = _NUM_PLACES * 8
# How long a flag that keeps a worker from its neighbours' cores is believed without testing its lock.
_TRUST_S = 0.5


class CoreBoard:
    """This process's place on the board, and sight of all others. Used by one thread."""

    def __init__(self, path: pathlib.Path | None = None) -> None:
        """Take a place on the board at `path`, by default that of this user on this host.

        Raises:
            OSError: there is no shared memory to be had, or no place left.
        """
        self._path = path or _FOLDER / f"baton-cores-{os.geteuid()}"
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                if self._enter():
                    return
            except BaseException:
                os.close(self._file)
                raise
            os.close(self._file)

    def _enter(self) -> bool:
        """Take a place; False where the board was taken away in between."""
        _lock(self._file, _GATE, wait=True)
        if not _is_at(self._file, self._path):
            return False
        os.ftruncate(self._file, _GATE)
        free = (place for place in range(_NUM_PLACES) if _lock(self._file, place * 8))
        if (place := next(free, None)) is None:
            raise OSError(errno.ENOSPC, f"all {_NUM_PLACES} places are taken", str(self._path))
        self._place = place
        self._memory = mmap.mmap(self._file, _GATE)
        self._flags = memoryview(self._memory).cast("Q")
        self._flags[place] = 0
        _unlock(self._file, _GATE)
        self._tested_s = 0.0
        return True

    def raise_flag(self) -> None:
        self._flags[self._place] = 1

    def lower_flag(self) -> None:
        self._flags[self._place] = 0

    def others_idle(self) -> bool:
        """Whether no other worker has its flag up."""
        # One pass over two kilobytes, in C.
        num_up = bytes(self._memory).count(1)
        if num_up == self._flags[self._place]:
            return True
        now_s = time.monotonic()
        if now_s - self._tested_s >= _TRUST_S:
            self._tested_s = now_s
            self._take_down_flags_of_the_dead()
        return False

    def _take_down_flags_of_the_dead(self) -> None:
        for place, flag in enumerate(self._flags):
            if flag and place != self._place and _lock(self._file, place * 8):
                self._flags[place] = 0
                _unlock(self._file, place * 8)

    def close(self) -> None:
        """Give the place up; the last one to leave takes the board away."""
        self.lower_flag()
        self._flags.release()
        self._memory.close()
        _lock(self._file, _GATE, wait=True)
        _unlock(self._file, self._place * 8)
        others = any(not _lock(self._file, place * 8) for place in range(_NUM_PLACES))
        if not others and _is_at(self._file, self._path):
            self._path.unlink()
        os.close(self._file)


class Cores:
    """Sets torch's threads to the worker's own, or to the host's while its neighbours are idle. Numba's follow torch's.

    Used by the engine's thread: threads are a setting of the thread that computes.
    """

    def __init__(self, num_threads: int, max_threads: int) -> None:
        """
        Args:
            num_threads: the worker's own; 0 for as many as torch uses.
            max_threads: while all other workers of the host are idle; as many as its own borrows nothing, but lets the
                others know when it computes, which fewer does not.
        """
        self._own = num_threads or torch.get_num_threads()
        self._most = max(max_threads, self._own)
        self._now = 0
        self._board: CoreBoard | None = None
        if max_threads >= self._own:
            try:
                self._board = CoreBoard()
            except OSError as error:
                logger.warning("idle neighbours' cores are not used: %s", error)

    def take(self) -> None:
        """There is work, and the next layer of it is about to be computed."""
        wanted = self._own
        if self._board is not None:
            self._board.raise_flag()
            if self._most > self._own and self._board.others_idle():
                wanted = self._most
        if wanted != self._now:
            torch.set_num_threads(wanted)
            self._now = wanted

    def rest(self) -> None:
        """There is nothing to compute until more is asked for."""
        if self._board is not None:
            self._board.lower_flag()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None


def _lock(file: int, start: int, *, wait: bool = False) -> bool:
    """Lock a byte for this opening of the file, as a process's end undoes; False if another holds it."""
    command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
    try:
        fcntl.fcntl(file, command, _flock(fcntl.F_WRLCK, start))
    except BlockingIOError:
        return False
    return True


def _unlock(file: int, start: int) -> None:
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, start))


def _flock(kind: int, start: int) -> bytes:
    """A `struct flock` of one byte."""
    return struct.pack("hhqqi0q", kind, os.SEEK_SET, start, 1, 0)


def _is_at(file: int, path: pathlib.Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), os.stat(path))
    return False
