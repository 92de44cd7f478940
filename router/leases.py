"""Lease renewal: one batched call to a worker every third of a lease, for all that the router holds there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import grpc.aio

from baton.internal.v1 import worker_pb2
from router.request_state import Attempt

_log = logging.getLogger(__name__)

Renew = Callable[[worker_pb2.RenewLeasesRequest], Awaitable[worker_pb2.RenewLeasesResponse]]


class LeaseRenewal:
    """Renews the leases of one worker's attempts.

    A lease that the worker does not know may be one that ended a moment ago, its last tokens still on their way; only
    one that it does not know twice in a row is lost.

    Args:
        renew: makes the call; it must not outlast a third of a lease.
        attempts: those whose leases are to be renewed now.
        on_lost: told of an attempt whose lease the worker no longer knows.
        on_unreachable: called when no renewal has succeeded for a whole lease.
    """

    def __init__(
        self,
        renew: Renew,
        *,
        router_id: str,
        lease_s: float,
        attempts: Callable[[], Sequence[Attempt]],
        on_lost: Callable[[Attempt], None],
        on_unreachable: Callable[[], None],
    ) -> None:
        self._renew = renew
        self._router_id = router_id
        self._interval_s = lease_s / 3
        self._attempts = attempts
        self._on_lost = on_lost
        self._on_unreachable = on_unreachable
        self._suspects: set[tuple[str, int]] = set()
        self._num_failed = 0

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            attempts = self._attempts()
            if not attempts:
                continue
            try:
                await self._renew_all(attempts)
                self._num_failed = 0
            except grpc.aio.AioRpcError as error:
                _log.warning("leases were not renewed: %s", error.details())
                self._num_failed += 1
                if self._num_failed % 3 == 0:
                    self._on_unreachable()

    async def _renew_all(self, attempts: Sequence[Attempt]) -> None:
        request = worker_pb2.RenewLeasesRequest(router_id=self._router_id, refs=[attempt.ref for attempt in attempts])
        response = await self._renew(request)
        unknown = {(ref.request_id, ref.attempt) for ref in response.unknown}
        for attempt in attempts:
            name = (attempt.ref.request_id, attempt.number)
            if name in unknown and name in self._suspects:
                self._on_lost(attempt)
        self._suspects = unknown
