"""What the leader's loop hears of its ranks, whatever the order in which they tell, and what a follower tells."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.config import TransferConfig
from baton.errors import BatonError, DuplicateRequestError, TransferError, UnavailableError
from baton.internal.v1 import transfer_pb2
from baton.requests import AttemptRef
from kvtransfer.following_sender import FollowingSender
from kvtransfer.leading_receiver import LeadingReceiver
from kvtransfer.leading_sender import LeadingPush, LeadingSender
from kvtransfer.ranks import LackingBlocks
from kvtransfer.sender import Sender
from tests.kvtransfer.sides import Recorder, ref

A, B = ref("a"), ref("b")
FINGERPRINT = transfer_pb2.LayoutFingerprint(num_kv_heads=4)
FIRST = [transfer_pb2.FirstToken(choice=0, token_id=7)]


@dataclasses.dataclass
class FakeRank:
    """Keeps what it is told."""

    shard: transfer_pb2.Shard
    reserved: list[int] = dataclasses.field(default_factory=list)
    released: list[int] = dataclasses.field(default_factory=list)
    aborted: list[int] = dataclasses.field(default_factory=list)

    def reserve(self, reservation: int, ref: AttemptRef, blocks: LackingBlocks) -> None:
        self.reserved.append(reservation)

    def release(self, reservation: int) -> None:
        self.released.append(reservation)

    def abort(self, request: transfer_pb2.AbortRequest) -> None:
        self.aborted.append(request.reservation)


def receiver_of(num_ranks: int) -> tuple[LeadingReceiver, list[FakeRank], Recorder]:
    events = Recorder()
    leader = LeadingReceiver(FINGERPRINT, "decode-0", 3, TransferConfig(), events)
    ranks = [FakeRank(transfer_pb2.Shard(first_head=rank, num_heads=1)) for rank in range(num_ranks)]
    leader.lead(ranks, "host:1")
    return leader, ranks, events


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["committed", "aborted", "nothing"]), min_size=1, max_size=4), st.data())
def test_one_outcome_is_told_and_the_release_after_it(outcomes: list[str], data: st.DataObject) -> None:
    leader, ranks, events = receiver_of(len(outcomes))
    reservation = leader.reserve(A, 10, 0, []).reservation
    # Each rank tells its outcome, if any, before its release, which comes after the leader's word.
    release = -1
    order = data.draw(st.permutations([release, *range(len(outcomes)), *range(len(outcomes))]))
    told = [False] * len(outcomes)
    num_waiting = 0
    fenced = False
    due = ""
    for step in order:
        if step == release:
            leader.release(A)
            fenced = True
            for _ in range(num_waiting):
                leader.released(reservation)
        elif not told[step]:
            told[step] = True
            if outcomes[step] == "committed":
                leader.committed(reservation, FIRST)
            elif outcomes[step] == "aborted":
                leader.aborted(reservation, "why not")
                due = due or ("" if fenced else "aborted")
            told_all = all(told) and set(outcomes) == {"committed"}
            due = due or ("committed" if told_all and not fenced else "")
        elif fenced:
            leader.released(reservation)
        else:
            num_waiting += 1
    assert events.of(A) == [due, "released"] if due else ["released"]
    assert [rank.released for rank in ranks] == [[reservation]] * len(ranks)
    assert leader.reserve(A, 10, 0, []).reservation > reservation


def test_a_ticket_names_every_rank_and_each_hears_of_it() -> None:
    leader, ranks, _ = receiver_of(2)
    ticket = leader.reserve(A, 10, 4, [(0, 1, [5, 6]), (1, 2, [])])
    assert [(shard.first_head, shard.num_heads) for shard in ticket.shards] == [(0, 1), (1, 1)]
    assert [(r.group, r.first_block, r.num_blocks) for r in ticket.ranges] == [(0, 1, 2)]
    assert (ticket.worker, ticket.epoch, ticket.control_address) == ("decode-0", 3, "host:1")
    assert [rank.reserved for rank in ranks] == [[ticket.reservation]] * 2
    with pytest.raises(DuplicateRequestError):
        leader.reserve(A, 10, 4, [])
    assert leader.reserve(B, 10, 4, []).reservation > ticket.reservation


def test_an_abort_goes_to_every_rank_of_the_reservation_that_it_names() -> None:
    leader, ranks, _ = receiver_of(2)
    ticket = leader.reserve(A, 10, 0, [])
    leader.abort(transfer_pb2.AbortRequest(ref=ticket.ref, reservation=ticket.reservation + 1))
    assert [rank.aborted for rank in ranks] == [[], []]
    leader.abort(transfer_pb2.AbortRequest(ref=ticket.ref, reservation=ticket.reservation))
    assert [rank.aborted for rank in ranks] == [[ticket.reservation]] * 2


@dataclasses.dataclass
class FakePush:
    """The leader's own part."""

    on_done: Any
    transport: str = "shm"
    bytes_sent: int = 100
    sending_s: float = 0.5
    ends: list[str] = dataclasses.field(default_factory=list)

    def commit(self, first_tokens: Any) -> None:
        self.ends.append("committed")

    def abort(self, reason: str) -> None:
        self.ends.append(reason)

    def end(self, error: BatonError | None) -> None:
        self.on_done(self, error)


class FakeSender:
    """Makes one push."""

    def __init__(self) -> None:
        self.push: FakePush
        self.ends_at_once: BatonError | None = None

    def open(self, ticket: transfer_pb2.Ticket, on_done: Any) -> FakePush:
        self.push = FakePush(on_done)
        if self.ends_at_once is not None:
            self.push.end(self.ends_at_once)
        return self.push


@dataclasses.dataclass
class FakeFollower:
    told: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)

    def open(self, push: int, ticket: transfer_pb2.Ticket) -> None:
        self.told.append(("open", push))

    def warm(self, ticket: transfer_pb2.Ticket) -> None:
        self.told.append(("warm",))

    def commit(self, push: int, first_tokens: Any) -> None:
        self.told.append(("commit", push))

    def abort(self, push: int, reason: str) -> None:
        self.told.append(("abort", push, reason))


def sender_of(num_followers: int) -> tuple[LeadingSender, FakeSender, list[FakeFollower]]:
    own: Any = FakeSender()
    leader = LeadingSender(own)
    followers = [FakeFollower() for _ in range(num_followers)]
    leader.lead(followers)
    return leader, own, followers


@given(st.lists(st.booleans(), min_size=1, max_size=4), st.data())
def test_a_push_is_done_once_when_all_ranks_are_and_fails_with_the_first(
    fails: list[bool], data: st.DataObject
) -> None:
    leader, own, followers = sender_of(len(fails) - 1)
    done: list[tuple[LeadingPush, BatonError | None]] = []
    push = leader.open(transfer_pb2.Ticket(), lambda push, error: done.append((push, error)))
    push.commit(FIRST)
    errors = [TransferError(f"rank {rank}") if fails[rank] else None for rank in range(len(fails))]
    order = data.draw(st.permutations(range(len(fails))))
    for rank in order:
        assert done == []
        if rank == 0:
            own.push.end(errors[0])
        else:
            leader.ended(push.number, errors[rank], 10, 0.1 * rank)
    first = next((errors[rank] for rank in order if fails[rank]), None)
    assert done == [(push, first)]
    assert (push.transport, push.bytes_sent, push.sending_s) == ("shm", 100 + 10 * (len(fails) - 1), 0.5)
    for follower in followers:
        aborts = [told for told in follower.told if told[0] == "abort"]
        assert follower.told[:2] == [("open", push.number), ("commit", push.number)]
        # The last one to end has nobody left to abort.
        assert len(aborts) == (first is not None and first is not errors[order[-1]])


def test_an_end_of_the_leaders_part_before_the_followers_know_reaches_them() -> None:
    leader, own, (follower,) = sender_of(1)
    own.ends_at_once = UnavailableError("gone")
    done: list[BatonError | None] = []
    push = leader.open(transfer_pb2.Ticket(), lambda _, error: done.append(error))
    assert follower.told == [("open", push.number), ("abort", push.number, "another rank's part failed: gone")]
    assert done == []
    leader.ended(push.number, TransferError("aborted"), 0, 0.0)
    assert done == [own.ends_at_once]


def test_pushes_are_numbered_in_their_order() -> None:
    leader, _, (follower,) = sender_of(1)
    pushes = [leader.open(transfer_pb2.Ticket(), lambda push, error: None) for _ in range(3)]
    assert all(one.number < other.number for one, other in itertools.pairwise(pushes))
    assert follower.told == [("open", push.number) for push in pushes]


# A follower


def test_a_follower_that_cannot_open_a_push_says_so() -> None:
    sender, events = mock.create_autospec(Sender, instance=True), mock.Mock()
    sender.open.side_effect = gone = UnavailableError("no way")
    follower = FollowingSender(sender, events)
    follower.open(1, transfer_pb2.Ticket())
    assert events.mock_calls == [mock.call.ended(1, gone, 0, 0.0)]


def test_a_follower_drops_what_is_for_pushes_that_have_ended() -> None:
    sender, events = mock.create_autospec(Sender, instance=True), mock.Mock()
    push = sender.open.return_value
    push.bytes_sent, push.sending_s = 10, 0.5
    follower = FollowingSender(sender, events)
    follower.open(1, transfer_pb2.Ticket())
    follower.send(1, 0, 2, 3, [7])
    assert push.mock_calls == [mock.call.send(0, 2, 3, [7])]
    lost = TransferError("lost")
    sender.open.call_args.args[1](push, lost)
    assert events.mock_calls == [mock.call.ended(1, lost, 10, 0.5)]
    follower.send(1, 1, 2, 3, [7])
    follower.commit(1, FIRST)
    follower.abort(1, "over")
    assert len(push.mock_calls) == 1
    with pytest.raises(AssertionError, match="opened first"):
        follower.commit(2, FIRST)
