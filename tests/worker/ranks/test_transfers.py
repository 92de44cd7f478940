"""What a leader and a follower's data plane say to each other reaches the other as it was said."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from baton.errors import TransferError
from baton.internal.v1 import ranks_pb2, transfer_pb2
from baton.requests import AttemptRef
from kvtransfer.following_sender import FollowingSender
from kvtransfer.receiver import Receiver
from worker.ranks.channel import Channel
from worker.ranks.pages import PageRun, StepPages
from worker.ranks.transfers import (
    EventsToLeader,
    RemoteReceiver,
    RemoteSender,
    do_receiving,
    do_sending,
    tell_receiver,
    tell_sender,
)

FIRST = [transfer_pb2.FirstToken(choice=1, token_id=5)]
ABORT = transfer_pb2.AbortRequest(reservation=9, reason="gone")


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_follower_receives_as_it_is_told(sockets: tuple[socket.socket, socket.socket]) -> None:
    leader, follower = Channel(sockets[0], ranks_pb2.RankEvent), Channel(sockets[1], ranks_pb2.RankCommand)
    remote = RemoteReceiver(leader, transfer_pb2.Shard(first_head=2, num_heads=2))
    remote.reserve(9, AttemptRef("a", 2), [(0, 3, [7, 8]), (1, 0, [])])
    remote.abort(ABORT)
    remote.release(9)
    receiver = mock.create_autospec(Receiver, instance=True)
    for _ in range(3):
        do_receiving(follower.receive()[0].receive, receiver)
    assert receiver.mock_calls == [
        mock.call.reserve(9, AttemptRef("a", 2), [(0, 3, [7, 8]), (1, 0, [])]),
        mock.call.abort(ABORT),
        mock.call.release(9),
    ]


def test_a_follower_sends_as_it_is_told(sockets: tuple[socket.socket, socket.socket]) -> None:
    leader, follower = Channel(sockets[0], ranks_pb2.RankEvent), Channel(sockets[1], ranks_pb2.RankCommand)
    remote, ticket = RemoteSender(leader), transfer_pb2.Ticket(reservation=9)
    remote.warm(ticket)
    remote.open(4, ticket)
    leader.send(ranks_pb2.RankCommand(send=PageRun(mock.Mock(), 4, 1, [[7, 8], [9, 3]]).to_wire()))
    remote.commit(4, FIRST)
    remote.abort(4, "no more")
    sender = mock.create_autospec(FollowingSender, instance=True)
    for _ in range(5):
        do_sending(follower.receive()[0], sender, [(0, 0), (1, 0), (0, 1)])
    assert sender.mock_calls == [
        mock.call.warm(ticket),
        mock.call.open(4, ticket),
        mock.call.send(4, 0, 0, 1, [7, 8]),
        mock.call.send(4, 1, 0, 1, [9, 3]),
        mock.call.send(4, 0, 1, 1, [7, 8]),
        mock.call.commit(4, FIRST),
        mock.call.abort(4, "no more"),
    ]


def test_a_leader_hears_what_happens_in_its_followers(sockets: tuple[socket.socket, socket.socket]) -> None:
    leader, follower = Channel(sockets[0], ranks_pb2.RankEvent), Channel(sockets[1], ranks_pb2.RankCommand)
    events, heard = EventsToLeader(follower), mock.Mock()
    events.committed(9, FIRST)
    events.aborted(8, "wrong bytes")
    events.released(9)
    for _ in range(3):
        tell_receiver(heard)(leader.receive()[0])
    assert heard.mock_calls == [
        mock.call.committed(9, FIRST),
        mock.call.aborted(8, "wrong bytes"),
        mock.call.released(9),
    ]
    events.ended(3, None, 100, 0.5)
    events.ended(4, TransferError("lost"), 0, 0.0)
    ended: list[Any] = []
    heard.ended = lambda *arguments: ended.append(arguments)
    for _ in range(2):
        tell_sender(heard)(leader.receive()[0])
    assert ended[0] == (3, None, 100, 0.5)
    assert isinstance(ended[1][1], TransferError)
    assert ended[1][1].message == "lost"


def test_a_steps_pages_are_sent_layer_by_layer() -> None:
    first, second = mock.Mock(), mock.Mock()
    pages = StepPages([PageRun(first, 1, 0, [[7], [8]]), PageRun(second, 2, 5, [[9], [3]])], [(0, 0), (1, 0)])
    pages(1)
    assert first.mock_calls == [mock.call.send(1, 0, 0, [8])]
    assert second.mock_calls == [mock.call.send(1, 0, 5, [3])]
