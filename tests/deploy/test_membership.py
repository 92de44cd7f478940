"""The views that followers get."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from baton.internal.v1 import worker_pb2
from deploy.membership import Membership, MembershipServer, follow_membership


def info(name: str, epoch: int) -> worker_pb2.WorkerInfo:
    return worker_pb2.WorkerInfo(name=name, epoch=epoch)


def names(view: worker_pb2.MembershipView) -> list[tuple[str, int]]:
    return [(worker.name, worker.epoch) for worker in view.workers]


def test_views_are_full_and_their_version_rises_with_each_change() -> None:
    membership = Membership()
    membership.join(info("prefill-0", 1))
    membership.join(info("decode-0", 2))
    assert names(membership.view) == [("decode-0", 2), ("prefill-0", 1)]
    version = membership.view.version
    membership.leave(info("prefill-0", 1))
    assert names(membership.view) == [("decode-0", 2)]
    assert membership.view.version == version + 1


def test_a_new_incarnation_takes_the_place_of_the_old_which_cannot_remove_it() -> None:
    membership = Membership()
    membership.join(info("prefill-0", 1))
    membership.join(info("prefill-0", 2))
    version = membership.view.version
    membership.leave(info("prefill-0", 1))
    assert names(membership.view) == [("prefill-0", 2)]
    assert membership.view.version == version


@pytest_asyncio.fixture
async def served() -> AsyncIterator[tuple[Membership, str]]:
    membership = Membership()
    server = MembershipServer(membership, "127.0.0.1")
    yield membership, await server.start()
    await server.stop()


async def test_a_follower_gets_the_present_view_at_once_and_each_change(served: tuple[Membership, str]) -> None:
    membership, address = served
    membership.join(info("prefill-0", 1))
    views = follow_membership(address)
    assert names(await anext(views)) == [("prefill-0", 1)]
    membership.join(info("decode-0", 2))
    assert names(await anext(views)) == [("decode-0", 2), ("prefill-0", 1)]
    await views.aclose()


async def test_every_follower_ends_up_with_the_last_view(served: tuple[Membership, str]) -> None:
    membership, address = served
    followers = [follow_membership(address) for _ in range(3)]
    for views in followers:
        await anext(views)
    for epoch in range(1, 30):
        membership.join(info("prefill-0", epoch))
    for views in followers:
        while names(await anext(views)) != [("prefill-0", 29)]:
            pass
        await views.aclose()
