"""Messages between a leader and a follower arrive as they were sent."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from baton.internal.v1 import ranks_pb2
from engine.batch import Batch, BatchItem, build_batch
from engine.kv.layout import KVLayout, group_layers
from engine.parallel.wire import batch_from_arrays, batch_to_arrays
from worker.ranks.channel import Channel

Ends = tuple[Channel[ranks_pb2.RankEvent], Channel[ranks_pb2.RankCommand]]


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = socket.socketpair()
    channels = Channel(ours, ranks_pb2.RankEvent), Channel(theirs, ranks_pb2.RankCommand)
    yield channels
    for channel in channels:
        channel.close()


def batch() -> Batch:
    layout = KVLayout(group_layers([None, 8]), num_kv_heads=1, head_dim=4, block_size=8, dtype=torch.float32)
    items = [BatchItem([5, 6, 7], 2, [[3], [4]], 2), BatchItem([8], 16, [[5, 6, 7], [8, 9, 1]], 1)]
    return build_batch(items, layout)


@pytest.mark.parametrize("sources", [None, np.array([-1, 0, -1, 1])])
def test_a_batch_arrives_whole(ends: Ends, sources: np.ndarray | None) -> None:
    sent = dataclasses.replace(batch(), sources=sources)
    leader, follower = ends
    step = ranks_pb2.RankStep(announces=True, pages=[ranks_pb2.PageRun(push=7, first_block=1)])
    leader.send(ranks_pb2.RankCommand(step=step), batch_to_arrays(sent))
    command, arrays = follower.receive()
    assert command.step == step
    received = batch_from_arrays(arrays)
    for field in dataclasses.fields(Batch):
        np.testing.assert_equal(getattr(received, field.name), getattr(sent, field.name))
    assert all(array.flags.aligned for array in arrays)


def test_what_is_larger_than_the_sockets_buffer_waits_for_the_reader(ends: Ends) -> None:
    leader, follower = ends
    table = np.arange(3_000_000, dtype=np.int32).reshape(3, -1)
    empty = np.empty((2, 0), np.int64)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(leader.send, ranks_pb2.RankCommand(), [empty, table.T[:2].T, empty, table])
        _, arrays = follower.receive()
        sending.result()
    for received, sent in zip(arrays, [empty, table[:, :2], empty, table], strict=True):
        np.testing.assert_array_equal(received, sent)


def test_messages_of_several_threads_do_not_mix(ends: Ends) -> None:
    leader, follower = ends
    with ThreadPoolExecutor(4) as pool:
        for number in range(64):
            pool.submit(
                leader.send,
                ranks_pb2.RankCommand(abort=ranks_pb2.EndPush(push=number)),
                [np.full(number, number, np.int64)],
            )
        for _ in range(64):
            command, (array,) = follower.receive()
            np.testing.assert_array_equal(array, np.full(command.abort.push, command.abort.push))


def test_who_receives_when_the_other_end_closes_is_told(ends: Ends) -> None:
    leader, follower = ends
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(follower.receive)
        leader.close()
        with pytest.raises(EOFError):
            receiving.result()
    with pytest.raises(OSError, match="pipe"):
        follower.send(ranks_pb2.RankEvent())
