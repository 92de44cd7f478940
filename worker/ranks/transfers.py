"""The data plane of a worker's ranks: the calls and events of `kvtransfer.ranks` as messages, at both ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton import wire
from baton.errors import BatonError, from_status
from baton.internal.v1 import ranks_pb2, transfer_pb2
from baton.requests import AttemptRef
from kvtransfer.following_sender import FollowingSender
from kvtransfer.pages import HeadRange
from kvtransfer.ranks import LackingBlocks, RankReceiverEvents, RankSenderEvents
from kvtransfer.receiver import Receiver
from worker.ranks.channel import Channel

OnEvent = Callable[[ranks_pb2.RankEvent], None]


def rank_heads(num_kv_heads: int, rank: int) -> HeadRange:
    """The KV heads that a rank holds, in the model's numbers; each holds `num_kv_heads`."""
    return HeadRange(rank * num_kv_heads, num_kv_heads)


# At the leader


class RemoteReceiver:
    """A follower's `ReceivingRank`: its calls are in line with the steps."""

    def __init__(self, steps: Channel[ranks_pb2.RankEvent], shard: transfer_pb2.Shard) -> None:
        self.shard = shard
        self._steps = steps

    def reserve(self, reservation: int, ref: AttemptRef, blocks: LackingBlocks) -> None:
        lacking = [
            ranks_pb2.LackingBlocks(group=group, first_block=first_block, block_ids=block_ids)
            for group, first_block, block_ids in blocks
        ]
        wanted = ranks_pb2.ReserveBlocks(reservation=reservation, ref=wire.ref_to_wire(ref), blocks=lacking)
        self._send(ranks_pb2.ReceiverCommand(reserve=wanted))

    def release(self, reservation: int) -> None:
        self._send(ranks_pb2.ReceiverCommand(release=reservation))

    def abort(self, request: transfer_pb2.AbortRequest) -> None:
        self._send(ranks_pb2.ReceiverCommand(abort=request))

    def _send(self, command: ranks_pb2.ReceiverCommand) -> None:
        self._steps.send(ranks_pb2.RankCommand(receive=command))


class RemoteSender:
    """A follower's `SendingRank`: its calls are in line with the steps."""

    def __init__(self, steps: Channel[ranks_pb2.RankEvent]) -> None:
        self._steps = steps

    def open(self, push: int, ticket: transfer_pb2.Ticket) -> None:
        self._steps.send(ranks_pb2.RankCommand(open=ranks_pb2.OpenPush(push=push, ticket=ticket)))

    def warm(self, ticket: transfer_pb2.Ticket) -> None:
        self._steps.send(ranks_pb2.RankCommand(warm=ticket))

    def commit(self, push: int, first_tokens: Sequence[transfer_pb2.FirstToken]) -> None:
        self._steps.send(ranks_pb2.RankCommand(commit=ranks_pb2.CommitPush(push=push, first_tokens=first_tokens)))

    def abort(self, push: int, reason: str) -> None:
        self._steps.send(ranks_pb2.RankCommand(abort=ranks_pb2.EndPush(push=push, reason=reason)))


def tell_receiver(leader: RankReceiverEvents) -> OnEvent:
    """What hands a follower's events on to the leader of receivers."""

    def tell(event: ranks_pb2.RankEvent) -> None:
        match event.WhichOneof("event"):
            case "committed":
                leader.committed(event.committed.reservation, event.committed.first_tokens)
            case "aborted":
                leader.aborted(event.aborted.reservation, event.aborted.reason)
            case "released":
                leader.released(event.released)
            case other:
                raise AssertionError(f"a receiving rank has no event {other}")

    return tell


def tell_sender(leader: RankSenderEvents) -> OnEvent:
    """What hands a follower's events on to the leader of senders."""

    def tell(event: ranks_pb2.RankEvent) -> None:
        ended = event.ended
        error = from_status(ended.status, ended.message) if ended.status else None
        leader.ended(ended.push, error, ended.bytes_sent, ended.sending_s)

    return tell


# At a follower


class EventsToLeader:
    """`RankReceiverEvents` and `RankSenderEvents` that the leader hears of."""

    def __init__(self, transfers: Channel[ranks_pb2.RankCommand]) -> None:
        self._transfers = transfers

    def committed(self, reservation: int, first_tokens: Sequence[transfer_pb2.FirstToken]) -> None:
        committed = ranks_pb2.ReservationCommitted(reservation=reservation, first_tokens=first_tokens)
        self._transfers.send(ranks_pb2.RankEvent(committed=committed))

    def aborted(self, reservation: int, reason: str) -> None:
        aborted = ranks_pb2.ReservationAborted(reservation=reservation, reason=reason)
        self._transfers.send(ranks_pb2.RankEvent(aborted=aborted))

    def released(self, reservation: int) -> None:
        self._transfers.send(ranks_pb2.RankEvent(released=reservation))

    def ended(self, push: int, error: BatonError | None, bytes_sent: int, sending_s: float) -> None:
        ended = ranks_pb2.PushEnded(push=push, bytes_sent=bytes_sent, sending_s=sending_s)
        if error is not None:
            ended.status, ended.message = error.status, error.message
        self._transfers.send(ranks_pb2.RankEvent(ended=ended))


def do_receiving(command: ranks_pb2.ReceiverCommand, receiver: Receiver) -> None:
    """Does what a leader has a follower's receiver do."""
    match command.WhichOneof("command"):
        case "reserve":
            wanted = command.reserve
            blocks = [(lacking.group, lacking.first_block, lacking.block_ids) for lacking in wanted.blocks]
            receiver.reserve(wanted.reservation, wire.ref_from_wire(wanted.ref), blocks)
        case "release":
            receiver.release(command.release)
        case "abort":
            receiver.abort(command.abort)
        case other:
            raise AssertionError(f"a receiving rank has no command {other}")


def do_sending(command: ranks_pb2.RankCommand, sender: FollowingSender, locations: Sequence[tuple[int, int]]) -> None:
    """Does what a leader has a follower's sender do between steps; `locations` are the (group, slot) of each layer."""
    match command.WhichOneof("command"):
        case "open":
            sender.open(command.open.push, command.open.ticket)
        case "warm":
            sender.warm(command.warm)
        case "send":
            send_run(command.send, sender, locations)
        case "commit":
            sender.commit(command.commit.push, command.commit.first_tokens)
        case "abort":
            sender.abort(command.abort.push, command.abort.reason)
        case other:
            raise AssertionError(f"a rank has no command {other}")


def send_run(run: ranks_pb2.PageRun, sender: FollowingSender, locations: Sequence[tuple[int, int]]) -> None:
    """Sends a run's pages at each (group, slot) of this rank's pool."""
    for group, slot in locations:
        sender.send(run.push, group, slot, run.first_block, run.groups[group].ids)
