"""The sizes that attention and products run with, by GPU and shape: tables only, nothing is tuned at run time.

`python -m bench.gpu` measures candidates and prints rows for these tables. No row has been measured yet: they follow
from what the matrix instructions want, and from the registers and the shared memory that compiled kernels need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionTile:
    """
    Attributes:
        rows: query rows of a program, a power of two; tokens times the query heads of a group.
        keys: keys of a tile, a power of two.
        num_warps: of a program.
        num_stages: of the software pipeline. Which block a tile lies in is loaded a stage ahead of it, so that
            (stages - 1) / 2 tiles are under way while one is computed on.
        descriptors: whether the tensor memory accelerator copies tiles, where a tile lies inside a block.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A tile and the calls that it serves: those within all limits.

    Attributes:
        max_rows: most query rows of a sequence, tokens of the longest chunk times query heads of a group.
        max_head_dim: widest head, rounded up to a power of two.
        max_itemsize: bytes of a pool's element.
    """

    max_rows: int
    max_head_dim: int
    max_itemsize: int
    tile: AttentionTile


# A decode's rows fill the smallest matrix instruction; anything longer is computed in tall tiles.
_DECODE = 16
_ANY = 1 << 30
# The widest heads of any table.
MAX_HEAD_DIM = 256

_HOPPER = (
    Row(_DECODE, 64, 2, AttentionTile(16, 128, 4, 3, descriptors=True)),
    Row(_DECODE, 128, 2, AttentionTile(16, 64, 4, 3, descriptors=True)),
    Row(_DECODE, 256, 2, AttentionTile(16, 64, 4, 3, descriptors=True)),
    Row(_ANY, 128, 2, AttentionTile(128, 64, 8, 5, descriptors=True)),
    Row(_ANY, 256, 2, AttentionTile(64, 64, 8, 3, descriptors=True)),
    Row(_ANY, 128, 4, AttentionTile(16, 32, 8, 3)),
    Row(_ANY, 256, 4, AttentionTile(16, 16, 4, 3)),
)

_AMPERE = (
    Row(_DECODE, 128, 2, AttentionTile(16, 64, 4, 3)),
    Row(_DECODE, 256, 2, AttentionTile(16, 32, 4, 3)),
    Row(_ANY, 64, 2, AttentionTile(128, 64, 8, 5)),
    Row(_ANY, 128, 2, AttentionTile(128, 32, 8, 5)),
    Row(_ANY, 256, 2, AttentionTile(64, 32, 8, 3)),
    Row(_ANY, 128, 4, AttentionTile(16, 32, 8, 3)),
    Row(_ANY, 256, 4, AttentionTile(16, 16, 4, 3)),
)

_CDNA3 = (
    Row(_DECODE, 128, 2, AttentionTile(16, 64, 4, 2)),
    Row(_DECODE, 256, 2, AttentionTile(16, 32, 4, 2)),
    Row(_ANY, 128, 2, AttentionTile(64, 32, 4, 2)),
    Row(_ANY, 256, 2, AttentionTile(32, 32, 4, 2)),
    Row(_ANY, 128, 4, AttentionTile(16, 32, 4, 1)),
    Row(_ANY, 256, 4, AttentionTile(16, 16, 4, 1)),
)

_INTERPRETER = (Row(_ANY, MAX_HEAD_DIM, 8, AttentionTile(16, 16, 1, 1, descriptors=True)),)

# By kind of GPU; `_kind` says which is of which.
ATTENTION: Mapping[str, Sequence[Row]] = {
    "ampere": _AMPERE,
    "hopper": _HOPPER,
    "cdna3": _CDNA3,
    "interpreter": _INTERPRETER,
}


def attention_tile(architecture: str, *, rows: int, head_dim: int, itemsize: int) -> AttentionTile:
    """The first row of the table that serves a call.

    Args:
        rows: query rows of the longest chunk.
        head_dim: rounded up to a power of two.
        itemsize: bytes of a pool's element.

    Raises:
        ValueError: heads are wider than any table allows.
    """
    for row in ATTENTION[_kind(architecture)]:
        if rows <= row.max_rows and head_dim <= row.max_head_dim and itemsize <= row.max_itemsize:
            return row.tile
    raise ValueError(f"head_dim: {head_dim} is above the {MAX_HEAD_DIM} that attention kernels are made for")


def invariant_tile(architecture: str, *, head_dim: int, itemsize: int) -> AttentionTile:
    """The tile of every call in batch-invariant mode: that of chunks, since they replay what may have been decodes."""
    return attention_tile(architecture, rows=_ANY, head_dim=head_dim, itemsize=itemsize)


@dataclasses.dataclass(frozen=True, slots=True)
class ProductTile:
    """
    Attributes:
        rows, columns: of the result.
        depth: elements of a row and of a column that are multiplied at a time.
        num_warps, num_stages: as of an `AttentionTile`.
        descriptors: whether the tensor memory accelerator copies tiles.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


# By kind of GPU: for elements of at most two bytes, and for wider ones. One tile serves any number of rows, which is
# the point of it: as many rows as an instruction takes, for decodes, and few columns, for the processors to share.
PRODUCT: Mapping[str, tuple[ProductTile, ProductTile]] = {
    "ampere": (ProductTile(64, 128, 32, 4, 4), ProductTile(32, 64, 32, 4, 2)),
    "hopper": (ProductTile(64, 128, 64, 4, 4, descriptors=True), ProductTile(32, 64, 32, 4, 2)),
    "cdna3": (ProductTile(64, 128, 64, 4, 2), ProductTile(32, 64, 32, 4, 2)),
    "interpreter": (ProductTile(16, 128, 64, 1, 1, descriptors=True),) * 2,
}


def product_tile(architecture: str, *, itemsize: int) -> ProductTile:
    """The tile of every batch-invariant product of elements of so many bytes."""
    narrow, wide = PRODUCT[_kind(architecture)]
    return narrow if itemsize <= 2 else wide


def _kind(architecture: str) -> str:
    """Whose tables serve a GPU.

    From compute capability 12 on, the matrix instructions and the shared memory (99 KB) of GPUs for workstations are
    like those of Ampere's. What is not known is served like the most modest kind of its maker.
    """
    if architecture == "interpreter":
        return architecture
    if architecture.startswith("gfx"):
        return "cdna3"
    return "hopper" if 90 <= int(architecture.removeprefix("sm_")) < 120 else "ampere"
