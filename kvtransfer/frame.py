"""The header of a frame: a range of heads of some pages of one (group, slot), on its way from one pool to another.

Little-endian, 52 bytes:

    magic 4s | reservation u64 | attempt u32 | seq u32 | group u16 | slot u16 | first_head u16 | num_heads u16
    | first_block u32 | num_blocks u32 | payload_bytes u32 | checksum u64 | acknowledge bool | padding 3

The magic carries the version. What follows the header (the payload, or where it lies) is the transport's business.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from baton.errors import TransferError
from kvtransfer.pages import HeadRange

_HEADER = struct.Struct("<4sQIIHHHHIIIQ?3x")
_MAGIC = b"BKV3"

HEADER_BYTES = _HEADER.size


class Frame(NamedTuple):
    """
    Attributes:
        reservation, attempt: whose blocks these are; the receiver refuses what is over.
        seq: index of the frame among those of its sender for this reservation, from 0.
        first_head, num_heads: which KV heads of the pages, in the numbers of the whole model.
        first_block, num_blocks: logical ordinals [first_block, first_block + num_blocks) of `group`.
        checksum: xxh3_64 of the payload; 0 until a wire has read it, and where it passes from one GPU's memory to
            another's without a host that reads it.
        acknowledge: whether the receiver replies to this frame at once; others are acknowledged with a later one.
    """

    reservation: int
    attempt: int
    seq: int
    group: int
    slot: int
    first_head: int
    num_heads: int
    first_block: int
    num_blocks: int
    payload_bytes: int
    checksum: int = 0
    acknowledge: bool = True

    @property
    def heads(self) -> HeadRange:
        return HeadRange(self.first_head, self.num_heads)

    def pack(self) -> bytes:
        return _HEADER.pack(_MAGIC, *self)

    @classmethod
    def unpack(cls, buffer: bytes, offset: int = 0) -> Frame:
        """Reads a header; raises TransferError if there is none at `offset`."""
        if len(buffer) - offset < HEADER_BYTES:
            raise TransferError(f"frame header is cut off after {len(buffer) - offset} bytes")
        magic, *fields = _HEADER.unpack_from(buffer, offset)
        if magic != _MAGIC:
            raise TransferError(f"frame begins with {magic!r}, not with {_MAGIC!r}")
        return cls(*fields)
