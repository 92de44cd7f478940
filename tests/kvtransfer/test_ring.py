from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import TransferError
from kvtransfer.ring import SHM_DIR, RingSpace, create_ring, open_ring, sweep_rings, unlink_ring


@given(st.integers(8, 40), st.lists(st.integers(0, 12), max_size=60))
def test_pieces_lie_in_the_ring_and_never_overlap(capacity: int, steps: list[int]) -> None:
    """A step of 0 frees the oldest piece, another takes one of that many bytes if there is room."""
    space = RingSpace(capacity)
    taken: list[tuple[int, int]] = []
    for num_bytes in steps:
        if num_bytes == 0:
            if taken:
                space.free()
                taken.pop(0)
        elif num_bytes <= capacity and space.has_room(num_bytes):
            start = space.allocate(num_bytes)
            assert 0 <= start <= start + num_bytes <= capacity
            assert all(start + num_bytes <= other or start >= end for other, end in taken)
            taken.append((start, start + num_bytes))
        else:
            assert taken or num_bytes > capacity, "an empty ring has room"
        assert space.num_pieces == len(taken)


def test_both_mappings_are_one_memory_that_outlives_the_name() -> None:
    name, ours = create_ring(8192)
    try:
        assert (SHM_DIR / name).stat().st_mode & 0o777 == 0o600
        theirs = open_ring(name, 8192)
    finally:
        unlink_ring(name)
    unlink_ring(name)
    assert not (SHM_DIR / name).exists()
    ours.view(4000, 3)[:] = [1, 2, 3]
    np.testing.assert_array_equal(theirs.view(3999, 5), [0, 1, 2, 3, 0])


def test_nothing_beyond_the_end_is_read() -> None:
    name, ring = create_ring(4096)
    unlink_ring(name)
    assert len(ring.view(4096, 0)) == 0
    with pytest.raises(TransferError, match="beyond"):
        ring.view(4090, 7)


def test_a_ring_for_which_there_is_no_memory_is_an_error_and_leaves_nothing() -> None:
    size = os.statvfs(SHM_DIR)
    with pytest.raises(OSError, match="No space left"):
        create_ring(size.f_blocks * size.f_frsize + 4096)
    assert list(SHM_DIR.glob(f"baton-kv-{os.getpid()}-*")) == []


@pytest.mark.parametrize("name", ["../etc/passwd", "baton-kv-1-", "baton-kv-1-0123456789abcdef/..", "sem.x", ""])
def test_only_rings_are_opened(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a ring"):
        open_ring(name, 4096)


def test_a_ring_smaller_than_promised_is_not_mapped() -> None:
    name, _ = create_ring(4096)
    try:
        with pytest.raises(ValueError, match="smaller"):
            open_ring(name, 8192)
    finally:
        unlink_ring(name)
    with pytest.raises(FileNotFoundError):
        open_ring(name, 4096)


def test_sweeping_removes_the_rings_of_the_dead_only() -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    orphan = SHM_DIR / f"baton-kv-{int(dead.stdout)}-0123456789abcdef"
    orphan.touch()
    name, _ = create_ring(4096)
    try:
        sweep_rings()
        assert not orphan.exists()
        assert (SHM_DIR / name).exists()
    finally:
        unlink_ring(name)
        orphan.unlink(missing_ok=True)
