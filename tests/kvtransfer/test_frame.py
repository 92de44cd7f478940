from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import TransferError
from kvtransfer.frame import HEADER_BYTES, Frame

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
frames = st.builds(Frame, u64, u32, u32, u16, u16, u16, u16, u32, u32, u32, u64, st.booleans())


@given(frames, st.binary(max_size=20))
def test_unpack_reads_what_pack_wrote(frame: Frame, before: bytes) -> None:
    packed = frame.pack()
    assert len(packed) == HEADER_BYTES
    assert Frame.unpack(before + packed + b"payload", len(before)) == frame


@given(frames, st.integers(0, HEADER_BYTES - 1))
def test_a_header_that_is_cut_off_is_refused(frame: Frame, size: int) -> None:
    with pytest.raises(TransferError, match="cut off"):
        Frame.unpack(frame.pack()[:size])


def test_what_is_no_header_is_refused() -> None:
    with pytest.raises(TransferError, match="begins with"):
        Frame.unpack(b"\x80\x04" + bytes(HEADER_BYTES))
