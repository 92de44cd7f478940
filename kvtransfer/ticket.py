"""What two pools must agree on, and the ticket by which a receiver tells a sender what it lacks."""

from __future__ import annotations

from collections.abc import Sequence

from baton.errors import InvalidRequestError, LayoutMismatchError
from baton.internal.v1 import transfer_pb2
from engine.kv.layout import KVLayout
from kvtransfer.pages import HeadRange

# Every field is compared, so a field added to the message takes part without being named here.
_FIELDS = tuple(field.name for field in transfer_pb2.LayoutFingerprint.DESCRIPTOR.fields)


def layout_fingerprint(
    layout: KVLayout, *, model: str, revision: str = "", codec: str = "raw", degree: int = 1
) -> transfer_pb2.LayoutFingerprint:
    """The identity of the bytes in the pools of a worker.

    Args:
        layout: of the pool of one rank.
        model: what names the weights, equal on both sides; not a path, which may differ between hosts.
        revision: tells weights of one name apart.
        codec: how pages are encoded.
        degree: ranks among which the worker's KV heads are split.
    """
    return transfer_pb2.LayoutFingerprint(
        model=model,
        revision=revision,
        dtype=str(layout.dtype).removeprefix("torch."),
        codec=codec,
        block_size=layout.block_size,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads * degree,
        head_dim=layout.head_dim,
        groups=[group.describe() for group in layout.groups],
    )


def check_layouts(ours: transfer_pb2.LayoutFingerprint, theirs: transfer_pb2.LayoutFingerprint) -> None:
    """Raises LayoutMismatchError, which names every difference, unless heads can be exchanged byte for byte."""
    differences = [
        f"{name} is {_show(ours, name)} here and {_show(theirs, name)} at the peer"
        for name in _FIELDS
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if differences:
        raise LayoutMismatchError("KV pools cannot exchange blocks: " + "; ".join(differences))


def check_ticket(ticket: transfer_pb2.Ticket, layout: KVLayout) -> None:
    """Raises InvalidRequestError unless `ticket` asks for blocks that exist in `layout` and says where to send them."""
    if not ticket.reservation:
        raise InvalidRequestError("ticket.reservation", "is missing")
    _check_shards(ticket)
    num_blocks = layout.num_blocks(ticket.num_tokens)
    end_of_previous = dict.fromkeys(range(len(layout.groups)), 0)
    for wanted in sorted(ticket.ranges, key=lambda r: (r.group, r.first_block)):
        where = f"group {wanted.group}, blocks from {wanted.first_block}"
        if wanted.group >= len(layout.groups):
            raise InvalidRequestError("ticket.ranges", f"{where}: the layout has {len(layout.groups)} groups")
        if not wanted.num_blocks or wanted.first_block + wanted.num_blocks > num_blocks:
            raise InvalidRequestError(
                "ticket.ranges", f"{where}: {wanted.num_blocks} blocks do not fit in {num_blocks}"
            )
        if wanted.first_block < end_of_previous[wanted.group]:
            raise InvalidRequestError("ticket.ranges", f"{where}: overlaps another range")
        end_of_previous[wanted.group] = wanted.first_block + wanted.num_blocks


def shard_heads(shard: transfer_pb2.Shard) -> HeadRange:
    return HeadRange(shard.first_head, shard.num_heads)


def _check_shards(ticket: transfer_pb2.Ticket) -> None:
    """Raises InvalidRequestError unless the ranks of the receiver hold every head once, in order, with offers."""
    next_head = 0
    for rank, shard in enumerate(ticket.shards):
        heads = shard_heads(shard)
        if heads.first != next_head or not heads.count:
            raise InvalidRequestError("ticket.shards", f"rank {rank} holds {heads}, where head {next_head} comes next")
        if not shard.offers:
            raise InvalidRequestError("ticket.shards", f"rank {rank} makes no offer")
        next_head = heads.stop
    if next_head != ticket.layout.num_kv_heads:
        raise InvalidRequestError(
            "ticket.shards", f"{len(ticket.shards)} ranks hold {next_head} of {ticket.layout.num_kv_heads} heads"
        )


def overlaps(
    ranges: Sequence[transfer_pb2.BlockRange], group: int, first_block: int, num_blocks: int
) -> list[tuple[int, int]]:
    """Parts of [first_block, first_block + num_blocks) of `group` that `ranges` ask for, as [start, stop) ordinals."""
    end = first_block + num_blocks
    parts = [
        (max(first_block, wanted.first_block), min(end, wanted.first_block + wanted.num_blocks))
        for wanted in ranges
        if wanted.group == group
    ]
    return [(start, stop) for start, stop in parts if start < stop]


def _show(fingerprint: transfer_pb2.LayoutFingerprint, name: str) -> str:
    value = getattr(fingerprint, name)
    return repr(value) if isinstance(value, str | int) else repr(list(value))
